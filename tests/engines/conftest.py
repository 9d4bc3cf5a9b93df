"""Molecules that the engines' tests share."""

import pytest
from molecules import alanine_in_water
from toys import HarmonicBath


@pytest.fixture(scope="module")
def bath():
    return HarmonicBath()


@pytest.fixture(scope="module")
def peptide():
    return alanine_in_water()

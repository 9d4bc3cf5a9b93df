"""Molecules that the engines' tests share."""

import pytest
from toys import HarmonicBath

from openmm_cgflow.molecule.system import MolecularSystem


@pytest.fixture(scope="module")
def bath():
    return HarmonicBath()


@pytest.fixture(scope="module")
def peptide(systems):
    folder = systems / "alanine_dipeptide"
    return MolecularSystem.from_files(folder / "alanine_dipeptide.pdb", ["amber99sbildn.xml", "amber99_obc.xml"])

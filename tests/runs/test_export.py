"""The columns of a COLVAR table of samples."""

import mdtraj
import numpy as np
import pytest
from molecules import ALANINE, frame

from openmm_cgflow.analysis.states import peptide_torsions
from openmm_cgflow.runs.export import colvar_columns


@pytest.fixture(scope="module")
def trajectory():
    peptide = frame(ALANINE)
    return mdtraj.Trajectory(np.repeat(peptide.xyz, 20, axis=0), peptide.topology)


class Samples:
    """What a model returns, with or without importance weights."""

    def __init__(self, trajectory, log_weight=None):
        self.trajectory, self.log_weight = trajectory, log_weight
        self.z = np.arange(40.0).reshape(20, 2)
        self.log_q, self.energy = np.zeros(20), np.ones(20)


def test_colvar_columns(trajectory):
    columns = colvar_columns(Samples(trajectory), ["dihedral A-B", "bond C"], peptide_torsions(trajectory))
    assert list(columns) == ["log_q", "energy", "phi_ALA2", "psi_ALA2", "z.dihedral_A-B", "z.bond_C"]
    assert np.array_equal(columns["z.bond_C"], np.arange(1.0, 40.0, 2))


def test_importance_weights_are_a_column_where_there_are_any(trajectory):
    weights = np.linspace(-2, 1, 20)
    columns = colvar_columns(Samples(trajectory, weights), ["dihedral A-B", "bond C"], {})
    assert list(columns)[:3] == ["log_q", "log_weight", "energy"]
    assert np.array_equal(columns["log_weight"], weights)

"""The main job of the README, as it stands there. About ten minutes on two cores."""

import subprocess
import sys

import mdtraj
import numpy as np
import pytest

from openmm_cgflow.export import peptide_torsions

# alphaR, beta and PPII by umbrella sampling and WHAM with the same force field at 300 K.
REFERENCE = (0.406, 0.316, 0.258)


@pytest.mark.slow
def test_connected_basins_of_alanine_dipeptide(systems, tmp_path):
    config = systems / "alanine_dipeptide" / "alanine_dipeptide.yaml"
    run = tmp_path / "ala2"
    subprocess.run([sys.executable, "-m", "openmm_cgflow", "train", str(config), "-o", str(run)], check=True)
    trajectory = mdtraj.load(str(run / "samples.dcd"), top=str(run / "topology.pdb"))
    phi, psi = (np.degrees(torsion) for torsion in peptide_torsions(trajectory).values())
    alpha = (phi < 0) & (psi > -120) & (psi < 50)
    beta = (phi < -100) & ~alpha
    ppii = (phi < 0) & ~alpha & ~beta
    populations = [mask.mean() for mask in (alpha, beta, ppii)]
    assert np.abs(np.subtract(populations, REFERENCE)).max() < 0.12, populations

"""The main job of the README, as it stands there. About ten minutes on two cores."""

import json
import subprocess
import sys

import mdtraj
import numpy as np
import pytest

from openmm_cgflow.analysis.states import RAMACHANDRAN, peptide_torsions, ramachandran_basin
from openmm_cgflow.files.trajectory import read_colvar

# alphaR, beta, PPII and phi > 0 by umbrella sampling and WHAM with the same force field at 300 K.
REFERENCE = (0.406, 0.316, 0.258, 0.0203)


@pytest.mark.slow
def test_basins_of_alanine_dipeptide(systems, tmp_path):
    """Those behind a barrier, too: 3 kT up and 2 % of all. The frames as they are, and with their weights."""
    config = systems / "alanine_dipeptide" / "alanine_dipeptide.yaml"
    run = tmp_path / "ala2"
    subprocess.run([sys.executable, "-m", "openmm_cgflow", "train", str(config), "-o", str(run)], check=True)
    trajectory = mdtraj.load(str(run / "samples.dcd"), top=str(run / "topology.pdb"))
    basin = ramachandran_basin(*peptide_torsions(trajectory).values())
    log_weight = read_colvar(run / "samples.colvar")["log_weight"]
    for weights in (np.zeros(len(basin)), log_weight):
        weights = np.exp(weights - weights.max())
        populations = [np.average(basin == k, weights=weights) for k in range(len(RAMACHANDRAN))]
        away = np.abs(np.subtract(populations, REFERENCE))
        assert away.max() < 0.03, populations
        assert abs(np.log(populations[3] / REFERENCE[3])) < 0.5, populations
    record = json.loads((run / "provenance.json").read_text())
    assert record["ended_by"].startswith("converged: "), record["ended_by"]
    assert record["energy_evaluations"] < 1e7

"""Quantum chemistry as the all-atom energy: n-butane with GFN2-xTB through openmm-ml, from start to end.

    python benchmarks/xtb.py -o runs/xtb [--set SETTING=VALUE ...]

Needs ``pip install openmmml ase tblite``.
"""

import argparse
import sys
from pathlib import Path

from md import exit_code
from openmm import app
from openmmml import MLPotential
from tblite.ase import TBLite

import openmm_cgflow as cgf

_BUTANE = Path(__file__).parents[1] / "systems" / "butane"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="SETTING=VALUE")
    arguments = parser.parse_args()
    pdb = app.PDBFile(str(_BUTANE / "butane.pdb"))
    system = MLPotential("ase").createSystem(pdb.topology, calculator=TBLite(method="GFN2-xTB", verbosity=0))
    molecule = cgf.MolecularSystem.from_openmm(pdb.topology, system, pdb.positions)
    config = cgf.load_config(_BUTANE / "butane.yaml", arguments.set)
    cgf.train(config, arguments.output, molecular_system=molecule)


if __name__ == "__main__":
    sys.exit(exit_code(main))

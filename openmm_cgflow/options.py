"""The words of the command line: every command and its options, parsed and nothing done."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from openmm_cgflow._version import __version__

__all__ = ["command_parser"]


def _duration(text: str) -> float:
    """Seconds of ``90s``, ``30m``, ``11h30m`` or ``2d``."""
    match = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip())
    seconds = 0.0
    if match:
        seconds = float(sum(int(n or 0) * unit for n, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True)))
    if not seconds:
        raise argparse.ArgumentTypeError(f"got '{text}', expected a duration such as 30m, 11h30m or 90s")
    return seconds


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got '{text}', expected a whole number, 0 or more")
    return int(text)


def command_parser(program: str) -> argparse.ArgumentParser:
    """The parser of a command line; its result has the command's name as ``command``, and its options.

    Arguments:
        program: What the program is called in help and errors.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description="Coarse-graining of molecules with normalizing flows, trained on OpenMM forces instead of data.",
        epilog="exit codes: 0 done, 2 an error in the input, 1 anything else",
    )
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for name, (add_options, text) in _COMMANDS.items():
        # Options in full only: the command that continues a run is made from the words of the one that started it.
        command = commands.add_parser(name, help=text, allow_abbrev=name != "train")
        add_options(command)
    return parser


def _init_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("structure", metavar="MOLECULE", help="PDB, mmCIF, inpcrd, rst7, gro or crd file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.yaml")
    energy = parser.add_argument_group("energy function (exactly one of the first three)")
    one = energy.add_mutually_exclusive_group(required=True)
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}  # after one option or after several
    one.add_argument("--forcefield", **several, metavar="XML", help="OpenMM force fields, such as amber14-all.xml")
    one.add_argument("--topology", metavar="FILE", help="Amber prmtop, GROMACS top or CHARMM psf")
    one.add_argument("--system-xml", metavar="FILE", help="serialized openmm.System")
    energy.add_argument("--parameters", **several, metavar="FILE", help="CHARMM parameter files, with a psf")
    energy.add_argument("--implicit-solvent", metavar="MODEL", help="hct, obc1, obc2, gbn or gbn2, with --topology")
    energy.add_argument("--include-dir", metavar="DIR", help="where GROMACS include files live")
    parser.add_argument("--temperature", default="300 K", metavar="T", help="such as '300 K' (default: %(default)s)")
    parser.add_argument(
        "--slow", metavar="SELECTION", help="slow atoms (default: backbone for peptides, heavy otherwise)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE.yaml if it exists")


def _train_options(parser: argparse.ArgumentParser) -> None:
    _add_configuration(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="RUN", help="run directory")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in RUN, or start it if there is none")
    existing.add_argument("--overwrite", action="store_true", help="delete the run in RUN and start anew")
    parser.add_argument(
        "--max-time", type=_duration, metavar="TIME", help="stop with a checkpoint after 30m, 11h30m, 90s, ..."
    )


def _add_configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.yaml")
    parser.add_argument("--seed", type=_count, metavar="N", help="overrides the configuration's seed")
    parser.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="section.key=value",
        help="override settings, such as chains.n_replicas=128 'training.checkpoint_interval=30 s'",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", type=Path, metavar="RUN")


def _add_stage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", type=_count, metavar="K", help="tempering stage, 0 the hottest (default: the last)")


def _sample_options(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("-n", type=_count, default=1000, metavar="N", help="structures (default: %(default)s)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("samples.dcd"),
        metavar="FILE",
        help=".dcd or .xtc; a topology PDB and a COLVAR table go beside it (default: %(default)s)",
    )
    _add_stage(parser)
    parser.add_argument(
        "--seed",
        type=_count,
        metavar="N",
        help="same seed, same frames (default: one whose frames are not those of samples.dcd)",
    )
    parser.add_argument("--n-equilibration", type=_count, metavar="N", help="steps of each structure's own chain")
    parser.add_argument(
        "--acceptance", type=float, metavar="F", help="fraction of draws that become structures; 1 = all"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="trajectory (.dcd, .xtc, .h5, ...), or .npz with P (n, n), the probability of (phi, psi), and centers "
        "(n,) in radians; without it the samples are described alone",
    )
    parser.add_argument(
        "--topology", type=Path, metavar="FILE", help="of the reference trajectory (default: that of the run)"
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="a number for each frame of the reference, text or .npy"
    )
    parser.add_argument(
        "--samples",
        type=Path,
        metavar="FILE",
        help="trajectory written by `sample`, its .colvar beside it (default: RUN/samples.dcd)",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="(default: RUN/evaluation)")
    parser.add_argument(
        "--residue", metavar="NAME", help="the only residue whose (phi, psi) to compare, such as ALA2 (default: all)"
    )
    parser.add_argument("--seed", type=_count, metavar="N", help="of errors and floors (default: the configuration's)")


def _export_options(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument(
        "--format",
        required=True,
        choices=("python-force", "torchscript", "openmmml"),
        help="an openmm.PythonForce as XML; TorchScript, positions in nm -> kJ/mol; a folder for openmm-ml",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--beads", action="store_true", help="for a System of the slow atoms alone (default: of all)")
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="X", help="factor, negative for a bias (default: 1)"
    )
    parser.add_argument(
        "--energy",
        choices=("pmf", "flow", "torsions"),
        help="the fitted free energy, the flow's, or that of the torsions alone (default: pmf where there is one)",
    )
    parser.add_argument(
        "--ceiling", type=float, metavar="X", help="kJ/mol above the minimum where it levels off (default: nowhere)"
    )
    _add_stage(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")


_COMMANDS = {
    "init": (_init_options, "write a commented configuration for a molecule"),
    "check": (_add_configuration, "dry run: load everything, print it, estimate the time of a training"),
    "train": (_train_options, "train a flow and sample it"),
    "sample": (_sample_options, "draw all-atom structures from a trained run"),
    "evaluate": (_evaluate_options, "compare samples with a reference: maps, populations, states"),
    "export": (_export_options, "write the coarse-grained free energy as a force for OpenMM"),
    "info": (_add_run, "tell what a run directory holds"),
}
"""What adds the options of each command, and what the command does."""

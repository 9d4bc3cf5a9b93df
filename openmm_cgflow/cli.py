"""The command ``openmm-cgflow``. It parses, calls the Python interface and prints; heavy imports wait for their use."""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openmm_cgflow._version import __version__
from openmm_cgflow.errors import CGFlowError

if TYPE_CHECKING:
    from openmm_cgflow.config import Config

__all__ = ["main"]

_PROGRAM = "openmm-cgflow"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0 done, 2 an error of the user's, told in one message. Other errors keep their traceback and
        leave the interpreter with 1.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # queueing systems show the output while it grows
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    options.words = words[1:]
    try:
        return options.run(options)
    except CGFlowError as error:
        print(f"{_PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{_PROGRAM}: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _init(options: argparse.Namespace) -> int:
    from openmm_cgflow.runs.start import new_configuration

    names = ("structure", "forcefield", "topology", "parameters", "system_xml", "implicit_solvent", "include_dir")
    molecular_system, partition = new_configuration(
        options.output,
        {name: getattr(options, name) for name in names if getattr(options, name)},
        temperature=options.temperature,
        slow=options.slow,
        overwrite=options.overwrite,
        command=shlex.join([_PROGRAM, "init", *options.words]),
    )
    for note in molecular_system.notes:
        print(f"note: {note}")
    print(partition.describe(molecular_system))
    print(f"wrote {options.output}. Next:\n  {_PROGRAM} check {_quoted(options.output)}")
    print(f"  {_PROGRAM} train {_quoted(options.output)} -o {_quoted(Path('runs') / options.output.stem)}")
    return 0


def _check(options: argparse.Namespace) -> int:
    config = _load(options)
    from openmm_cgflow.files.log import console_logging
    from openmm_cgflow.runs.estimate import dry_run

    with console_logging():
        for line in dry_run(config):
            print(line)
    print(f"ready. Next:\n  {_PROGRAM} train {_configuration(options)} -o {_quoted(Path('runs') / options.file.stem)}")
    return 0


def _train(options: argparse.Namespace) -> int:
    from openmm_cgflow.files.run_directory import RunDirectory

    run = RunDirectory(options.output)
    config = _load(options)
    from openmm_cgflow.runs.train import train

    train(
        config,
        options.output,
        resume=options.resume,
        overwrite=options.overwrite,
        max_time=options.max_time,
        source=_configuration(options),
    )
    if run.read_provenance().get("status") == "stopped":
        words = [word for word in options.words if word not in ("--resume", "--overwrite")]
        print(f"stopped before the end. Continue with:\n  {shlex.join([_PROGRAM, 'train', *words, '--resume'])}")
    else:
        print(f"finished: {run.path}. Next:\n  {_PROGRAM} info {_quoted(run.path)}")
    return 0


def _sample(options: argparse.Namespace) -> int:
    from openmm_cgflow.files.run_directory import RunDirectory
    from openmm_cgflow.files.trajectory import check_trajectory_path

    output: Path = options.output
    RunDirectory.open(options.run_directory)
    check_trajectory_path(output)
    if output.exists() and not options.overwrite:
        raise CGFlowError(f"{output}: exists already; choose another name, or give --overwrite")
    from openmm_cgflow.files.log import console_logging
    from openmm_cgflow.runs.samples import save_samples
    from openmm_cgflow.runs.train import load

    with console_logging():
        model = load(options.run_directory, stage=options.stage)
        print(f"sampling {options.n} structures at {model.temperature:g} K (stage {model.stage})")
        samples = model.sample(
            options.n, seed=options.seed, n_equilibration=options.n_equilibration, acceptance=options.acceptance
        )
        paths = save_samples(model, samples, output, output.with_suffix(".topology.pdb"))
    print(f"wrote {', '.join(map(str, paths))}. The frames are independent: their time is an index")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from openmm_cgflow.files.run_directory import RunDirectory
    from openmm_cgflow.runs.evaluate import evaluate

    run = RunDirectory.open(options.run_directory)
    output = run.evaluation if options.output is None else options.output
    evaluation = evaluate(
        run.path,
        options.reference,
        topology=options.topology,
        weights=options.weights,
        samples=options.samples,
        output=output,
        residue=options.residue,
        seed=options.seed,
    )
    print(f"{evaluation.table()}\n\nwrote {output}: evaluation.json, evaluation.txt and what goes with them")
    return 0


def _export(options: argparse.Namespace) -> int:
    output: Path = options.output
    for_openmmml = options.format == "openmmml"
    how = {"scale": options.scale, "energy": options.energy, "ceiling": options.ceiling}
    if for_openmmml and (options.beads or how != {"scale": 1.0, "energy": None, "ceiling": None}):
        raise CGFlowError(
            "--format openmmml copies the model: give scale, energy and ceiling to MLPotential, beads as a topology"
        )
    if output.exists() and (for_openmmml or not options.overwrite):
        raise CGFlowError(
            f"{output}: exists already; choose another name" + ("" if for_openmmml else ", or give --overwrite")
        )
    from openmm_cgflow.model.force import copy_model, save_force, save_torchscript
    from openmm_cgflow.runs.train import load

    model = load(options.run_directory, stage=options.stage)
    beads = list(range(len(model.partition.slow))) if options.beads else None
    if for_openmmml:
        copy_model(options.run_directory, model.stage, output)
        usage = f"openmmml.MLPotential('cgflow', modelPath='{output}')"
    elif options.format == "python-force":
        save_force(model.create_force(atoms=beads, **how), output)
        usage = f"openmm.XmlSerializer.deserialize(open('{output}').read()); it runs code: read only files you trust"
    else:
        atoms = None if options.beads else model.partition.slow
        save_torchscript(model.energy_of_positions(**how), output, atoms)
        usage = f"torch.jit.load('{output}') or openmmtorch.TorchForce('{output}')"
    print(f"wrote {output}, of {model.temperature:g} K. Use it with:\n  {usage}")
    return 0


def _info(options: argparse.Namespace) -> int:
    from openmm_cgflow.files.run_directory import RunDirectory
    from openmm_cgflow.runs.summary import summarise

    run = RunDirectory.open(options.run_directory)
    print("\n".join(summarise(run)))
    if run.stages():
        print(f"sample it with:\n  {_PROGRAM} sample {_quoted(run.path)} -n 10000 -o samples.dcd")
        if run.samples.exists():
            print(f"compare it with a reference:\n  {_PROGRAM} evaluate {_quoted(run.path)} --reference FILE")
    return 0


def _load(options: argparse.Namespace) -> Config:
    from openmm_cgflow.config import load_config

    seed = [] if options.seed is None else [f"seed={options.seed}"]
    config = load_config(options.file, [*options.settings, *seed])
    if config.system is None:
        raise CGFlowError(f"{options.file}: no section 'system'; `{_PROGRAM} init` writes a file that has all it needs")
    return config


def _configuration(options: argparse.Namespace) -> str:
    """The words of a command that say what is trained."""
    chosen = [] if options.seed is None else ["--seed", str(options.seed)]
    chosen += ["--set", *options.settings] if options.settings else []
    return shlex.join([str(options.file), *chosen])


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Coarse-graining of molecules with normalizing flows, trained on OpenMM forces instead of data.",
        epilog="exit codes: 0 done, 2 an error in the input, 1 anything else",
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_init(commands)
    _add_check(commands)
    _add_train(commands)
    _add_sample(commands)
    _add_evaluate(commands)
    _add_export(commands)
    _add_info(commands)
    return parser


def _add_init(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("init", help="write a commented configuration for a molecule")
    parser.set_defaults(run=_init)
    parser.add_argument("structure", metavar="MOLECULE", help="PDB, mmCIF, inpcrd, rst7, gro or crd file")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.yaml")
    energy = parser.add_argument_group("energy function (exactly one of the first three)")
    one = energy.add_mutually_exclusive_group(required=True)
    several = {"nargs": "+", "action": "extend"}  # after one option or after several
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


def _add_check(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("check", help="dry run: load everything, print it, estimate the time of a training")
    parser.set_defaults(run=_check)
    _add_settings(parser)


def _add_train(commands: argparse._SubParsersAction) -> None:
    # Options in full only: the command that continues a run is made from the words of the one that started it.
    parser = commands.add_parser("train", allow_abbrev=False, help="train a flow and sample it")
    parser.set_defaults(run=_train)
    _add_settings(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="RUN", help="run directory")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in RUN, or start it if there is none")
    existing.add_argument("--overwrite", action="store_true", help="delete the run in RUN and start anew")
    parser.add_argument(
        "--max-time", type=_duration, metavar="TIME", help="stop with a checkpoint after 30m, 11h30m, 90s, ..."
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
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


def _add_sample(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("sample", help="draw all-atom structures from a trained run")
    parser.set_defaults(run=_sample)
    parser.add_argument("run_directory", type=Path, metavar="RUN")
    parser.add_argument("-n", type=_count, default=1000, metavar="N", help="structures (default: %(default)s)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("samples.dcd"),
        metavar="FILE",
        help=".dcd or .xtc; a topology PDB and a COLVAR table go beside it (default: %(default)s)",
    )
    parser.add_argument("--stage", type=_count, metavar="K", help="tempering stage, 0 the hottest (default: the last)")
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


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("evaluate", help="compare samples with a reference: maps, populations, states")
    parser.set_defaults(run=_evaluate)
    parser.add_argument("run_directory", type=Path, metavar="RUN")
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


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("export", help="write the coarse-grained free energy as a force for OpenMM")
    parser.set_defaults(run=_export)
    parser.add_argument("run_directory", type=Path, metavar="RUN")
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
    parser.add_argument("--stage", type=_count, metavar="K", help="tempering stage, 0 the hottest (default: the last)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")


def _add_info(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("info", help="tell what a run directory holds")
    parser.set_defaults(run=_info)
    parser.add_argument("run_directory", type=Path, metavar="RUN")

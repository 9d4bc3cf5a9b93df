"""The command ``openmm-cgflow``. It parses, calls the Python interface and prints; heavy imports wait for their use."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.options import command_parser

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
    options = command_parser(_PROGRAM).parse_args(words)
    options.words = words[1:]
    try:
        return _RUN[options.command](options)
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
    from openmm_cgflow.runs.export import save_samples
    from openmm_cgflow.runs.load import load

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
    print(f"{evaluation.table()}\n\nwrote {output}, with evaluation.json and evaluation.txt")
    return 0


def _export(options: argparse.Namespace) -> int:
    from openmm_cgflow.runs.export import export

    model, usage = export(
        options.run_directory,
        options.output,
        options.format,
        stage=options.stage,
        beads=options.beads,
        scale=options.scale,
        energy=options.energy,
        ceiling=options.ceiling,
        overwrite=options.overwrite,
    )
    print(f"wrote {options.output}, of {model.temperature:g} K. Use it with:\n  {usage}")
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


_RUN = {
    "init": _init,
    "check": _check,
    "train": _train,
    "sample": _sample,
    "evaluate": _evaluate,
    "export": _export,
    "info": _info,
}

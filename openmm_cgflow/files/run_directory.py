"""The run directory: where everything about one training is kept, and how it is protected.

No torch and no OpenMM: what is saved as tensors passes through a callable of the caller.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import yaml

from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.files.atomic import atomic_path, atomic_write, writing
from openmm_cgflow.files.log import file_logging, versions

__all__ = ["RunDirectory", "config_differences", "load_checked"]

_MARK = "# A run directory of openmm_cgflow.\n"

_logger = logging.getLogger("openmm_cgflow")
_T = TypeVar("_T")


class RunDirectory:
    """The files of a run, and the ways to write them. Nothing is created here but by :meth:`create`.

    Attributes:
        path: The directory.
        config: The resolved configuration.
        log: Everything that was logged.
        metrics: One row for each step of training, CSV.
        topology: All atoms, as the trajectories have them, PDB.
        system_xml: The serialized OpenMM System.
        slow_atoms: The resolved partition, JSON.
        checkpoints: Folder of the last two states of the training.
        models: Folder with one model for each tempering stage.
        samples: The frames that end a training, DCD.
        colvar: One row for each frame of ``samples``.
        verification: Free energies of conformations by switching beside the PMF's, JSON.
        plots: Folder of PNG files.
        evaluation: Folder that ``openmm-cgflow evaluate`` writes to.
        provenance: Versions, machine, seed and cost, JSON.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.log = self.path / "run.log"
        self.metrics = self.path / "metrics.csv"
        self.topology = self.path / "topology.pdb"
        self.system_xml = self.path / "system.xml"
        self.slow_atoms = self.path / "slow_atoms.json"
        self.checkpoints = self.path / "checkpoints"
        self.models = self.path / "models"
        self.samples = self.path / "samples.dcd"
        self.colvar = self.path / "samples.colvar"
        self.verification = self.path / "verification.json"
        self.plots = self.path / "plots"
        self.evaluation = self.path / "evaluation"
        self.provenance = self.path / "provenance.json"

    @classmethod
    def create(
        cls,
        path: str | Path,
        resolved: str,
        *,
        resume: bool = False,
        overwrite: bool = False,
        source: str = "FILE.yaml",
        free: Iterable[str] = (),
    ) -> RunDirectory:
        """Makes a new run directory, or opens one to be continued.

        Arguments:
            path: The directory; an absent or empty one is always accepted.
            resolved: The resolved configuration as YAML text, written to ``config.yaml``.
            resume: Continue the run that is there, if there is one.
            overwrite: Delete the run that is there. Files that no run writes are kept.
            source: The configuration file, for the commands in the message of a refusal.
            free: Settings and sections that may differ where a run is continued.

        Raises:
            CGFlowError: If the directory is in use and neither flag is given, is not a run directory, holds a run of
                another configuration, or cannot be written.
        """
        run = cls(path)
        run.check_free(resume=resume, overwrite=overwrite, source=source)
        if overwrite:
            run._clear()
        elif run.config.exists():
            differences = config_differences(run.config.read_text(), resolved, free)
            if differences:
                raise CGFlowError(
                    "\n  ".join([f"{run.path}: was started with another configuration (was -> is now):", *differences])
                    + "\nResume with the original settings, or start a new run in another directory"
                )
        for folder in (run.path, run.checkpoints, run.models, run.plots):
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
        atomic_write(run.config, _MARK + resolved)
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """An existing run directory, to read.

        Raises:
            CGFlowError: If there is none.
        """
        run = cls(path)
        if not run.path.is_dir():
            raise CGFlowError(f"{run.path}: no such run directory")
        if not run._is_run():
            raise CGFlowError(f"{run.path}: not a run directory of openmm-cgflow (its config.yaml is missing)")
        return run

    def check_free(self, *, resume: bool = False, overwrite: bool = False, source: str = "FILE.yaml") -> None:
        """Refuses a directory that a training may not write to; see :meth:`create`."""
        if resume and overwrite:
            raise CGFlowError("give either resume or overwrite, not both")
        if self.path.exists() and not self.path.is_dir():
            raise CGFlowError(f"{self.path}: is a file, expected a directory")
        with writing(self.path):
            if not self.path.is_dir() or not any(self.path.iterdir()):
                return
        if not self._is_run():
            raise CGFlowError(
                f"{self.path}: is not empty and not a run directory, so nothing in it is touched; choose another one"
            )
        if not (resume or overwrite):
            command = f"openmm-cgflow train {source} -o {self.path}"
            raise CGFlowError(
                f"{self.path}: already holds a run\n  to continue it:             {command} --resume\n"
                f"  to delete it and start anew: {command} --overwrite"
            )

    def logging(self, *, console: bool = True) -> AbstractContextManager[None]:
        """Sends the logger ``openmm_cgflow`` to ``run.log``, and to standard error if ``console``."""
        return file_logging(self.log, console=console)

    def save_checkpoint(self, save: Callable[[Path], None]) -> None:
        """Keeps a new state as ``last.pt`` and the one before it as ``previous.pt``.

        Arguments:
            save: Writes the state to the path it is given, as ``torch.save`` does.
        """
        last = self.checkpoints / "last.pt"
        with atomic_path(last) as temporary:
            save(temporary)
            if last.exists():
                os.replace(last, self.checkpoints / "previous.pt")

    def load_checkpoint(self, load: Callable[[Path], _T]) -> _T | None:
        """The newest readable state, or None where no checkpoint was written yet.

        Arguments:
            load: Reads the state from a path, as ``torch.load(weights_only=True)`` does; a ``CGFlowError`` of its own
                is passed on.

        Raises:
            CGFlowError: If there are checkpoints but none can be read.
        """
        problems = []
        for name in ("last.pt", "previous.pt"):
            path = self.checkpoints / name
            if not path.exists():
                continue
            try:
                state = load_checked(path, load)
            except CGFlowError:
                raise
            except Exception as error:  # a damaged file can make the unpickler raise anything
                problems.append(f"{path}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
                _logger.warning("checkpoint is damaged and skipped: %s", problems[-1])
                continue
            _logger.info("continuing from %s", path)
            return state
        if problems:
            raise CGFlowError(
                "\n  ".join(["no checkpoint can be read:", *problems])
                + "\nStart this run anew with --overwrite; the models of finished stages can still be sampled"
            )
        return None

    def write_provenance(self, record: Mapping[str, Any]) -> None:
        """Writes ``provenance.json``: versions, machine, command, and what the caller knows.

        Arguments:
            record: For JSON. Its ``started`` tells processes apart: when it differs from the file's, the file's record
                moves to ``earlier_sessions``.
        """
        earlier: list[dict[str, Any]] = []
        if self.provenance.exists():
            old = self.read_provenance()
            earlier = old.pop("earlier_sessions", [])
            if old.get("started") != record.get("started"):
                earlier.append(old)
        known = {"versions": versions(), "machine": platform.platform(), "command": sys.argv}
        text = json.dumps({**known, **record, "earlier_sessions": earlier}, indent=2)
        atomic_write(self.provenance, text + "\n")

    def read_slow_atoms(self) -> list[int]:
        """The slow atoms that the training wrote down, 0-based indices.

        Raises:
            CGFlowError: If ``slow_atoms.json`` is missing or damaged.
        """
        try:
            return [int(i) for i in json.loads(self.slow_atoms.read_text())["slow"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CGFlowError(
                f"{self.slow_atoms}: cannot be read, restore it: {type(error).__name__}: {error}"
            ) from error

    def stage(self, number: int) -> Path:
        """The model of a stage, finished or not."""
        return self.models / f"stage_{number:02d}.pt"

    def stages(self) -> dict[int, Path]:
        """The models of the stages that are finished, in their order."""
        names = ((re.fullmatch(r"stage_(\d+)", path.stem), path) for path in self.models.glob("stage_*.pt"))
        return dict(sorted((int(match[1]), path) for match, path in names if match))

    def read_provenance(self) -> dict[str, Any]:
        """What :meth:`write_provenance` wrote, or an empty dictionary."""
        if not self.provenance.exists():
            return {}
        try:
            return json.loads(self.provenance.read_text())
        except ValueError as error:
            raise CGFlowError(f"{self.provenance}: not valid JSON ({error}); mend or delete it") from error

    def _is_run(self) -> bool:
        try:
            with self.config.open() as file:
                return file.readline() == _MARK
        except (OSError, UnicodeDecodeError):
            return False

    def _clear(self) -> None:
        files = (self.log, self.metrics, self.topology, self.system_xml, self.slow_atoms, self.samples, self.colvar)
        with writing(self.path):
            for folder in (self.checkpoints, self.models, self.plots, self.evaluation):
                if folder.is_dir():
                    shutil.rmtree(folder)
            # The configuration last: until then the directory can still be recognised.
            for file in (*files, self.verification, self.provenance, self.config):
                file.unlink(missing_ok=True)


def config_differences(old: str, new: str, free: Iterable[str] = ()) -> list[str]:
    """Settings that differ between two resolved configurations, one line each, ``key: old -> new``.

    Arguments:
        old: YAML text.
        new: YAML text.
        free: Names of settings and sections to leave out.
    """
    before, after = _flat(yaml.safe_load(old)), _flat(yaml.safe_load(new))
    names = [name for name in {**before, **after} if before.get(name, "unset") != after.get(name, "unset")]
    passed_over = tuple(f"{name}." for name in free)
    return [
        f"{name}: {before.get(name, 'unset')} -> {after.get(name, 'unset')}"
        for name in names
        if not f"{name}.".startswith(passed_over)
    ]


def load_checked(path: Path, load: Callable[[Path], _T]) -> _T:
    """``load(path)`` of what ``torch.save`` wrote, once the checksums hold, which ``torch.load`` does not compare.

    Raises:
        zipfile.BadZipFile: If a checksum is wrong. Damage can also make ``load`` raise anything.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"bad checksum in {damaged}")
    return load(path)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    return {name: value for key, child in tree.items() for name, value in _flat(child, f"{prefix}{key}.").items()}

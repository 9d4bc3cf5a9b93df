"""Data-free coarse-graining: normalizing flows trained on OpenMM forces."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from openmm_cgflow._version import __version__

if TYPE_CHECKING:
    from openmm_cgflow.config import Config, load_config
    from openmm_cgflow.errors import CGFlowError, ReplicaError
    from openmm_cgflow.model.cg_model import CGModel
    from openmm_cgflow.model.sampling import Samples
    from openmm_cgflow.molecule.partition import Partition
    from openmm_cgflow.molecule.system import MolecularSystem
    from openmm_cgflow.runs.evaluate import Evaluation, evaluate
    from openmm_cgflow.runs.load import load
    from openmm_cgflow.runs.train import train

# Imported on first use: worker processes and `--help` need neither torch nor a Context.
_HOME = {
    "CGFlowError": "errors",
    "CGModel": "model.cg_model",
    "Config": "config",
    "Evaluation": "runs.evaluate",
    "MolecularSystem": "molecule.system",
    "Partition": "molecule.partition",
    "ReplicaError": "errors",
    "Samples": "model.sampling",
    "evaluate": "runs.evaluate",
    "evaluate_exactly": "runs.exact",
    "load": "runs.load",
    "load_config": "config",
    "train": "runs.train",
}

__all__ = [
    "CGFlowError",
    "CGModel",
    "Config",
    "Evaluation",
    "MolecularSystem",
    "Partition",
    "ReplicaError",
    "Samples",
    "__version__",
    "evaluate",
    "evaluate_exactly",
    "load",
    "load_config",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

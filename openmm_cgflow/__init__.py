"""Data-free coarse-graining: normalizing flows trained on OpenMM forces."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openmm_cgflow.config import Config, load_config
    from openmm_cgflow.errors import CGFlowError, ReplicaError
    from openmm_cgflow.evaluation import Evaluation, evaluate
    from openmm_cgflow.model import CGModel
    from openmm_cgflow.partition import Partition
    from openmm_cgflow.runner import load, train
    from openmm_cgflow.sampling import Samples
    from openmm_cgflow.system import MolecularSystem

__version__ = "0.1.0"

# Imported on first use: worker processes and `--help` need neither torch nor a Context.
_HOME = {
    "CGFlowError": "errors",
    "CGModel": "model",
    "Config": "config",
    "Evaluation": "evaluation",
    "MolecularSystem": "system",
    "Partition": "partition",
    "ReplicaError": "errors",
    "Samples": "sampling",
    "evaluate": "evaluation",
    "evaluate_exactly": "exact",
    "load": "runner",
    "load_config": "config",
    "train": "runner",
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

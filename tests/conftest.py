import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

# Set before torch and OpenMM are imported: bitwise tests need one thread, and machines that run tests are shared.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENMM_CPU_THREADS"):
    os.environ.setdefault(_name, "1")

_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root():
    """The source tree."""
    return _ROOT


@pytest.fixture(scope="session")
def systems():
    """The example systems."""
    return _ROOT / "systems"


@pytest.fixture(scope="module")
def few_tests():
    """Small batches of test samples and short blocks of updates: most of the time would go there."""
    from openmm_cgflow import pmf_training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pmf_training, "_N_TEST", 512)
        patch.setattr(pmf_training, "_POLISH", 5)
        yield


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="no OpenMM platform on a GPU"))
        if item.get_closest_marker("torchforce") and not _has_torchforce():
            item.add_marker(pytest.mark.skip(reason="the extra [torchforce] is not installed or cannot be loaded"))


@cache
def _has_gpu():
    from openmm import Context, OpenMMException, Platform, System, VerletIntegrator

    system = System()
    system.addParticle(1.0)
    for k in range(Platform.getNumPlatforms()):
        platform = Platform.getPlatform(k)
        if platform.getName() in ("CUDA", "HIP", "OpenCL"):
            try:
                Context(system, VerletIntegrator(0.001), platform)
            except OpenMMException:
                continue
            return True
    return False


@cache
def _has_torchforce():
    # In a process of its own: a failed import of the plugin can leave the libraries half loaded.
    command = [sys.executable, "-c", "from openmm_cgflow.torchforce import _openmmtorch; _openmmtorch()"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

# Set before torch and OpenMM are imported: bitwise tests need one thread, and machines that run tests are shared.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENMM_CPU_THREADS"):
    os.environ.setdefault(_name, "1")

from openmm_cgflow.engines.platforms import GPU_PLATFORMS, platform_choice  # noqa: E402

_ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root():
    """The source tree."""
    return _ROOT


@pytest.fixture(scope="session")
def systems():
    """The example systems."""
    return _ROOT / "systems"


@pytest.fixture(params=["Reference", "CPU", pytest.param("a GPU's", marks=pytest.mark.gpu)])
def every_platform(request):
    """Every kind of OpenMM platform, in double precision where it can be chosen."""
    name = request.param
    return platform_choice(name if name in ("Reference", "CPU") else _gpu_platform(), "double")


@pytest.fixture
def gpu_platform():
    """Name of the OpenMM platform of the GPU; for tests marked ``gpu``."""
    return _gpu_platform()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and _gpu_platform() is None:
            item.add_marker(pytest.mark.skip(reason="no OpenMM platform on a GPU"))
        if item.get_closest_marker("torchforce") and not _has_torchforce():
            item.add_marker(pytest.mark.skip(reason="the extra [torchforce] is not installed or cannot be loaded"))


@cache
def _gpu_platform():
    from openmm import Context, OpenMMException, Platform, System, VerletIntegrator

    system = System()
    system.addParticle(1.0)
    for name in GPU_PLATFORMS:
        try:
            Context(system, VerletIntegrator(0.001), Platform.getPlatformByName(name))
        except OpenMMException:
            continue
        return name
    return None


@cache
def _has_torchforce():
    # In a process of its own: a failed import of the plugin can leave the libraries half loaded.
    command = [sys.executable, "-c", "from openmm_cgflow.molecule.torch_force import _openmmtorch; _openmmtorch()"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0

"""The choice of an engine: by setting, platform and energy."""

import numpy as np
import openmm
import pytest
from toys import HarmonicBath, reference_settings

from openmm_cgflow.engines.choose import create_engine
from openmm_cgflow.engines.context import ReplicaContext
from openmm_cgflow.engines.workers import ContextsEngine


def test_engine_follows_the_platform_and_the_setting(bath):
    for engine_name, expected in (("auto", "contexts"), ("contexts", "contexts"), ("lattice", "lattice")):
        with create_engine(bath.toy, bath.slow, reference_settings(engine=engine_name, n_replicas=8)) as engine:
            assert engine.description.startswith(f"{expected} engine") and "Reference" in engine.description
            assert engine.n_at_once == (8 if expected == "lattice" else 1)


def test_probe_chooses_and_says_so(bath, monkeypatch):
    monkeypatch.delenv("OPENMM_DEFAULT_PLATFORM", raising=False)
    with create_engine(bath.toy, bath.slow, reference_settings(platform=None, engine="auto")) as engine:
        assert "timed" in engine.description and "Reference" in engine.description


def test_default_is_one_worker_per_core(bath, monkeypatch):
    monkeypatch.setattr("openmm_cgflow.engines.workers.default_workers", lambda: 3)
    with create_engine(bath.toy, bath.slow, reference_settings(n_workers=0)) as engine:
        assert "3 worker" in engine.description


def test_system_that_cannot_be_copied_falls_back(caplog):
    bath = HarmonicBath()
    force = openmm.CustomExternalForce("x^2")
    force.addParticle(0, [])
    bath.toy.system.addForce(force)
    with create_engine(bath.toy, bath.slow, reference_settings(engine="lattice")) as engine:
        assert isinstance(engine, ContextsEngine)
        assert "CustomExternalForce" in engine.description and "contexts engine" in engine.description
    assert "CustomExternalForce" in caplog.text


# ---------------------------------------------------------------- on GPUs, of which there is none here


@pytest.fixture
def gpu(monkeypatch):
    """OpenMM's CPU platform counts as that of a GPU."""
    monkeypatch.setattr("openmm_cgflow.engines.platforms.GPU_PLATFORMS", ("CPU",))
    return reference_settings(engine="auto", platform="CPU", n_replicas=8)


@pytest.mark.parametrize("fastest", ["Reference", "CPU"])
def test_frames_of_a_gpu_are_evaluated_where_that_is_fastest(gpu, fastest, monkeypatch):
    def seconds(chain, _):
        return 1e-6 if chain._context.getPlatform().getName() == fastest else 1e-3

    monkeypatch.setattr(ReplicaContext, "seconds_per_evaluation", seconds)
    bath = HarmonicBath()
    with create_engine(bath.toy, bath.slow, gpu) as engine:
        assert engine.description.startswith("lattice engine, 8 replicas at once, platform CPU")
        assert f"frames evaluated by: contexts engine, 1 worker(s), platform {fastest}" in engine.description
        assert "µs per evaluation" in engine.description


@pytest.mark.parametrize(("initialised", "n_workers"), [(True, 1), (False, 3)])
def test_one_process_holds_the_network_on_a_gpu(initialised, n_workers, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: initialised)
    monkeypatch.setattr("openmm_cgflow.engines.workers.default_workers", lambda: 3)
    toy = HarmonicBath().toy
    toy.system.addForce(openmm.PythonForce(_nothing))
    with create_engine(toy, (0, 1), reference_settings(platform="Reference", n_workers=0)) as engine:
        assert f"contexts engine, {n_workers} worker(s)" in engine.description


def _nothing(state):
    return 0.0, np.zeros(state.getPositions(asNumpy=True).shape)

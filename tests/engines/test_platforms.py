"""Platform choice: setting, environment, probe; and the messages when it fails."""

import re

import openmm
import pytest

from openmm_cgflow.engines.platforms import available_platforms, choose_platform, keep_platform, platform_choice
from openmm_cgflow.errors import CGFlowError

SPEEDS = {"Reference": 2e-5, "CPU": 1e-4, "CUDA": 1e-3, "OpenCL": 1e-3, "HIP": 1e-3}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("OPENMM_DEFAULT_PLATFORM", raising=False)


def probe(choice):
    return SPEEDS[choice.name]


def no_probe(choice):
    raise AssertionError("nothing is to be timed")


def test_setting_wins_over_environment_and_probe(monkeypatch):
    monkeypatch.setenv("OPENMM_DEFAULT_PLATFORM", "Reference")
    choice = choose_platform("CPU", "mixed", no_probe)
    assert choice.name == "CPU" and "chains.platform" in choice.reason


def test_environment_wins_over_probe(monkeypatch):
    monkeypatch.setenv("OPENMM_DEFAULT_PLATFORM", "CPU")
    choice = choose_platform(None, "mixed", no_probe)
    assert choice.name == "CPU" and "OPENMM_DEFAULT_PLATFORM" in choice.reason


@pytest.mark.parametrize("fastest", ["Reference", "CPU"])
def test_probe_takes_the_fastest(monkeypatch, fastest):
    monkeypatch.setitem(SPEEDS, fastest, 1e-6)
    choice = choose_platform(None, "mixed", probe)
    assert choice.name == fastest
    assert "Reference" in choice.reason and "CPU" in choice.reason


def test_probe_is_not_swayed_by_noise(monkeypatch):
    monkeypatch.setitem(SPEEDS, "CPU", 0.9 * SPEEDS["Reference"])
    assert choose_platform(None, "mixed", probe).name == "Reference"


def test_probe_passes_over_what_does_not_work(caplog):
    def broken_reference(choice):
        if choice.name == "Reference":
            raise openmm.OpenMMException("no device")
        return probe(choice)

    assert choose_platform(None, "mixed", broken_reference).name == "CPU"
    assert "Reference" in caplog.text and "no device" in caplog.text


def test_name_in_another_case_is_understood():
    assert choose_platform("reference", "mixed", no_probe).name == "Reference"


def test_precision_only_where_it_exists():
    assert platform_choice("Reference", "double").properties == {}
    assert "Precision" not in platform_choice("CPU", "double").properties
    assert platform_choice("CPU").properties["Threads"] == "1"


def test_properties_are_accepted_by_openmm():
    system = openmm.System()
    system.addParticle(1.0)
    for name in ("Reference", "CPU"):
        context = platform_choice(name, "single").context(system, openmm.VerletIntegrator(0.001))
        assert context.getPlatform().getName() == name


def test_absent_cuda_is_explained(monkeypatch):
    monkeypatch.setattr("openmm_cgflow.engines.platforms.available_platforms", lambda: ["Reference", "CPU"])
    failure = "Error loading library /x/libOpenMMCUDA.so: libcuda.so.1: cannot open shared object file"
    other = "Error loading library /x/libOpenMMOpenCL.so: libOpenCL.so.1: cannot open shared object file"
    monkeypatch.setattr(openmm.Platform, "getPluginLoadFailures", staticmethod(lambda: (other, failure)))
    with pytest.raises(CGFlowError) as caught:
        choose_platform("CUDA", "mixed", no_probe)
    message = str(caught.value)
    assert failure in message and other not in message
    assert "Reference, CPU" in message and "[cuda12]" in message and "[cuda13]" in message

    monkeypatch.setattr(openmm.Platform, "getPluginLoadFailures", staticmethod(lambda: ()))
    with pytest.raises(CGFlowError, match="No CUDA plugin is installed"):
        choose_platform("cuda", "mixed", no_probe)


def test_unloadable_gpu_plugin_is_logged(monkeypatch, caplog):
    failure = "Error loading library /x/libOpenMMCUDA.so: libcuda.so.1: cannot open shared object file"
    monkeypatch.setattr(openmm.Platform, "getPluginLoadFailures", staticmethod(lambda: (failure,)))
    choose_platform(None, "mixed", probe)
    assert failure in caplog.text


@pytest.mark.parametrize(("name", "near"), [("refrence", "'Reference'"), ("CUDDA", "'CUDA'")])
def test_nonsense_names_get_near_ones(name, near):
    with pytest.raises(CGFlowError, match=f"no platform '{name}'.*Did you mean.*{near}"):
        choose_platform(name, "mixed", no_probe)


def test_nonsense_in_the_environment_names_the_variable(monkeypatch):
    monkeypatch.setenv("OPENMM_DEFAULT_PLATFORM", "xyzzy")
    with pytest.raises(CGFlowError, match=re.escape("OPENMM_DEFAULT_PLATFORM: OpenMM has no platform 'xyzzy'")):
        choose_platform(None, "mixed", no_probe)


def test_registered_platform_that_does_not_work(monkeypatch):
    def fail(*_):
        raise openmm.OpenMMException("No compatible device")

    monkeypatch.setattr("openmm_cgflow.engines.platforms.PlatformChoice.context", fail)
    with pytest.raises(CGFlowError, match=r"cannot be used on this machine: No compatible device"):
        choose_platform("CPU", "mixed", no_probe)


def test_a_run_stays_on_its_platform(monkeypatch, caplog):
    assert keep_platform(None, "CPU") == "CPU"
    assert keep_platform("Reference", "CPU") == "Reference"  # the user's wish
    assert not caplog.text
    assert keep_platform(None, "Abacus") is None
    assert "platform Abacus, which is not here" in caplog.text

    def fail(*_):
        raise openmm.OpenMMException("No compatible device")

    monkeypatch.setattr("openmm_cgflow.engines.platforms.PlatformChoice.context", fail)
    assert keep_platform(None, "CPU") is None  # so that another one can be chosen
    assert "platform CPU, which is installed but cannot be used on this machine: No compatible device" in caplog.text


def test_registered_platforms_are_listed():
    assert {"Reference", "CPU"} <= set(available_platforms())

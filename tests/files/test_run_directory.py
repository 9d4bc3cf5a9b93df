import json
import logging
import zipfile

import pytest

from openmm_cgflow.config import free_settings
from openmm_cgflow.errors import CGFlowError
from openmm_cgflow.files.atomic import atomic_path, atomic_write
from openmm_cgflow.files.log import append_row
from openmm_cgflow.files.run_directory import RunDirectory, config_differences

_CONFIG = "temperature: 300.0\nflow:\n  n_layers: 6\nsamples:\n  n_samples: 10\n"


def _save(text):
    def save(path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("state", text)

    return save


def _load(path):
    with zipfile.ZipFile(path) as archive:
        return archive.read("state").decode()


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "run", _CONFIG)


def test_create(run):
    assert run.config.read_text().endswith(_CONFIG)
    assert RunDirectory.open(run.path).path == run.path
    assert all(folder.is_dir() for folder in (run.checkpoints, run.models, run.plots))


def test_a_run_in_use_is_refused_with_both_commands(run):
    with pytest.raises(CGFlowError) as error:
        RunDirectory.create(run.path, _CONFIG, source="my.yaml")
    assert f"openmm-cgflow train my.yaml -o {run.path} --resume" in str(error.value)
    assert f"openmm-cgflow train my.yaml -o {run.path} --overwrite" in str(error.value)


def test_an_empty_directory_is_accepted(tmp_path):
    RunDirectory.create(tmp_path, _CONFIG)


def test_resuming_nothing_starts(tmp_path):
    run = RunDirectory.create(tmp_path / "new", _CONFIG, resume=True)
    assert run.load_checkpoint(_load) is None


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_foreign_directories_are_left_alone(tmp_path, flags):
    precious = tmp_path / "thesis.tex"
    precious.write_text("words")
    (tmp_path / "config.yaml").write_text("of: something else\n")
    with pytest.raises(CGFlowError, match="not a run directory"):
        RunDirectory.create(tmp_path, _CONFIG, **flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "thesis.tex"]


def test_overwrite_deletes_the_run_and_nothing_else(run):
    append_row(run.metrics, {"step": 1})
    run.save_checkpoint(_save("old"))
    run.samples.touch()
    precious = run.path / "notes.txt"
    precious.write_text("mine")
    again = RunDirectory.create(run.path, _CONFIG.replace("300", "310"), overwrite=True)
    assert precious.read_text() == "mine"
    assert not again.metrics.exists()
    assert not again.samples.exists()
    assert again.load_checkpoint(_load) is None
    assert "310" in again.config.read_text()


def test_resume_with_another_configuration_shows_what_differs(run):
    other = _CONFIG.replace("n_layers: 6", "n_layers: 8").replace("n_samples: 10", "n_samples: 99")
    with pytest.raises(CGFlowError) as error:
        RunDirectory.create(run.path, other, resume=True, free=["samples"])
    assert "flow.n_layers: 6 -> 8" in str(error.value)
    assert "n_samples" not in str(error.value)
    assert "n_layers: 6" in run.config.read_text()


def test_resume_with_other_sampling_is_fine(run):
    RunDirectory.create(run.path, _CONFIG.replace("n_samples: 10", "n_samples: 99"), resume=True, free=["samples"])
    assert "n_samples: 99" in run.config.read_text()


def test_config_differences():
    assert config_differences("a: {b: 1, c: [1, 2]}", "a: {b: 1, c: [1, 3]}") == ["a.c: [1, 2] -> [1, 3]"]
    assert config_differences("a: 1", "b: 2") == ["a: 1 -> unset", "b: unset -> 2"]
    free = free_settings()
    assert config_differences("samples: {a: 1}", "samples: {a: 2}", free) == []
    assert config_differences("chains: {n_workers: 1}", "chains: {n_workers: 2}", free) == []
    assert config_differences("training: {checkpoint_interval: 1}", "training: {n_steps: 1}", free) == [
        "training.n_steps: unset -> 1"
    ]


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    with pytest.raises(CGFlowError, match="not both"):
        RunDirectory.create(tmp_path, _CONFIG, resume=True, overwrite=True)


def test_unwritable(tmp_path):
    blocker = tmp_path / "file"
    blocker.touch()
    with pytest.raises(CGFlowError, match="is a file"):
        RunDirectory.create(blocker, _CONFIG)
    with pytest.raises(CGFlowError, match="cannot write"):
        RunDirectory.create(blocker / "run", _CONFIG)
    with pytest.raises(CGFlowError, match="cannot write"):
        atomic_write(blocker / "a.txt", "text")
    with pytest.raises(CGFlowError, match="cannot write"):
        atomic_write(tmp_path / "no" / "such" / "a.txt", "text")


def test_open_wants_a_run(tmp_path):
    for path, word in ((tmp_path / "none", "no such"), (tmp_path, "not a run directory")):
        with pytest.raises(CGFlowError, match=word):
            RunDirectory.open(path)


def test_atomic_path_keeps_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "a.dcd"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        assert temporary.suffix == ".dcd"
        temporary.write_text("half")
        raise RuntimeError
    assert [file.name for file in tmp_path.iterdir()] == ["a.dcd"]
    assert path.read_text() == "old"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["a.dcd"]
    assert path.read_text() == "new"


def test_checkpoints_roll(run):
    for text in ("1", "2", "3"):
        run.save_checkpoint(_save(text))
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["last.pt", "previous.pt"]
    assert run.load_checkpoint(_load) == "3"
    assert _load(run.checkpoints / "previous.pt") == "2"


def test_a_failed_save_keeps_both_checkpoints(run):
    def fail(path):
        path.write_text("half")
        raise RuntimeError("disk")

    run.save_checkpoint(_save("1"))
    run.save_checkpoint(_save("2"))
    with pytest.raises(RuntimeError):
        run.save_checkpoint(fail)
    assert run.load_checkpoint(_load) == "2"
    assert _load(run.checkpoints / "previous.pt") == "1"


def _cut(path):
    path.write_bytes(path.read_bytes()[:20])


def _flip(path):
    # The loader of this test, like torch's, would not notice: only the checksum does.
    path.write_bytes(path.read_bytes().replace(b"good", b"evil"))


def _delete(path):
    path.unlink()


@pytest.mark.parametrize("damage", [_cut, _flip, _delete])
def test_a_damaged_checkpoint_falls_back_to_the_previous(run, caplog, damage):
    run.save_checkpoint(_save("good 1"))
    run.save_checkpoint(_save("good 2"))
    damage(run.checkpoints / "last.pt")
    with caplog.at_level(logging.INFO, logger="openmm_cgflow"):
        assert run.load_checkpoint(_load) == "good 1"
    assert "previous.pt" in caplog.text
    assert ("last.pt" in caplog.text) == (damage is not _delete)


def test_no_readable_checkpoint(run):
    run.save_checkpoint(_save("good 1"))
    run.save_checkpoint(_save("good 2"))
    for path in run.checkpoints.iterdir():
        _cut(path)
    with pytest.raises(CGFlowError, match="no checkpoint can be read") as error:
        run.load_checkpoint(_load)
    assert "last.pt" in str(error.value)
    assert "previous.pt" in str(error.value)


def test_a_refusal_of_the_loader_is_not_damage(run):
    def refuse(path):
        raise CGFlowError("belongs to another molecule")

    run.save_checkpoint(_save("1"))
    run.save_checkpoint(_save("2"))
    with pytest.raises(CGFlowError, match="another molecule"):
        run.load_checkpoint(refuse)


def test_provenance_keeps_earlier_sessions(run):
    run.write_provenance({"started": "a", "status": "running"})
    run.write_provenance({"started": "a", "status": "stopped"})
    run.write_provenance({"started": "b", "status": "finished"})
    record = json.loads(run.provenance.read_text())
    assert record["status"] == "finished"
    assert [(old["started"], old["status"]) for old in record["earlier_sessions"]] == [("a", "stopped")]
    assert {"python", "openmm", "torch", "zuko", "mdtraj", "numpy", "openmm_cgflow"} <= set(record["versions"])
    run.provenance.write_text("{")
    with pytest.raises(CGFlowError, match="not valid JSON"):
        run.read_provenance()


def test_logging_goes_to_file_and_console_and_ends(run, capsys):
    logger = logging.getLogger("openmm_cgflow")
    before = list(logger.handlers), logger.level
    with run.logging():
        logging.getLogger("openmm_cgflow.training.reverse_kl").info("step %d", 7)
        logger.warning("odd")
    logger.info("after")
    with run.logging(console=False):
        logger.info("quiet")
    text = run.log.read_text()
    assert "openmm " in text
    assert "step 7" in text
    assert "quiet" in text
    assert "after" not in text
    console = capsys.readouterr().err
    assert "step 7\n" in console
    assert "warning: odd\n" in console
    assert "quiet" not in console
    assert (list(logger.handlers), logger.level) == before

"""--tracker: what the packages get, that a run goes on under its name, and that no fault of theirs stops a training."""

import json
import sqlite3
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from tests.conftest import SMALL, rows, same_weights
from utils import tracker
from utils.distributed import Process
from utils.logger import RunLog

TRAIN, TEST = {"loss": 1.0, "acc1": 50.0, "skips": 0}, {"loss": 2.0, "acc1": 25.0, "correct": 1, "count": 4}
FACTS = {"data": {"name": "dvs128"}}


@pytest.fixture
def package(monkeypatch):
    """A package in the place of wandb and trackio: its calls, and the name of the one that fails."""
    calls, fails = [], []

    def call(name):
        def called(*arguments, **keywords):
            calls.append((name, arguments, keywords))
            if name in fails:
                raise RuntimeError("no network\nat all")

        return called

    fake = ModuleType("fake")
    fake.__spec__ = ModuleSpec("fake", None)  # it is found
    for name in ("init", "log", "finish"):
        setattr(fake, name, call(name))
    for name in tracker.TRACKERS:
        monkeypatch.setitem(sys.modules, name, fake)
        monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    return calls, fails


@pytest.mark.parametrize("name", tracker.TRACKERS)
def test_a_tracker_gets_what_tensorboard_gets_and_the_training_stays_the_same(
    name, package, script, gesture_data, tmp_path, monkeypatch
):
    calls, _ = package
    tags = []
    monkeypatch.setattr(
        "torch.utils.tensorboard.SummaryWriter.add_scalar", lambda _, tag, value, step: tags.append((tag, value, step))
    )
    command = ["dvs128", *SMALL, "--data-dir", gesture_data, "--epochs", 1]
    run = tmp_path / "my run"
    assert script(*command, "--output-dir", run, "--tracker", name)[0] == 0
    (_, _, begun), (_, (values,), step), (_, _, _) = calls
    assert [call[0] for call in calls] == ["init", "log", "finish"]
    assert [(tag, value, step["step"]) for tag, value in values.items()] == tags
    assert list(values)[:4] == ["accuracy/test", "loss/test", "accuracy/train", "loss/train"] and step == {"step": 1}
    assert (begun["project"], begun["resume"], begun["config"]["args"]["epochs"]) == ("sma_dvs128", "allow", 1)
    assert json.loads(json.dumps(begun["config"])) == begun["config"]  # plain values
    assert begun["name"].startswith("my_run-") and begun.get("id") == (begun["name"] if name == "wandb" else None)

    del calls[:]
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "mine")
    assert script(*command, "--output-dir", run, "--tracker", name)[0] == 0  # it is finished: nothing is logged
    again = calls[0][2]
    assert (again["name"], again["project"]) == (begun["name"], "mine") and [c[0] for c in calls] == ["init", "finish"]

    assert script(*command, "--output-dir", tmp_path / "without")[0] == 0
    assert rows(run) == rows(tmp_path / "without") and not (tmp_path / "without/tracker.txt").exists()
    assert same_weights(run / "last.pt", tmp_path / "without/last.pt")


@pytest.mark.parametrize("which", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning(which, package, tmp_path, capsys):
    calls, fails = package
    fails.append(which)
    log = RunLog(tmp_path, Process(0, 0, 1, torch.device("cpu")), tmp_path, tracker="wandb")
    log.open({}, FACTS, 0)
    for epoch in (1, 2):
        log.epoch(epoch, TRAIN, TEST, 0.1, 1.0)
    log.close()
    err = capsys.readouterr().err
    assert err == "--tracker wandb failed (no network at all); the run goes on without it\n"
    expected = {"init": ["init"], "log": ["init", "log"], "finish": ["init", "log", "log", "finish"]}
    assert [call[0] for call in calls] == expected[which] and len(rows(tmp_path)) == 2


def test_only_the_first_process_writes_to_a_tracker(package, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.distributed.gather", lambda own: [own, own])
    log = RunLog(tmp_path, Process(1, 1, 2, torch.device("cpu")), tmp_path, tracker="wandb")
    log.open({}, FACTS, 0)
    log.epoch(1, TRAIN, TEST, 0.1, 1.0)
    log.close()
    assert package[0] == [] and not list(tmp_path.iterdir())


def test_a_package_that_is_missing_is_named(script, gesture_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    command = ["dvs128", *SMALL, "--data-dir", gesture_data, "--output-dir", tmp_path / "run", "--tracker", "trackio"]
    code, _, err = script(*command)
    assert code == 2 and err.endswith("error: --tracker trackio needs the package trackio: pip install trackio, or "
                                      "leave --tracker out\n")  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", tracker.TRACKERS)
def test_the_real_package_keeps_an_offline_run(name, tmp_path, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    if name == "trackio":
        from trackio import sqlite_storage

        monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    for epochs_done in (0, 1):
        log = RunLog(tmp_path, Process(0, 0, 1, torch.device("cpu")), tmp_path, tracker=name)
        log.open({}, FACTS, epochs_done)
        log.epoch(epochs_done + 1, TRAIN, TEST, 0.1, 1.0)
        log.close()
    run = (tmp_path / "tracker.txt").read_text().strip()
    if name == "wandb":
        assert list(tmp_path.glob(f"wandb/offline-run-*-{run}/run-{run}.wandb"))
        return
    (database,) = (tmp_path / "trackio").glob("sma_dvs128.db")
    found = sqlite3.connect(database).execute("select run_name, step, metrics from metrics").fetchall()
    assert [(row[0], row[1], json.loads(row[2])["accuracy/test"]) for row in found] == [(run, 1, 25.0), (run, 2, 25.0)]

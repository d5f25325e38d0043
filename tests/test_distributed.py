"""Joining the processes of a run, reproducible arithmetic, and telling a lost process from a mistake."""

import pytest
import torch

from tests.conftest import SMALL, rows
from utils.distributed import start
from utils.errors import ProcessLost, UserError


@pytest.fixture
def joined(monkeypatch):
    """The environment of the second of two processes, without a process group behind it."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("utils.distributed._join", lambda *_: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)


@pytest.mark.parametrize(
    ("error", "is_loss"),
    [
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer"), True),
        (torch.distributed.DistBackendError("NCCL watchdog timed out"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (UserError("--lr"), False),
    ],
)
def test_a_failed_exchange_is_a_lost_process_and_nothing_else_is(error, is_loss, joined):
    with pytest.raises(ProcessLost if is_loss else type(error)), start("cpu", None, 7.0):
        raise error


def test_processes_that_do_not_find_each_other_are_one_sentence(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"the 2 processes do not find each other at 127\.0\.0\.1:1 within 1 s"):
        start("cpu", None, 1.0).__enter__()


def test_what_is_not_deterministic_is_refused_on_a_cpu_only_when_asked():
    def order_decides():
        return torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))

    with start("cpu", None, deterministic=True), pytest.raises(RuntimeError, match="deterministic"):
        order_decides()
    order_decides()
    with start("cpu", None):
        order_decides()


@pytest.mark.parametrize("name", ["dvs128", "imagenet"])
def test_a_deterministic_run_comes_out_the_same_twice(name, script, gesture_data, tmp_path):
    options = [*SMALL, "--data-dir", gesture_data]
    if name == "imagenet":
        options = ["--demo", "-T", 2, "--width", 0.125, "--image-size", 32, "--device", "cpu", "--ema", 0.5, "-b", 180]
    weights = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        code, _, err = script(name, *options, "--deterministic", "--epochs", 1, "--output-dir", folder)
        assert code == 0, err
        weights.append(torch.load(folder / "last.pt", weights_only=True)["model"])
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert not torch.are_deterministic_algorithms_enabled()

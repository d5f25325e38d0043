"""Joining the processes of a run, reproducible arithmetic, and telling a lost process from a mistake."""

import os
import signal
import sys

import pytest
import torch
import torch.distributed as dist

from tests.conftest import SMALL, rows
from tools import _forked
from utils.distributed import start
from utils.errors import ProcessLost, UserError


@pytest.fixture
def second(monkeypatch):
    """The environment of the second of two processes, which nobody answers."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def joined(second, monkeypatch):
    """As ``second``, and as if it were joined with the first, which is gone."""
    monkeypatch.setattr("utils.distributed._join", lambda *_: torch.distributed.HashStore())
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


def test_processes_that_do_not_find_each_other_are_one_sentence(second):
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


# One message ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_of_two(gesture_data, tmp_path, capfd):
    """Two processes of a script; ``run_of_two(change)`` gives their exit codes and all that they print."""
    options = ["-T", 4, "--width", "0.125", "--frame-size", 32, "--device", "cpu", "--num-workers", 0, "-b", 4]
    options += ["--data-dir", gesture_data, "--output-dir", tmp_path / "run", "--epochs", 999, "--timeout", 4]

    def run(change):
        with capfd.disabled():  # the processes write into files
            process = _forked.start("vgg8_dvs128_SMA.py", options, tmp_path / "texts", 2, change)
        ended = process.wait(20)
        process.end()
        assert ended, (process.codes, process.text())
        return process.codes, process.text()

    return run


def append_in(ranks, *words):
    if os.environ["RANK"] in ranks:
        sys.argv += words


@pytest.fixture(params=[True, False], ids=["torchrun's store", "the first process's store"])
def store(request):
    """What sets the environment of the launcher, or nothing."""
    if not request.param:
        yield lambda: None
        return
    kept = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    yield lambda: os.environ.update(MASTER_PORT=str(kept.port), TORCHELASTIC_USE_AGENT_STORE="True")


@pytest.mark.parametrize("ranks", ["0", "1", "01"])
def test_a_mistake_that_one_process_or_all_meet_is_told_once(ranks, store, run_of_two):
    codes, text = run_of_two(lambda: (store(), append_in(ranks, "--data-dir", "nowhere")))
    assert codes == [2 if str(rank) in ranks else 3 for rank in range(2)], text
    assert text.count("error:") == 1 and "is not in --data-dir nowhere" in text and "Traceback" not in text


@pytest.mark.parametrize("ranks", ["1", "01"])
def test_a_mistake_before_the_processes_are_joined_is_told_once(ranks, store, run_of_two):
    codes, text = run_of_two(lambda: (store(), append_in(ranks, "--weights", "nothing.pth")))
    assert codes == [2, 2] and text.count("error:") == 1 and "Traceback" not in text, text

"""Joining the processes of a run, reproducible arithmetic, and how a run of several processes ends."""

import os
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from tests.conftest import SMALL, rows
from tools import _forked
from utils.distributed import (
    any_process,
    fail_together,
    gather,
    largest_over_processes,
    start,
    sum_over_processes,
)
from utils.errors import ProcessLost, StopRequested, UserError
from utils.signals import StopSignal


@pytest.fixture
def second(monkeypatch):
    """The environment of the second of two processes, which nobody answers."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def free_port(monkeypatch):
    """Let MASTER_PORT name a port that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))


@pytest.mark.parametrize(
    ("error", "is_loss"),
    [
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (torch.distributed.DistBackendError("NCCL watchdog timed out"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (UserError("--lr"), False),
    ],
)
def test_a_failed_exchange_is_a_lost_process_and_nothing_else_is(error, is_loss, second, free_port, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")

    def run():
        try:
            with start("cpu", None, 7.0):
                raise error
        except Exception as caught:
            return type(caught), dist.is_initialized()  # taking the group down would wait for the other processes

    assert _forked.in_child(run, 60) == (ProcessLost if is_loss else type(error), True)


def test_processes_that_do_not_find_each_other_are_one_sentence(second):
    with pytest.raises(UserError, match=r"the 2 processes do not find each other at 127\.0\.0\.1:1 within 1 s"):
        start("cpu", None, 1.0).__enter__()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, "two") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")],
        *[(name, "-1") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")],
        *[("RANK", "2"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "9" * 30), ("WORLD_SIZE", "9" * 5000)],
        *[("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "3"), ("MASTER_PORT", "65536"), ("RANK", "1.0"), ("RANK", "")],
    ],
)
def test_an_environment_that_no_launcher_sets_is_one_sentence(name, value, second, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"environment variable {name}, which is .* must be") as caught:
        start("cpu", None, 1.0).__enter__()
    assert len(str(caught.value)) < 300


def test_a_missing_port_is_one_sentence(second, monkeypatch):
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(UserError, match="environment variable MASTER_PORT, which is not set, must be a whole number"):
        start("cpu", None, 1.0).__enter__()


def test_local_rank_minus_one_means_no_launcher():
    with start("cpu", -1) as process:
        assert (process.rank, process.local_rank, process.world_size) == (0, 0, 1)


def test_what_is_not_deterministic_is_refused_on_a_cpu_only_when_asked():
    def order_decides():
        return torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))

    with start("cpu", None, deterministic=True), pytest.raises(RuntimeError, match="deterministic"):
        order_decides()
    order_decides()
    with start("cpu", None):
        order_decides()


@pytest.mark.parametrize("name", ["dvs128", pytest.param("imagenet", marks=pytest.mark.slow)])
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


# How a run of two ends ----------------------------------------------------------------------------------------------


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


@pytest.fixture
def two_processes(second, free_port):
    """Call a function in two joined processes; ``two_processes(function)`` gives what it returns in each."""

    def run(function):
        def of_rank(rank):
            os.environ["RANK"] = str(rank)
            return function()

        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda rank: _forked.in_child(lambda: of_rank(rank), 60), range(2)))

    return run


def append_in(ranks, *words):
    if os.environ["RANK"] in ranks:
        sys.argv += words


@pytest.fixture(
    params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["torchrun's store", "the first process's store"]
)
def store(request):
    """What sets the environment of the launcher, or nothing."""
    if not request.param:
        yield lambda: None
        return
    kept = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    yield lambda: os.environ.update(MASTER_PORT=str(kept.port), TORCHELASTIC_USE_AGENT_STORE="True")


LOST = "error: another process of the run ended, or did not answer for 4 s"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_mistake_that_one_process_meets_ends_all_and_carries_its_rank(rank, store, run_of_two):
    codes, text = run_of_two(lambda: (store(), append_in(str(rank), "--data-dir", "nowhere")))
    assert codes == [2 if one == rank else 3 for one in range(2)], text
    assert text.count(f"rank {rank}: error: DVS128 Gesture is not in --data-dir nowhere") == 1
    assert text.count(f"rank {1 - rank}: {LOST}") == 1
    assert text.count("error:") == 2 and "Traceback" not in text, text


@pytest.mark.parametrize("mistake", [("--data-dir", "nowhere"), ("--weights", "nothing.pth"), ("--lr", "fast")])
def test_a_mistake_that_all_processes_meet_is_printed_once(mistake, store, run_of_two):
    codes, text = run_of_two(lambda: (store(), append_in("01", *mistake)))
    assert codes == [2, 2] and text.count("error:") == 1 and mistake[1] in text, text
    assert "rank" not in text and "Traceback" not in text, text


@pytest.mark.slow
@pytest.mark.slow
def test_a_mistake_of_one_process_before_all_are_joined_ends_the_others(store, run_of_two):
    codes, text = run_of_two(lambda: (store(), append_in("1", "--weights", "nothing.pth")))
    assert codes == [3, 2], text
    assert text.count("rank 1: error: file nothing.pth does not exist") == text.count(f"rank 0: {LOST}") == 1, text
    assert text.count("error:") == 2 and "Traceback" not in text, text


def fail_in_second():
    """What two processes do with a block that fails in the second one, and with the sums after it."""
    rank = int(os.environ["RANK"])
    with start("cpu", None, 10.0):
        with pytest.raises(UserError, match="no room on the second"), fail_together():
            if rank == 1:
                raise UserError("no room on the second")
        with fail_together():
            pass
        return (
            sum_over_processes([rank, 1]),
            largest_over_processes([rank, -rank]),
            any_process(rank == 1),
            gather(rank),
        )


def test_where_one_process_fails_in_a_shared_block_all_fail_and_stay_together(two_processes):
    assert two_processes(fail_in_second) == 2 * [([1.0, 2.0], [1.0, 0.0], True, [0, 1])]


def count_exchanges():
    """Exchanges of three steps of two processes: the second has a flag in its second step and a signal in its third."""
    rank, original, exchanges, flags = int(os.environ["RANK"]), dist.all_reduce, [], []
    with start("cpu", None, 10.0), StopSignal() as stop:
        dist.all_reduce = lambda *given: exchanges.append(original(*given))
        with pytest.raises(StopRequested):
            for step in stop.watch([1, 2, 3, 4]):
                if rank == 1 and step == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                flags.append(stop.agree(rank == 1 and step == 2))
    return flags, len(exchanges)


def test_a_step_has_one_exchange_for_its_flag_and_the_signals(two_processes):
    assert two_processes(count_exchanges) == 2 * [([False, True, False], 1 + 3)]  # one for the number of steps

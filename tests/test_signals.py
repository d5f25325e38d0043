"""Stopping inside an epoch by a signal, and continuing to the bit."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.conftest import ROOT, SCRIPTS, SMALL, rows
from utils.analysis.azo_record import read_azo_record
from utils.checkpoint import read_weights
from utils.errors import StopRequested
from utils.signals import StopSignal

# Sends a signal to its own process from inside a step: at the N-th training batch, or test batch, of the run.
SENDER = """
import os, runpy, signal, sys
import utils.engine as engine
where, at, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
count = 0
def counted(self, *args, add=engine.Progress.add):
    global count
    training = sys._getframe(1).f_code.co_name == "train_one_epoch"
    count += training == (where == "train")
    if count == at and training == (where == "train"):
        os.kill(os.getpid(), number)
    add(self, *args)
engine.Progress.add = counted
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def same_state(a, b):
    """Weights, optimiser and the random state of every process, to the bit."""
    first, second = (torch.load(folder / "last.pt", weights_only=True) for folder in (a, b))
    weights = [read_weights(folder / "last.pt")[0] for folder in (a, b)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    for one, other in zip(first["optimizer"]["state"].values(), second["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one)
    for one, other in zip(first["processes"], second["processes"], strict=True):
        assert torch.equal(one["rng"]["cpu"], other["rng"]["cpu"])
    return first["epoch"] == second["epoch"]


@pytest.fixture(scope="module")
def whole(gesture_data, tmp_path_factory):
    """An uninterrupted run of two epochs of five steps: its folder, and the command that makes such runs."""
    command = [SCRIPTS["dvs128"], *SMALL, "--data-dir", gesture_data, "--epochs", 2, "--record-azo"]
    folder = tmp_path_factory.mktemp("whole")
    done = run([*command, "--output-dir", folder])
    assert done.returncode == 0, done.stderr
    return folder, command


def run(command, before=(), **environment):
    return subprocess.run(
        list(map(str, [sys.executable, *before, *command])),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "at", "number", "position"),
    [
        ("train", 5, signal.SIGINT, (0, 5)),  # the last step of the epoch: only its evaluation is missing
        ("test", 2, signal.SIGTERM, (0, 5)),  # inside the evaluation
    ],
)
def test_a_run_that_is_stopped_inside_an_epoch_continues_to_the_bit(where, at, number, position, whole, tmp_path):
    folder, command = whole
    command = [*command, "--output-dir", tmp_path]
    stopped = run(command, ["-c", SENDER, where, at, int(number)])
    assert stopped.returncode == 128 + number, stopped.stderr
    assert f"stopped by {number.name}; every step is saved, and the same command continues" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (state["epoch"], state["processes"][0]["progress"]["step"]) == position
    assert len(rows(tmp_path)) == position[0]

    done = run(command)
    assert done.returncode == 0, done.stderr
    assert same_state(folder, tmp_path)
    assert rows(tmp_path) == rows(folder)
    _, _, shares = read_azo_record(folder)
    _, _, continued = read_azo_record(tmp_path)
    assert all((continued[name] == shares[name]).all() for name in shares)


LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def whole_of_two(gesture_data, tmp_path_factory):
    """As ``whole``, of two processes."""
    command = [SCRIPTS["dvs128"], *SMALL, "--data-dir", gesture_data, "--epochs", 2, "-b", 2]
    folder = tmp_path_factory.mktemp("whole_of_two")
    assert run([*command, "--output-dir", folder], LAUNCHER).returncode == 0
    return folder, command


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_continue_to_the_bit(whole_of_two, tmp_path):
    whole, command = whole_of_two
    command = [*command, "--output-dir", tmp_path]
    # One process gets the signal; both stop after the step.
    sender = tmp_path / "sender.py"
    sender.write_text(SENDER.replace("count == at and", 'count == at and os.environ["RANK"] == "1" and'))
    done = run([sender, "train", 3, int(signal.SIGTERM), *command], LAUNCHER)
    assert done.returncode != 0 and done.stderr.count("stopped by SIGTERM; every step is saved") == 1, done.stderr
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert [own["progress"]["step"] for own in state["processes"]] == [3, 3]

    alone = run(command)
    assert alone.returncode == 2
    assert "was stopped inside epoch 1 of 2 process(es) and there are 1; continue it with as many" in alone.stderr

    assert run(command, LAUNCHER).returncode == 0
    assert same_state(whole, tmp_path)
    assert rows(tmp_path) == rows(whole)


@pytest.mark.slow
def test_a_launcher_that_starts_the_processes_anew_ends_with_the_same_run(whole_of_two, tmp_path):
    whole, command = whole_of_two
    sender = tmp_path / "sender.py"  # the second process is killed in the second epoch, at the first start
    first = 'os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and'
    sender.write_text(SENDER.replace("count == at and", f"count == at and {first}"))
    launcher = [*LAUNCHER, "--max-restarts", 1]
    done = run([sender, "train", 8, int(signal.SIGKILL), *command, "--output-dir", tmp_path], launcher)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: another process of the run ended, or did not answer for 600 s") == 1
    assert same_state(whole, tmp_path)
    assert rows(tmp_path) == rows(whole)


@pytest.mark.slow
def test_a_real_sigterm_to_a_run_and_its_loader_processes_ends_it_within_seconds(gesture_data, tmp_path):
    command = [SCRIPTS["dvs128"], *SMALL, "--data-dir", gesture_data, "--epochs", 500, "--output-dir", tmp_path]
    process = subprocess.Popen(
        list(map(str, [sys.executable, *command, "--num-workers", 2])),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "last.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert time.monotonic() - began < 20  # a step takes milliseconds; the rest is a loaded machine
    assert "stopped by SIGTERM" in err and "Traceback" not in err


LEAVES = """
from torch.utils.data import DataLoader
from utils.signals import in_worker, starting_workers
with starting_workers():
    batches = iter(DataLoader(list(range(99)), num_workers=2, worker_init_fn=in_worker))
next(batches)
raise MemoryError
"""


def test_loader_processes_end_with_a_main_process_that_fails():
    done = run(["-c", LEAVES])
    assert done.returncode == 1 and done.stderr.strip().endswith("MemoryError")


def test_the_signal_is_seen_after_the_step_and_the_handlers_go_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    seen = []
    with StopSignal() as stop, pytest.raises(StopRequested) as caught:
        for batch in stop.watch([1, 2, 3]):
            if batch == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            seen.append(batch)
    assert seen == [1, 2] and caught.value.number == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_run_that_fails_is_not_ended_by_sigterm_before_it_says_why():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(ZeroDivisionError), StopSignal():
            raise ZeroDivisionError
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

"""Two launchers as on two machines: one is lost with its process, comes back, and the run ends as if undisturbed.

With c10d the launcher that is left may take the lost one for alive, wait a minute for it and end. So each is started
again where it ends with an error, as by the loop of docs/training.md. It also keeps the address of an earlier round,
unless its store is not shared with the processes.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from tests.conftest import ROOT, SCRIPTS, SMALL, rows
from utils.checkpoint import read_weights

ROW = "one of two machines lost in the middle, then back: weights and metrics as of an undisturbed run"
EPOCHS = 12
# Runs the script and leaves its process number, which the launcher does not share with its own group.
WORKER = """
import os, runpy, sys
open(sys.argv[1], "w").write(str(os.getpid()))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Machine:
    """A launcher of one process, with all that it starts."""

    def __init__(self, number, rendezvous, port, script, pid_file, texts):
        if rendezvous == "static":
            meet = ["--node_rank", number, "--master_addr", "127.0.0.1", "--master_port", port]
        else:  # the first one is the host
            meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "test"]
            meet += ["--rdzv_conf", f"is_host={int(number == 0)},keep_alive_interval=1"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1]
        command += [*meet, "--max_restarts", 3, pid_file.with_name("worker.py"), pid_file, *script]
        self.pid_file, self.texts = pid_file, texts
        with texts.open("a") as output:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                     "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            )  # fmt: skip

    def lose(self):
        """As when its power fails."""
        os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(self.pid_file.read_text()), signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def script(gesture_data):
    return [SCRIPTS["dvs128"], *SMALL, "-b", 2, "--data-dir", gesture_data, "--epochs", EPOCHS, "--timeout", 60]


@pytest.fixture(scope="module")
def undisturbed(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launcher, *map(str, [*script, "--output-dir", folder])], cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.row(ROW)
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_a_machine_that_is_lost_comes_back(rendezvous, script, undisturbed, cases, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    folder, port = tmp_path / "run", free_port()

    def start(number):
        texts = tmp_path / f"{number}.txt"
        return Machine(number, rendezvous, port, [*script, "--output-dir", folder], tmp_path / f"{number}.pid", texts)

    machines = [start(0), start(1)]
    try:
        wait_for(lambda: len(rows(folder)) >= 3 if (folder / "metrics.csv").exists() else False, machines, tmp_path)
        machines[1].lose()
        lost_at = len(rows(folder))
        time.sleep(5)
        machines[1] = start(1)
        codes = run_to_the_end(machines, start)
    finally:
        for machine in machines:
            if machine.process.poll() is None:
                machine.lose()
    assert codes == [0, 0], texts_of(tmp_path)
    assert lost_at < EPOCHS, "the run was through before the machine was lost"
    weights = [read_weights(one / "last.pt")[0] for one in (undisturbed, folder)]
    same = all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    cases(1, int(same and rows(folder) == rows(undisturbed)), f"{rendezvous} rendezvous, after epoch {lost_at}")


def run_to_the_end(machines, start, seconds=400, starts=5):
    """The exit codes; a launcher that ends with an error is started again."""
    end = time.monotonic() + seconds
    while any(machine.process.poll() != 0 for machine in machines) and time.monotonic() < end:
        for number, machine in enumerate(machines):
            if machine.process.poll() not in (None, 0) and starts:
                starts -= 1
                machines[number] = start(number)
        time.sleep(0.2)
    return [machine.process.poll() for machine in machines]


def wait_for(condition, machines, folder, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and all(one.process.poll() is None for one in machines), texts_of(folder)
        time.sleep(0.02)


def texts_of(folder):
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("*.txt")))

"""Runs of the scripts as processes of their own, started by fork: torch is imported once, a start takes milliseconds.

The process that forks must not compute with torch itself: the threads that torch would start do not survive a fork.
"""

from __future__ import annotations

import os
import pickle
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm.utils  # noqa: F401 - here and below: what a script imports for seconds is there before it is forked
import torch
import torch.utils.tensorboard
import torchvision.transforms.v2  # noqa: F401

__all__ = ["ROOT", "Run", "end_all", "in_child", "launch", "start"]

ROOT = Path(__file__).resolve().parent.parent

_runs: list[Run] = []


class Run:
    """A script that runs in one or several processes.

    Args:
        pids: of the processes, in rank order.
        texts: where what they print goes.
    """

    def __init__(self, pids: list[int], texts: list[Path]):
        self.pids, self._texts = pids, texts
        self.codes: list[int | None] = [None] * len(pids)
        _runs.append(self)

    def wait(self, seconds: float = 600.0) -> bool:
        """Wait until all processes ended, so long at most; whether they did. ``codes`` has those that ended."""
        end = time.monotonic() + seconds
        while True:
            for rank, pid in enumerate(self.pids):
                if self.codes[rank] is None:
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        self.codes[rank] = os.waitstatus_to_exitcode(status)
            if None not in self.codes:
                if self in _runs:
                    _runs.remove(self)
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.005)

    def send(self, number: int, rank: int = 0) -> None:
        """Send a signal to a process that has not ended."""
        if self.codes[rank] is None:
            os.kill(self.pids[rank], number)

    def end(self) -> None:
        """Kill whatever is left."""
        for rank in range(len(self.pids)):
            self.send(signal.SIGKILL, rank)
        self.wait()

    def text(self) -> str:
        """Everything that the processes printed."""
        return "".join(path.read_text(errors="replace") for path in self._texts)


def start(
    script: str, arguments: Sequence[object], texts: Path, processes: int = 1, prelude: Callable[[], None] | None = None
) -> Run:
    """Start a script of the repository, one thread a process.

    Args:
        script: its file name.
        arguments: of its command line.
        texts: a folder for what the processes print.
        processes: with more than one they find each other as under a launcher.
        prelude: runs in every process before the script, with RANK set.
    """
    texts.mkdir(parents=True, exist_ok=True)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
    pids, files = [], []
    for rank in range(processes):
        files.append(texts / f"{rank}.txt")
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}

        def body(own: dict[str, str] = own) -> int:
            os.environ.update(own)
            os.chdir(ROOT)
            sys.argv = [script, *map(str, arguments)]
            if prelude is not None:
                prelude()
            runpy.run_path(str(ROOT / script), run_name="__main__")
            return 0

        pids.append(_fork(body, files[-1]))
    return Run(pids, files)


def in_child(function: Callable[[], Any], seconds: float = 600.0) -> Any:
    """The plain value that ``function`` returns in a process of its own.

    Raises:
        RuntimeError: it raised, with its traceback, or took too long.
    """
    read, write = os.pipe()

    def body() -> int:
        os.close(read)
        with os.fdopen(write, "wb") as out:
            try:
                pickle.dump((function(), None), out)
            except Exception:
                pickle.dump((None, traceback.format_exc()), out)
        return 0

    run = Run([_fork(body, None)], [])
    os.close(write)
    with os.fdopen(read, "rb") as source:
        content = source.read()
    if not run.wait(seconds) or not content:
        run.end()
        raise RuntimeError(f"a child process ended with {run.codes[0]} and no result")
    value, problem = pickle.loads(content)
    if problem:
        raise RuntimeError(problem)
    return value


def launch(function: Callable[[], None], texts: Path) -> Run:
    """Start ``function`` in a process of its own; what it prints goes into a file in the folder ``texts``."""
    texts.mkdir(parents=True, exist_ok=True)
    return Run([_fork(lambda: function() or 0, texts / "0.txt")], [texts / "0.txt"])


def end_all() -> None:
    """Kill the processes of all runs that have not ended."""
    for run in list(_runs):
        run.end()


def _fork(body: Callable[[], int], output: Path | None) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if output is not None:
            there = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(there, 1)
            os.dup2(there, 2)
        torch.set_num_threads(1)
        code = body()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not through the parent's handlers


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]

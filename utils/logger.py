"""What a run says and writes: header, progress bar, one line and one row an epoch, TensorBoard, evaluation."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from utils.analysis.azo_record import AZORecord
from utils.args import plain, words
from utils.distributed import Process, fail_together, gather
from utils.errors import UserError
from utils.files import occupy, read_text, replacing, write_text, writing
from utils.versions import versions

__all__ = ["RunLog", "check_output", "one_run", "progress_bar", "write_evaluation"]

COLUMNS = ("epoch", "train_loss", "train_acc1", "test_loss", "test_acc1", "lr", "seconds")


class RunLog:
    """The log of one run. On all processes but the first every call does nothing.

    Args:
        directory: the output directory.
        process: this process.
        log_dir: of the TensorBoard events.
        net: the network itself, not its wrapper: what its AZO replaces is recorded.

    Attributes:
        azo: that record, a part of the checkpoint; None where there is no AZO, and on other processes.
    """

    def __init__(self, directory: Path, process: Process, log_dir: Path, net: nn.Module):
        self.directory, self.process, self.log_dir = directory, process, log_dir
        self.azo = (AZORecord(net) or None) if process.is_first else None
        self._metrics = directory / "metrics.csv"
        self._rows: dict[int, list[str]] = {}  # of metrics.csv, by epoch
        self._tensorboard = None
        self._split: str | None = None
        self._began = time.monotonic()

    def header(self, lines: dict[str, Any], deviations: dict[str, tuple[Any, Any]]) -> None:
        """Print the facts of the run, one a line, and every deviation from the published recipe."""
        if not self.process.is_first:
            return
        for name, value in lines.items():
            print(f"{name + ':':<12} {value}")
        changed = ", ".join(
            f"{name} {words(used)} instead of {words(published)}" for name, (published, used) in deviations.items()
        )
        print(f"{'deviations:':<12} {changed or 'none'}", flush=True)

    def open(self, args: dict[str, Any], facts: dict[str, Any], epochs_done: int, split: str | None = None) -> None:
        """Start writing: ``args.json``, ``metrics.csv`` with the rows of the epochs that are done, ``split.txt``.

        Args:
            split: the text of the split's file.

        Raises:
            UserError: the directory cannot be written to; raised in all processes.
        """
        with self._writing():
            if self.process.is_first:
                self._open(args, facts, epochs_done, split)

    def _open(self, args: dict[str, Any], facts: dict[str, Any], epochs_done: int, split: str | None) -> None:
        _check_utf8(f"--log-dir {self.log_dir}")
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import: not for --help and evaluation

        self.directory.mkdir(parents=True, exist_ok=True)
        self._rows = {epoch: row for epoch, row in _rows(self._metrics) if epoch <= epochs_done}  # each epoch once
        self._write_rows()
        if self.azo is not None:
            self.azo.start(self.directory, epochs_done)
        described = {"args": {k: plain(v) for k, v in args.items()}, **facts, "versions": versions(), "argv": sys.argv}
        write_text(self.directory / "args.json", json.dumps(described, indent=2) + "\n")
        if split is not None:
            write_text(self.directory / "split.txt", split)
        self._split = facts.get("split")
        self._tensorboard = SummaryWriter(str(self.log_dir), purge_step=epochs_done + 1)

    def progress(self, batches: Iterable, what: str) -> Iterable:
        """The batches under a progress bar (rate and time left) on the first process."""
        return progress_bar(batches, what, self.process)

    def epoch(
        self, epoch: int, epochs: int, train: dict[str, float], test: dict[str, float], lr: float, seconds: float
    ) -> None:
        """Report an epoch (numbered from 1): a line, a row of ``metrics.csv``, TensorBoard.

        Raises:
            UserError: the directory cannot be written to; raised in all processes.
        """
        with self._writing():
            if self.process.is_first:
                self._write_epoch(epoch, train, test, lr, seconds)
        if not self.process.is_first:
            return
        top5 = f" top-5 {test['acc5']:.2f} %" if "acc5" in test else ""
        left_out = f"  {train['left_out']} step(s) left out (--on-nan)" if train["left_out"] else ""
        left_out += f"  {train['skips']} step(s) skipped by the fp16 scaler" if train["skips"] else ""
        print(
            f"epoch {epoch}/{epochs}  train loss {train['loss']:.4f} acc {train['acc1']:.2f} %  "
            f"test loss {test['loss']:.4f} acc {test['acc1']:.2f} % ({test['correct']}/{test['count']}){top5}  "
            f"lr {lr:.3g}  {seconds:.1f} s{left_out}{_of_split(self._split)}",
            flush=True,
        )

    def _write_epoch(
        self, epoch: int, train: dict[str, float], test: dict[str, float], lr: float, seconds: float
    ) -> None:
        values = (train["loss"], train["acc1"], test["loss"], test["acc1"], lr, seconds)
        self._rows[epoch] = [str(epoch), *(f"{value:.10g}" for value in values)]
        self._write_rows()
        for name, value in zip(COLUMNS[1:], values, strict=True):
            self._tensorboard.add_scalar(name, value, epoch)
        if self.azo is not None:
            self.azo.write(self.directory, epoch)
        if "acc5" in test:
            self._tensorboard.add_scalar("test_acc5", test["acc5"], epoch)
        self._tensorboard.flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Where the first process cannot write, all processes stop with one message."""
        problem = None
        try:
            yield
        except OSError as error:
            problem = (
                f"the log in --output-dir {self.directory} cannot be written: {error.strerror or error}; make room, "
                "and the same command continues after the last saved epoch, or choose another --output-dir"
            )
        if problem := gather(problem)[0]:
            raise UserError(problem)

    def finish(self, final: dict[str, float], best: dict[str, float], facts: dict[str, Any]) -> None:
        """Report the final epoch, and which epoch was best, and say which is which."""
        if not self.process.is_first:
            return
        self._tensorboard.close()
        print("final epoch:", end=" ")
        write_evaluation(self.directory, self.process, final, epoch="final", best=best, **facts)
        print(
            f"best epoch: {best['epoch']} with acc1 {best['acc1']:.2f} % (selected on the test set, as published)"
            f"{_of_split(self._split)}"
        )
        print(f"{time.monotonic() - self._began:.1f} s; everything is in {self.directory}", flush=True)

    def _write_rows(self) -> None:
        """All of ``metrics.csv``: a kill leaves the old file or the new one."""
        with replacing(self._metrics) as file:
            file.write("".join(f"{','.join(row)}\n" for row in [COLUMNS, *self._rows.values()]).encode())


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The whole rows of ``metrics.csv``, with their epochs; what is no row is left out."""
    for line in (read_text(path) or "").splitlines():
        row = line.split(",")
        with contextlib.suppress(ValueError):
            if len(row) == len(COLUMNS) and all(math.isfinite(float(value)) for value in row):
                yield int(row[0]), row


def progress_bar(
    items: Iterable, what: str, process: Process | None = None, unit: str = "batch", total: int | None = None
) -> Iterable:
    """The items under a progress bar (rate and time left), of several processes on the first one."""
    # Without a terminal a bar every 30 s keeps a log file short.
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        items, desc=what, unit=unit, total=total, leave=False, mininterval=interval, delay=interval,
        disable=process is not None and not process.is_first, dynamic_ncols=True,
    )  # fmt: skip


def check_output(directory: Path) -> None:
    """Check that the output directory is one, or can be made; nothing is written yet.

    Raises:
        UserError: it cannot be used.
    """
    _check_utf8(f"--output-dir {directory}")
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        reason = "may not be written to" if existing.is_dir() else "is a file"
        raise UserError(f"--output-dir {directory} cannot be used: {existing} {reason}; choose another")


@contextlib.contextmanager
def one_run(directory: Path, process: Process, evaluates: bool) -> Iterator[None]:
    """Keep the output directory for this training; a second one is refused (see :func:`utils.files.occupy`).

    Args:
        evaluates: it is no training, and may look at the weights of one.

    Raises:
        UserError: another run has it, or it cannot be written to; raised in all processes.
    """
    with contextlib.ExitStack() as stack:
        with fail_together(), writing(f"--output-dir {directory}"):
            if process.is_first and not evaluates:
                stack.enter_context(occupy(directory))
        yield


def write_evaluation(directory: Path, process: Process, result: dict[str, Any], **facts: Any) -> None:
    """Print an evaluation and write it to ``evaluation.json``."""
    if not process.is_first:
        return
    top5 = f", acc5 {result['acc5']:.2f} %" if "acc5" in result else ""
    accuracy = f"{result['correct']} of {result['count']} correct: acc1 {result['acc1']:.2f} %{top5}"
    print(f"{accuracy}, loss {result['loss']:.6f}{_of_split(facts.get('split'))}")
    directory.mkdir(parents=True, exist_ok=True)
    written = {**result, **{name: plain(value) for name, value in facts.items()}}
    write_text(directory / "evaluation.json", json.dumps(written, indent=2) + "\n")


def _of_split(split: str | None) -> str:
    """The end of a line with a result on event data."""
    return f"  split: {split}" if split else ""


def _check_utf8(argument: str) -> None:
    """TensorBoard takes no other names."""
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{argument} has a name that is not UTF-8, or the locale is not; choose another name, or set LC_ALL=C.UTF-8"
        ) from error

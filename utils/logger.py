"""What a run prints and writes: header, progress bar, one line and one row an epoch, TensorBoard, evaluation."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.analysis.azo_record import AZORecord
from utils.args import plain, words
from utils.distributed import Process, fail_together
from utils.errors import UserError
from utils.files import occupy, read_text, replacing, write_text, writing
from utils.tracker import Tracker

__all__ = [
    "COLUMNS",
    "VAL_COLUMNS",
    "RunLog",
    "check_output",
    "evaluation_in_words",
    "one_run",
    "print_header",
    "progress_bar",
    "write_json",
]

COLUMNS = ("epoch", "train_loss", "train_acc1", "test_loss", "test_acc1", "lr", "seconds")
VAL_COLUMNS = ("val_loss", "val_acc1")  # behind them, of a run that holds samples out; its test columns are empty


class RunLog:
    """The log of one training. On all processes but the first every call does nothing.

    Args:
        directory: the output directory.
        process: this process.
        log_dir: of the TensorBoard events.
        azo: records what AZO replaces; None for no record.
        part: that every epoch is evaluated on, ``"test"`` or ``"val"``.
        tracker: of ``utils.tracker.TRACKERS``; it gets what TensorBoard gets.
    """

    def __init__(
        self, directory: Path, process: Process, log_dir: Path, azo: AZORecord | None = None, part: str = "test",
        tracker: str | None = None,
    ):  # fmt: skip
        self.directory, self.process, self.log_dir, self.azo, self.part = directory, process, log_dir, azo, part
        self.columns = COLUMNS if part == "test" else COLUMNS + VAL_COLUMNS
        self._rows: dict[int, list[str]] = {}  # of metrics.csv, by epoch
        self._tensorboard: Any = None
        self._tracker_name = tracker
        self._tracker: Tracker | None = None

    def open(
        self, args: Mapping[str, Any], facts: Mapping[str, Any], epochs_done: int, split: str | None = None,
        earlier: Path | None = None,
    ) -> None:  # fmt: skip
        """Start writing: ``args.json``, ``metrics.csv`` with the rows of the epochs that are done, ``split.txt``.

        Args:
            args, facts: what goes into ``args.json``.
            epochs_done: of the run so far.
            split: the text of the split's file.
            earlier: the folder of the run that is continued, where it is another one: its rows are copied.

        Raises:
            UserError: the directory cannot be written to; raised in all processes.
        """
        with self._writing():
            if not self.process.is_first:
                return
            _check_utf8(f"--log-dir {self.log_dir}")
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import: not for --help and evaluation

            self.directory.mkdir(parents=True, exist_ok=True)
            rows = {} if earlier is None else self._rows_of(earlier / "metrics.csv")
            rows |= self._rows_of(self.directory / "metrics.csv")
            self._rows = {epoch: row for epoch, row in sorted(rows.items()) if epoch <= epochs_done}
            self._write_rows()
            if self.azo is not None:
                self.azo.start(self.directory, epochs_done)
            described = {"args": args, **facts, "argv": sys.argv}
            write_json(self.directory / "args.json", described)
            if split is not None:
                write_text(self.directory / "split.txt", split)
            self._tensorboard = SummaryWriter(str(self.log_dir), purge_step=epochs_done + 1)
            if self._tracker_name is not None:
                self._tracker = Tracker(self._tracker_name, self.directory, _finite(described))

    def epoch(
        self, epoch: int, train: Mapping[str, float], found: Mapping[str, float], lr: float, seconds: float
    ) -> None:
        """Record an epoch (numbered from 1), and what was found on ``part``: a row of ``metrics.csv``, TensorBoard.

        Before its checkpoint is saved: what a kill leaves in between is dropped when the run continues.

        Raises:
            UserError: the directory cannot be written to; raised in all processes.
        """
        with self._writing():
            if not self.process.is_first:
                return
            values = {"epoch": epoch, "train_loss": train["loss"], "train_acc1": train["acc1"], "lr": lr}
            values |= {"seconds": seconds, f"{self.part}_loss": found["loss"], f"{self.part}_acc1": found["acc1"]}
            self._rows[epoch] = [f"{values[name]:.10g}" if name in values else "" for name in self.columns]
            self._write_rows()
            self._chart(epoch, {**_charted(found, self.part), **_charted(train, "train"), "lr": lr, "seconds": seconds})
            if self.azo is not None:
                self.azo.write(self.directory, epoch)

    def final(self, epoch: int, test: Mapping[str, float]) -> None:
        """Chart the one evaluation on the test set of a run that holds samples out, at its last epoch."""
        if self.process.is_first:
            self._chart(epoch, _charted(test, "test"))

    def _chart(self, epoch: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._tensorboard.add_scalar(tag, value, epoch)
        self._tensorboard.flush()
        if self._tracker is not None:
            self._tracker.log(values, epoch)

    def _write_rows(self) -> None:
        """All of ``metrics.csv``: a kill leaves the old file or the new one."""
        with replacing(self.directory / "metrics.csv") as file:
            file.write("".join(f"{','.join(row)}\n" for row in [self.columns, *self._rows.values()]).encode())

    def _rows_of(self, path: Path) -> dict[int, list[str]]:
        """The complete rows of a ``metrics.csv``, by epoch; what is no row is left out."""
        found = {}
        for line in (read_text(path) or "").splitlines():
            row = line.split(",")
            with contextlib.suppress(ValueError):
                if len(row) == len(self.columns) and all(math.isfinite(float(value)) for value in row if value):
                    found[int(row[0])] = row
        return found

    def close(self) -> None:
        """Finish the TensorBoard events, and the run at the tracker."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._tracker is not None:
            self._tracker.finish()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Where the first process cannot write, all processes stop with one message."""
        with fail_together():
            try:
                yield
            except OSError as error:
                raise UserError(
                    f"the log in --output-dir {self.directory} cannot be written: {error.strerror or error}; make "
                    "room, and the same command continues after the last saved epoch, or choose another --output-dir"
                ) from error


def print_epoch(
    epoch: int, epochs: int, train: Mapping[str, float], found: Mapping[str, float], lr: float, seconds: float,
    part: str = "test",
) -> None:  # fmt: skip
    """Print an epoch, and what was found on ``part``, in at most 100 columns, when its checkpoint is saved."""
    second = f"top5 {found['acc5']:.2f} %" if "acc5" in found else f"({found['correct']}/{found['count']})"
    line = (
        f"epoch {epoch}/{epochs}  train {train['acc1']:.2f} % loss {train['loss']:.4f}  {part} {found['acc1']:.2f} % "
        f"{second} loss {found['loss']:.4f}  lr {lr:.2g}  {seconds:.{1 if seconds < 100 else 0}f} s"
    )
    if train["skips"]:
        line += f"\n  {train['skips']} step(s) skipped by the fp16 scaler"
    tqdm.write(line, file=sys.stdout)  # a line of its own, whatever the progress bar left
    sys.stdout.flush()


def print_header(lines: Mapping[str, str], deviations: Mapping[str, tuple[Any, Any]]) -> None:
    """Print the facts of a run, one a line, and every deviation from the published recipe."""
    changed = ", ".join(
        f"{name} {words(used) or 'unset'} instead of {words(published) or 'unset'}"
        for name, (published, used) in deviations.items()
    )
    for name, text in {**lines, "deviations": changed or "none"}.items():
        print(f"{name + ':':<12} {text}")
    sys.stdout.flush()


def _charted(result: Mapping[str, float], part: str) -> dict[str, float]:
    """Tags of TensorBoard, in which accuracy comes first."""
    tags = {f"accuracy/{part}": result["acc1"], f"loss/{part}": result["loss"]}
    return tags | ({f"accuracy/{part}_top5": result["acc5"]} if "acc5" in result else {})


def progress_bar(
    items: Iterable, what: str, process: Process | None = None, unit: str = "batch", total: int | None = None,
    done: int = 0,
) -> Iterable:  # fmt: skip
    """The items under a progress bar (rate and time left), of several processes on the first one.

    Without a terminal the bar is a line a minute, so that a log file has lines only.

    Args:
        items: to iterate over.
        what: in front of the bar.
        process: this process; None for a program of one process.
        unit: of an item.
        total: number of items; their length where it is None.
        done: items of an earlier start, which the bar counts.
    """
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    interval = 0.2 if on_terminal else 60.0
    if done and total is None:
        total = done + len(items)  # type: ignore[arg-type]
    return tqdm(
        items, desc=what, unit=unit, total=total, initial=done, leave=False, mininterval=interval, delay=interval,
        disable=process is not None and not process.is_first, dynamic_ncols=True,
        file=None if on_terminal else _LogFile(),
    )  # fmt: skip


class _LogFile:
    """Where a progress bar goes without a terminal: each state is a line of its own on stderr."""

    def write(self, text: str) -> None:
        if text.strip() and sys.stderr is not None:
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self) -> None:
        if sys.stderr is not None:
            sys.stderr.flush()


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


def evaluation_in_words(result: Mapping[str, Any]) -> str:
    """An exact evaluation as one line."""
    top5 = f", acc5 {result['acc5']:.2f} %" if "acc5" in result else ""
    accuracy = f"{result['correct']} of {result['count']} correct: acc1 {result['acc1']:.2f} %{top5}"
    return f"{accuracy}, loss {result['loss']:.6f}"


@contextlib.contextmanager
def one_run(directory: Path, process: Process) -> Iterator[None]:
    """Keep the output directory for this training; a second one is refused (see :func:`utils.files.occupy`).

    Raises:
        UserError: another run has it, or it cannot be written to; raised in all processes.
    """
    with contextlib.ExitStack() as stack:
        with fail_together(), writing(f"--output-dir {directory}"):
            if process.is_first:
                stack.enter_context(occupy(directory))
        yield


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write values as JSON; a number that is not finite becomes null, which every reader takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return plain(value)


def _check_utf8(argument: str) -> None:
    """TensorBoard takes no other names."""
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{argument} has a name that is not UTF-8, or the locale is not; choose another name, or set LC_ALL=C.UTF-8"
        ) from error

"""The record that the stages of preparation pass on: what is wanted, and what they found and made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tqdm.contrib.concurrent import thread_map

from utils.data.folders import BadFile, Folder, listing, read_folder
from utils.data.splits import Split
from utils.data.store import Store
from utils.errors import UserError
from utils.prepare.datasets import DataSet, frames_name
from utils.prepare.frames import Facts, Record
from utils.prepare.recordings import Recording

__all__ = ["Job"]

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Job:
    """One data set on its way from what the user has to packed frames.

    Every stage (``utils/prepare/stages.py``) reads it and adds to it. Bad files are collected in ``bad`` on the way and
    refused, or left out, where the split is made.
    """

    # What is wanted.
    about: DataSet
    data_dir: Path
    T: int
    frame_size: tuple[int, int]  # (H, W) that frames are resized to
    rule: str = "random"  # one of ``utils.data.splits.RULES``, or a split file
    seed: int = 0  # of a random split
    val: float = 0.0  # of the training samples, held out
    num_classes: int | None = None  # that there must be
    official: bool = True  # a missing class or another sensor size is a fault
    any_archive: bool = False  # accept archives without the published checksum
    skip_bad: bool = False  # leave bad files out
    packed: bool = True
    change: bool = True  # False: nothing is made, and everything is read again
    workers: int = field(default_factory=lambda: _cores())

    # What there is.
    archives: dict[str, Path] = field(default_factory=dict)
    recordings: list[Recording] = field(default_factory=list)
    events: Folder = field(default_factory=lambda: Folder(Path()))
    frames: Folder = field(default_factory=lambda: Folder(Path()))
    known: Record = field(default_factory=dict)  # from earlier looks at the frames
    facts: dict[str, Facts] = field(default_factory=dict)  # of whole frames
    bad: list[BadFile] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # of what was read, by kind
    classes: list[str] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # of the samples
    split: Split = field(default_factory=lambda: Split("own", (), ()))  # of the samples that are used
    stores: dict[str, Store] = field(default_factory=dict)

    @property
    def events_dir(self) -> Path:
        """Where the events go."""
        return self.data_dir / "events_np"

    @property
    def frames_dir(self) -> Path:
        """Where the frames go."""
        return self.data_dir if self.about.is_split_by_folder else self.data_dir / frames_name(self.T)

    @property
    def recordings_dir(self) -> Path:
        """Where the recordings lie."""
        return self.data_dir if self.about.is_own else self.data_dir / "extract" / self.about.recordings

    @property
    def record(self) -> Path:
        """Where it is written down what is known of the frames."""
        return self.data_dir / f".checked_T{self.T}_{self.about.sensor[0]}x{self.about.sensor[1]}"

    @property
    def writable(self) -> bool:
        """Whether anything can be made."""
        return self.change and os.access(self.data_dir, os.W_OK)

    @property
    def bad_samples(self) -> set[str]:
        """The samples that are bad, or could not be made."""
        return {file.sample for file in self.bad if file.sample}

    def read(self, folder: Path) -> Folder:
        """The samples of a folder of events or frames."""
        others = (lambda name: name not in self.about.parts) if folder == self.data_dir else None
        return read_folder(folder, (".npz",), self.about.parts, others)

    def in_threads(self, work: Callable[[Item], Result], items: Sequence[Item], what: str) -> list[Result]:
        """``work(item)`` for every item, in order, under a progress bar; an error of one ends it all.

        Threads, not processes: numpy, zlib and blosc2 leave Python free while they work, a killed program leaves none
        behind, and the lock on the folder ends with the program.
        """
        return thread_map(work, items, max_workers=self.workers, desc=what, unit="sample", disable=None, leave=False)

    def refuse(self, bad: Iterable[BadFile] | None = None) -> None:
        """Stop at bad files, unless they are left out.

        Raises:
            UserError: there are some.
        """
        bad = list(self.bad if bad is None else bad)
        if bad and not self.skip_bad:
            raise UserError(
                f"{len(bad)} bad files in --data-dir {self.data_dir}; replace them, delete those that can be made "
                f"again, or leave them out by --on-bad-sample skip:{listing(bad)}"
            )


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

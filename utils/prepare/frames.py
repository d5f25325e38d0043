"""Files of frames as SpikingJelly makes them: read whole or refused, and what is known of them from an earlier look."""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from utils.data.folders import Stamp
from utils.data.store import count_type
from utils.errors import DataError
from utils.files import read_text, write_text
from utils.prepare.arrays import read_array

__all__ = ["Facts", "Record", "content_checksum", "facts_of", "read_frames", "read_record", "resized", "write_record"]

_DIGITS = 16
_RECORD = "# size, time, size and time of the events, checksums of events and frames, largest count, extent, sample\n"


class Facts(NamedTuple):
    """What is known of a whole file of frames."""

    content: str  # checksum of the counts of each pixel over all frames: the same for every T
    frames: str  # checksum of the frames
    largest: int  # count
    height: int  # of the rows that have events
    width: int


def read_frames(path: Path, T: int, sensor: tuple[int, int]) -> np.ndarray:
    """Read the counts ``[T, 2, H, W]`` of a file that SpikingJelly makes, in the smallest integer type that holds them.

    Raises:
        DataError: it is cut off, has another key, T or size, or holds what is no count.
    """
    needed = [T, 2, *sensor]

    def check(shape: tuple[int, ...], dtype: np.dtype) -> None:
        if list(shape) != needed:
            raise DataError(f"has shape {list(shape)} and [T, 2, H, W] = {needed} is needed")
        if dtype.kind not in "fiub":
            raise DataError(f"holds {dtype} and no numbers")

    try:
        with zipfile.ZipFile(path) as archive:
            if "frames.npy" not in archive.namelist():
                keys = ", ".join(name.removesuffix(".npy") for name in archive.namelist()) or "nothing"
                raise DataError(f"has the key {keys} and no 'frames'")
            with archive.open("frames.npy") as file:
                frames = read_array(file, check)
    except DataError:
        raise
    except Exception as error:  # numpy and zipfile raise many types on a damaged file
        raise DataError(f"cannot be read, it is damaged or cut off ({type(error).__name__}: {error})") from error
    if frames.dtype.kind == "f" and not np.isfinite(frames).all():
        raise DataError("holds NaN or infinity")
    smallest, largest = frames.min(), frames.max()
    if smallest < 0 or largest >= 2**31:
        raise DataError(f"holds {smallest:g} to {largest:g}, which are no counts of events")
    counts = frames.astype(count_type(int(largest)))
    if frames.dtype.kind == "f" and not np.array_equal(counts, frames):
        raise DataError("holds fractions, which are no counts of events")
    return counts


def resized(counts: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Counts ``[T, 2, H, W]`` at another size (H, W): bilinear, antialiased, float32."""
    return transforms.resize(torch.from_numpy(counts).float(), list(size), antialias=True)


def content_checksum(frames: np.ndarray) -> str:
    """16 digits that tell the events of a sample whatever its T: of the counts of each pixel over all frames."""
    return hashlib.sha256(frames.sum(0, dtype=np.int64).astype("<i8").tobytes()).hexdigest()[:_DIGITS]


def facts_of(frames: np.ndarray) -> Facts:
    """The facts of counts ``[T, 2, H, W]``.

    Raises:
        DataError: there are no events.
    """
    if not frames.any():
        raise DataError("has no events")
    checksum = hashlib.sha256(frames.astype("<i4").tobytes()).hexdigest()[:_DIGITS]
    height, width = (int(np.flatnonzero(frames.any(axes)).max()) + 1 for axes in ((0, 1, 3), (0, 1, 2)))
    return Facts(content_checksum(frames), checksum, int(frames.max()), height, width)


Record = dict[str, tuple[Stamp, Stamp, Facts]]
"""Samples to the stamps of their frames and of the events (-1, -1: unknown) that these were made from, and facts."""


def read_record(path: Path) -> Record:
    """What an earlier look at the frames found; nothing where there was none."""
    found: Record = {}
    text = read_text(path) or ""
    with contextlib.suppress(ValueError, TypeError):  # from the first damaged line on, frames are read again
        for line in text.removeprefix(_RECORD).split("\n")[:-1] if text.startswith(_RECORD) else ():
            size, changed, source_size, source_changed, content, frames, *numbers, name = line.split(" ", 9)
            facts = Facts(content, frames, *map(int, numbers))
            found[name] = Stamp(int(size), int(changed)), Stamp(int(source_size), int(source_changed)), facts
    return found


def write_record(path: Path, samples: Record) -> None:
    """Remember what a look at the frames found.

    Raises:
        OSError: no room, or the folder cannot be written to.
    """
    lines = [" ".join(map(str, (*own, *source, *facts, name))) for name, (own, source, facts) in samples.items()]
    write_text(path, _RECORD + "".join(f"{line}\n" for line in lines))

"""Are the files of frames whole and right? Every one is read once, and read again when it has changed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.data.packing import count_type
from utils.errors import DataError
from utils.files import write_text
from utils.prepare.parallel import in_threads

__all__ = ["BadFile", "Checksums", "check_frames", "content_checksum", "listing", "read_frames"]

_DIGITS = 16


class BadFile(NamedTuple):
    """A file or folder that cannot be used, and why."""

    path: Path
    what: str
    sample: str = ""  # its path below the folder of frames, without suffix, where it is a sample

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


class Checksums(NamedTuple):
    """What is known of a whole file of frames."""

    content: str  # checksum of the counts of each pixel over all frames: the same for every T
    frames: str  # checksum of the frames


def read_frames(path: Path, T: int, sensor: tuple[int, int]) -> np.ndarray:
    """Read the counts ``[T, 2, H, W]`` of a file that SpikingJelly makes, in the smallest integer type that holds them.

    Raises:
        DataError: it is cut off, has another key, T or size, or holds what is no count.
    """
    needed = [T, 2, *sensor]
    try:
        with zipfile.ZipFile(path) as archive:
            if "frames.npy" not in archive.namelist():
                keys = ", ".join(name.removesuffix(".npy") for name in archive.namelist()) or "nothing"
                raise DataError(f"has the key {keys} and no 'frames'")
            with archive.open("frames.npy") as file:
                shape, _, dtype = _header(file)
                if list(shape) != needed:
                    raise DataError(f"has shape {list(shape)} and [T, 2, H, W] = {needed} is needed")
                if dtype.kind not in "fiub":
                    raise DataError(f"holds {dtype} and no numbers")
            with archive.open("frames.npy") as file:
                frames = np.lib.format.read_array(file, allow_pickle=False)
                file.read(1)  # the end, where zipfile compares its checksum
    except DataError:
        raise
    except Exception as error:  # numpy and zipfile raise many types on a damaged file
        raise DataError(f"cannot be read, it is damaged or cut off ({type(error).__name__}: {error})") from error
    if dtype.kind == "f" and not np.isfinite(frames).all():
        raise DataError("holds NaN or infinity")
    smallest, largest = frames.min(), frames.max()
    if smallest < 0 or largest >= 2**31:
        raise DataError(f"holds {smallest:g} to {largest:g}, which are no counts of events")
    counts = frames.astype(count_type(int(largest)))
    if dtype.kind == "f" and not np.array_equal(counts, frames):
        raise DataError("holds fractions, which are no counts of events")
    return counts


def _header(file: zipfile.ZipExtFile) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return readers[version](file)


def content_checksum(frames: np.ndarray) -> str:
    """16 digits that tell the events of a sample whatever its T: of the counts of each pixel over all frames."""
    return hashlib.sha256(frames.sum(0, dtype=np.int64).astype("<i8").tobytes()).hexdigest()[:_DIGITS]


def check_frames(
    paths: Mapping[str, Path],
    T: int,
    sensor: tuple[int, int],
    record: Path | None,
    workers: int,
) -> tuple[dict[str, Checksums], list[BadFile]]:
    """Inspect the frames of samples, ``<class>/<sample>`` to file.

    Args:
        record: remembers the result of whole files by size and time of change; None reads every file.

    Returns:
        What is known of the whole ones, and the others.
    """
    known = _read_record(record) if record is not None else {}
    stamps = {name: _stamp(path) for name, path in paths.items()}
    good = {name: known[name][1] for name, stamp in stamps.items() if name in known and known[name][0] == stamp}
    left = [name for name in paths if name not in good]
    bad = []

    def inspect(name: str) -> Checksums | str:
        try:
            frames = read_frames(paths[name], T, sensor)
        except DataError as error:
            return str(error)
        if not frames.any():
            return "has no events"
        frames_checksum = hashlib.sha256(frames.astype("<i4").tobytes()).hexdigest()[:_DIGITS]
        return Checksums(content_checksum(frames), frames_checksum)

    for name, found in zip(left, in_threads(inspect, left, workers, "checking frames"), strict=True):
        if isinstance(found, Checksums):
            good[name] = found
        else:
            bad.append(BadFile(paths[name], found, name))
    if record is not None and left and os.access(record.parent, os.W_OK):
        _write_record(record, {name: (stamps[name], good[name]) for name in paths if name in good})
    return good, bad


def _stamp(path: Path) -> tuple[int, int]:
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    return -1, -1


def _read_record(path: Path) -> dict[str, tuple[tuple[int, int], Checksums]]:
    found = {}
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines():
            size, changed, content, frames, name = line.split(" ", 4)
            found[name] = (int(size), int(changed)), Checksums(content, frames)
    return found


def _write_record(path: Path, samples: Mapping[str, tuple[tuple[int, int], Checksums]]) -> None:
    lines = [f"{s} {changed} {i.content} {i.frames} {name}\n" for name, ((s, changed), i) in samples.items()]
    write_text(path, "".join(lines))


def listing(bad: Sequence[BadFile]) -> str:
    """All of them, a line each."""
    return "".join(f"\n  {file}" for file in sorted(bad))

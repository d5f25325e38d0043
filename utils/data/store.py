"""Packed frames: all samples of one part of a split in one file, mapped into memory, a sample decoded when it is read.

    magic (8 bytes) | header (JSON, padded to 1016 bytes) | SHA-256 of header and table (32 bytes)
    table: offset of every sample and of the end (8 bytes each), CRC-32 of every sample (4 bytes each)
    the samples, as utils/data/packing.py encodes them

Numbers are little-endian. The header tells T, size, split, number of samples, type of the counts, and a checksum of
the names, labels and contents of the samples: a store of anything else is not opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.packing import count_type, decode_counts, encode_counts
from utils.errors import DataError
from utils.files import partial_of

__all__ = ["Contents", "Packed", "Store", "damage", "open_store", "pack", "write_store"]

_MAGIC = b"EVFRAME1"
_HEADER = 1016
_TABLE_AT = len(_MAGIC) + _HEADER + hashlib.sha256().digest_size


@dataclass(frozen=True)
class Contents:
    """What a store must hold to be the one that is wanted."""

    T: int
    height: int
    width: int
    part: str  # train or test
    split: str  # fingerprint
    count: int
    samples: str  # checksum of names, labels and contents


@dataclass(frozen=True)
class Packed:
    """One sample, ready to be written."""

    data: bytes
    largest: int  # count


def pack(frames: np.ndarray) -> Packed:
    """Encode the counts ``[T, 2, H, W]`` of a sample."""
    return Packed(encode_counts(frames), int(frames.max(initial=0)))


def write_store(path: Path, contents: Contents, samples: Iterable[Packed]) -> None:
    """Write beside, flush to the disk, rename: a kill at any moment leaves the old file, the new one, or none.

    Raises:
        OSError: no room, or the folder cannot be written to.
    """
    beside = partial_of(path)
    offsets, checksums, largest = np.zeros(contents.count + 1, "<u8"), np.zeros(contents.count, "<u4"), 0
    position = _TABLE_AT + offsets.nbytes + checksums.nbytes
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with beside.open("wb") as file:
            file.seek(position)
            for number, sample in enumerate(samples):
                offsets[number], checksums[number] = position, zlib.crc32(sample.data)
                position += file.write(sample.data)
                largest = max(largest, sample.largest)
            offsets[-1] = position
            header = json.dumps({**asdict(contents), "dtype": count_type(largest).name}).encode().ljust(_HEADER)
            table = offsets.tobytes() + checksums.tobytes()
            file.seek(0)
            file.write(_MAGIC + header + hashlib.sha256(header + table).digest() + table)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def open_store(path: Path, contents: Contents) -> Store | None:
    """The store in this file; None where there is none, or one of something else, or a damaged one."""
    store = _open(path)
    return store if store is not None and store.contents == contents else None


def damage(path: Path) -> str:
    """What is wrong with a store, every sample of it read; empty where nothing is."""
    store = _open(path)
    if store is None:
        return "is no whole store of packed frames; it is made again when it is needed"
    try:
        for index in range(len(store)):
            _ = store[index]
    except DataError as error:
        return str(error)
    return ""


def _open(path: Path) -> Store | None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_TABLE_AT)
            header = head[len(_MAGIC) : len(_MAGIC) + _HEADER]
            described: Any = json.loads(header) if head.startswith(_MAGIC) else None
            count = described.get("count") if isinstance(described, dict) else None
            if not isinstance(count, int) or not 0 <= 12 * count + 8 <= size - _TABLE_AT:
                return None
            table = file.read(12 * count + 8)
        if hashlib.sha256(header + table).digest() != head[-hashlib.sha256().digest_size :]:
            return None
        dtype = np.dtype(str(described.pop("dtype")))
        contents = Contents(**described)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    offsets = np.frombuffer(table, "<u8", contents.count + 1)
    checksums = np.frombuffer(table, "<u4", offset=offsets.nbytes)
    if size != int(offsets[-1]):
        return None
    return Store(path, contents, dtype, offsets, checksums)


@dataclass
class Store:
    """An open store; ``store[index]`` gives the counts ``[T, 2, H, W]`` of a sample in the smallest integer type.

    Every process maps the file when it first reads; the mapping does not travel to other processes.
    """

    path: Path
    contents: Contents
    dtype: np.dtype
    offsets: np.ndarray
    checksums: np.ndarray
    _map: mmap.mmap | None = None

    def __len__(self) -> int:
        return self.contents.count

    def __getitem__(self, index: int) -> np.ndarray:
        """Raises DataError where the bytes are not those that were written."""
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = self._map[int(self.offsets[index]) : int(self.offsets[index + 1])]
        if zlib.crc32(data) != self.checksums[index]:
            raise DataError(
                f"packed frames {self.path} are damaged (checksum of sample {index}); delete the file to have it made "
                "again"
            )
        contents = self.contents
        return decode_counts(data, (contents.T, 2, contents.height, contents.width), self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

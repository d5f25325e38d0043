"""Packed frames: all samples of one part of a split in one array of blosc2, a sample decoded when it is read.

The file is what ``blosc2.open(path)[index]`` reads: ``[samples, T, 2, H, W]``, a chunk a sample. With it are stored
what it holds (``vlmeta["contents"]``) and the CRC-32 of each chunk (``vlmeta["checksums"]``). Behind the array stand
its number of bytes that are no chunks (8 bytes, little-endian) and their SHA-256: nothing is decoded, nor looked into
by blosc2, that is not what was written.

Of blosc2 (zstd, bits shuffled) and h5py (gzip, Fletcher-32) blosc2 is the faster and smaller: 11 to 22 times as fast to
read as SpikingJelly's ``.npz``, against 3 to 8 times (``python tools/benchmark.py data``, two cores of an AMD EPYC VM).
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import DataError
from utils.files import create, is_plain_file, partial_of

__all__ = ["Contents", "Store", "count_type", "damage", "encode", "open_store", "write_store"]

_TYPES = (np.uint8, np.int16, np.int32)  # those that torch computes with
_HEAD = 4096  # bytes, in which the header of the array lies
_FOOT = struct.Struct("<Q32s")
_EMPTY_CHUNK = 32  # bytes of a chunk that blosc2 keeps in its table: one value, repeated


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
    dtype: str  # of the frames, a type of numpy

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``[T, 2, H, W]``, of one sample."""
        return self.T, 2, self.height, self.width


def count_type(largest: int) -> np.dtype:
    """The smallest integer type that holds all counts up to ``largest``: uint8, int16 or int32.

    Raises:
        OverflowError: none does.
    """
    for candidate in _TYPES:
        if largest <= np.iinfo(candidate).max:
            return np.dtype(candidate)
    raise OverflowError(f"a count of {largest} does not fit into 32 bits")


def encode(frames: np.ndarray, dtype: str) -> bytes:
    """Encode the frames ``[T, 2, H, W]`` of a sample as numbers of this type, which must hold them."""
    import blosc2  # takes 0.2 s to import, and only packed frames need it

    frames = np.ascontiguousarray(frames, dtype)
    return blosc2.compress2(frames, typesize=frames.itemsize, **_parameters(blosc2, frames))


def _parameters(blosc2: Any, frames: np.ndarray) -> dict[str, Any]:
    filters = {"filters": [blosc2.Filter.BITSHUFFLE], "filters_meta": [0]}
    return {"codec": blosc2.Codec.ZSTD, "clevel": 5, "nthreads": 1, "blocksize": frames.nbytes, **filters}


def write_store(path: Path, contents: Contents, samples: Iterable[bytes]) -> None:
    """Write packed samples beside, flush to the disk, rename: a kill at any moment leaves the old file or the new one.

    Raises:
        OSError: no room, or the folder cannot be written to.
        DataError: the name of the folder is no UTF-8.
    """
    import blosc2

    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # blosc2 takes no other names
        raise DataError(
            f"packed frames {path} need a name and a locale in UTF-8; rename the folder, or set LC_ALL=C.UTF-8"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    create(partial).close()
    try:
        one = np.empty(contents.shape, contents.dtype)
        array = blosc2.empty(
            (contents.count, *one.shape), one.dtype, chunks=(1, *one.shape), blocks=(1, *one.shape), mode="w",
            urlpath=str(partial), contiguous=True, cparams=_parameters(blosc2, one), dparams={"nthreads": 1},
        )  # fmt: skip
        checksums, stored = np.zeros(contents.count, "<u4"), 0
        for index, sample in enumerate(samples):
            array.schunk.update_chunk(index, sample)
            checksums[index] = zlib.crc32(array.schunk.get_chunk(index))  # of an empty one it is not ``sample``
            stored += len(sample) if len(sample) > _EMPTY_CHUNK else 0
        array.schunk.vlmeta["contents"] = asdict(contents)
        array.schunk.vlmeta["checksums"] = checksums.tobytes()
        with partial.open("r+b") as file:
            length = file.seek(0, os.SEEK_END)
            file.write(_FOOT.pack(length - stored, _digest(file, length, length - stored)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except RuntimeError as error:  # how blosc2 reports what the system refuses
        raise OSError(errno.EIO, f"cannot be written, perhaps there is no room ({error})", str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def _digest(file: Any, length: int, others: int) -> bytes:
    """Of the header and of everything behind the chunks (and of some bytes of chunks)."""
    digest = hashlib.sha256()
    file.seek(0)
    digest.update(file.read(min(_HEAD, length)))
    file.seek(length - others)
    digest.update(file.read(others))
    file.seek(length)
    return digest.digest()


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
    import blosc2

    try:
        if not is_plain_file(path):
            return None
        with path.open("rb") as file:
            length = file.seek(0, os.SEEK_END) - _FOOT.size
            file.seek(max(length, 0))
            others, digest = _FOOT.unpack(file.read())
            if not 0 <= others <= length or _digest(file, length, others) != digest:
                return None
        array = blosc2.open(str(path), mode="r")
        contents = Contents(**array.schunk.vlmeta["contents"])
        checksums = np.frombuffer(array.schunk.vlmeta["checksums"], "<u4")
    except (OSError, struct.error, RuntimeError, ValueError, TypeError, KeyError):  # of another version
        return None
    return Store(path, contents, checksums)


@dataclass
class Store:
    """An open store; ``store[index]`` gives the frames ``[T, 2, H, W]`` of a sample.

    Every process opens the file when it first reads.
    """

    path: Path
    contents: Contents
    checksums: np.ndarray
    _array: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.contents.count

    def __getitem__(self, index: int) -> np.ndarray:
        """Raises DataError where the bytes are not those that were written."""
        import blosc2

        index = range(len(self))[index]
        frames = np.empty(self.contents.shape, self.contents.dtype)
        try:
            if self._array is None:
                self._array = blosc2.open(str(self.path), mode="r")
            chunk = self._array.schunk.get_chunk(index)
        except (OSError, RuntimeError) as error:
            raise DataError(f"packed frames {self.path} cannot be read ({error})") from error
        if zlib.crc32(chunk) != self.checksums[index]:
            raise DataError(
                f"packed frames {self.path} are damaged (checksum of sample {index}); delete the file to have it made "
                "again"
            )
        blosc2.decompress2(chunk, dst=frames, nthreads=1)
        return frames

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}

"""Event counts as few bytes that decode fast: most pixels of a frame are 0, most of the others 1 or 2.

A sample is laid out as

1. every count cut to at most 3 and packed, four pixels a byte;
2. of these bytes only those above 0, and a bitmap that tells which; of the bitmap the same, and so on, coarsest first;
3. what was cut off: the distance to the pixel before, one byte each (255: in a list of its own), and the excess.

Decoding needs no loop over pixels: bytes become pixels by a table. (Of 1, 2, 4 and 8 bits a pixel, 2 is the one that is
both small and fast from sparse to dense recordings: `python tools/benchmark.py data`.)
"""

from __future__ import annotations

import struct

import numpy as np

__all__ = ["count_type", "decode_counts", "encode_counts"]

_HEAD = struct.Struct("<III")  # bytes of an excess, number of excesses, number of long distances
_MOST = 3  # of a pixel in a packed byte
_SHIFTS = np.arange(0, 8, 2)
_LONG = 255
_SMALLEST_BITMAP = 64  # bytes
_TYPES = (np.uint8, np.int16, np.int32)  # those that torch computes with

# The four pixels of each byte, as one number of four bytes.
_PIXELS = ((np.arange(256)[:, None] >> _SHIFTS) & _MOST).astype(np.uint8).view(np.uint32).reshape(-1)


def count_type(largest: int) -> np.dtype:
    """The smallest integer type that holds all counts up to ``largest``: uint8, int16 or int32.

    Raises:
        OverflowError: none does.
    """
    for candidate in _TYPES:
        if largest <= np.iinfo(candidate).max:
            return np.dtype(candidate)
    raise OverflowError(f"a count of {largest} does not fit into 32 bits")


def encode_counts(counts: np.ndarray) -> bytes:
    """Encode whole numbers from 0 to 2**31 - 1, of any shape; the shape is not stored."""
    flat = counts.reshape(-1)
    cut = np.zeros((-(-flat.size // 4), 4), np.uint8)
    np.minimum(flat, _MOST, out=cut.reshape(-1)[: flat.size], casting="unsafe")
    packed = (cut << _SHIFTS).sum(1, dtype=np.uint8)
    sections = []
    for _ in _sizes(flat.size)[1:]:
        there = packed > 0
        sections.append(packed[there])
        packed = np.packbits(there)
    places = np.flatnonzero(flat > _MOST)
    gaps = np.diff(places, prepend=0)
    long_ones = gaps[gaps >= _LONG].astype("<u4")
    excess = flat[places].astype(np.int64) - _MOST
    width = 1 if excess.max(initial=0) < 2**8 else 2 if excess.max() < 2**16 else 4
    sections = [packed, *reversed(sections), np.minimum(gaps, _LONG).astype(np.uint8), long_ones]
    head = _HEAD.pack(width, places.size, long_ones.size)
    return b"".join((head, *(section.tobytes() for section in sections), excess.astype(f"<u{width}").tobytes()))


def decode_counts(encoded: bytes | memoryview, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """The counts that :func:`encode_counts` was given, in ``shape`` and ``dtype``.

    ``encoded`` must be whole: its checksum is the business of whoever stores it.
    """
    size = int(np.prod(shape))
    width, excesses, long_ones = _HEAD.unpack_from(encoded)
    data = np.frombuffer(encoded, np.uint8, offset=_HEAD.size)
    *finer, coarsest = _sizes(size)
    packed, data = data[:coarsest], data[coarsest:]
    for bytes_of_level in reversed(finer):
        there = np.flatnonzero(np.unpackbits(packed, count=bytes_of_level).view(bool))
        packed = np.zeros(bytes_of_level, np.uint8)
        packed[there] = data[: there.size]
        data = data[there.size :]
    counts = _PIXELS.take(packed, mode="clip").view(np.uint8)[:size].astype(dtype, copy=False)
    if excesses:
        gaps = data[:excesses].astype(np.int64)
        data = data[excesses:]
        gaps[gaps == _LONG] = np.frombuffer(data[: 4 * long_ones].tobytes(), "<u4")
        excess = np.frombuffer(data[4 * long_ones :].tobytes(), f"<u{width}")
        counts[np.cumsum(gaps)] += excess.astype(dtype)
    return counts.reshape(shape)


def _sizes(pixels: int) -> list[int]:
    """Bytes of the packed pixels, of the bitmap of these, of the bitmap of that ..., down to a small one."""
    sizes = [-(-pixels // 4)]
    while sizes[-1] > _SMALLEST_BITMAP:
        sizes.append(-(-sizes[-1] // 8))
    return sizes

"""Arrays out of ``.npy`` and ``.npz`` files, from many threads at once, and never a pickle."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import IO

import numpy as np

__all__ = ["read_array"]

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# numpy reads a header by Python's own parser. That of 3.11 counts its depth for all threads together, and now and then
# raises a SystemError on a sound file (python/cpython issue 106905). So: one header at a time.
_one_header = threading.Lock()


def read_array(
    file: IO[bytes], check: Callable[[tuple[int, ...], np.dtype], None] = lambda shape, dtype: None
) -> np.ndarray:
    """Read the array of an open ``.npy`` file, or of one inside an ``.npz``, whose checksum is compared.

    Args:
        check: called with shape and type before the rest is read; it raises what it does not want.

    Returns:
        The array; it cannot be written to.

    Raises:
        Exception: of many types, where the file is damaged; ValueError where it holds objects.
    """
    with _one_header:
        shape, by_columns, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
    check(shape, dtype)
    if min(shape, default=0) < 0:
        raise ValueError(f"the shape {shape} has a negative size")
    count = math.prod(shape)
    values = np.frombuffer(file.read(count * dtype.itemsize), dtype, count)  # no more than the header says
    file.read(1)  # the end, where zipfile compares its checksum
    return values.reshape(shape[::-1]).T if by_columns else values.reshape(shape)

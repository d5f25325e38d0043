"""Work shared among threads, each of which runs whole operations, and memory for what is in between.

Torch shares one operation among its threads. Small operations do not share well, and what is summed then depends on the
number of threads. Here every thread takes operations of its own, so the result is the same for any number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier, get_ident
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Rooms", "empty", "share"]


def share(work: Callable[[Any], Any], parts: Sequence[Any]) -> list[Any]:
    """``[work(part) for part in parts]`` without gradients, on as many threads as torch may use."""
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def alone(part: Any) -> Any:  # modes belong to a thread
        with torch.inference_mode(inference), torch.no_grad():
            return work(part)

    return list((map if threads == 1 else _pool(os.getpid(), threads).map)(alone, parts))


@cache
def _pool(process: int, count: int) -> ThreadPoolExecutor:
    """``count`` threads, in each of which torch uses one. A forked process needs its own."""
    started = Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # asked for the first time, a thread takes the number of the process
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count, "fast", start)
    for _ in range(count):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(count)  # what the threads set is the number of the process, too
    return pool


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    """``torch.empty`` by NumPy, which asks the system for large pages: several times cheaper to use than small ones."""
    return torch.from_numpy(np.empty(shape, np.float32 if dtype == torch.float32 else np.float64))


class Rooms:
    """Memory by name and thread, used again and again by one call: fresh memory is dear."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.kept: dict[tuple[str, int], Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """A tensor of this shape, whose values are those of the last use."""
        key, size = (name, get_ident()), math.prod(shape)
        if key not in self.kept or len(self.kept[key]) < size:
            self.kept[key] = empty(self.dtype, size)
        return self.kept[key][:size].view(shape)

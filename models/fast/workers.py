"""Work shared among threads that run operations of their own, and memory for what is in between.

Torch shares one operation among its threads. Small operations do not share well, and what they sum in which order can
depend on the number of threads. Here every operation has one thread, so results are the same for any number.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["empty", "in_order", "room", "share"]


def share(work: Callable[[Any], Any], parts: Sequence[Any]) -> list[Any]:
    """``[work(part) for part in parts]`` without gradients, on as many threads as torch may use."""
    return list(in_order(work, parts))


def in_order(work: Callable[[Any], Any], parts: Sequence[Any]) -> Iterator[Any]:
    """As :func:`share`, but results come as soon as they are there. What takes them has one thread, too."""
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def alone(part: Any) -> Any:  # modes belong to a thread
        with torch.inference_mode(inference), torch.no_grad():
            return work(part)

    if threads == 1:
        yield from map(alone, parts)
        return
    results = _pool(os.getpid(), threads).map(alone, parts)
    torch.set_num_threads(1)
    try:
        yield from results
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(process: int, count: int) -> ThreadPoolExecutor:
    """``count`` threads, in each of which torch uses one. A forked process needs its own."""
    started = threading.Barrier(count + 1)

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
    """``torch.empty`` by NumPy, which asks the system for large pages: several times cheaper than small ones."""
    return torch.from_numpy(np.empty(shape, np.float32 if dtype == torch.float32 else np.float64))


_rooms = threading.local()


def room(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Memory of this thread that stays: its values are those of the last use under this name. Fresh memory is dear."""
    rooms, key, size = vars(_rooms), f"{name} {dtype}", math.prod(shape)
    if key not in rooms or len(rooms[key]) < size:
        rooms.pop(key, None)
        with torch.inference_mode(False):  # it serves training, too
            rooms[key] = empty(dtype, size)
    return rooms[key][:size].view(shape)

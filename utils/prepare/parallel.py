"""The same work on many files: in threads, results in order, under a progress bar."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from tqdm import tqdm

__all__ = ["in_threads"]

Item, Result = TypeVar("Item"), TypeVar("Result")

_AHEAD = 4  # results for each worker that may wait to be taken


def in_threads(work: Callable[[Item], Result], items: Sequence[Item], workers: int, what: str) -> Iterator[Result]:
    """``work(item)`` for every item, in order; an error of one ends it all.

    Threads, not processes: numpy and zlib leave Python free while they work, a killed program leaves none behind, and
    the lock on the folder ends with the program.

    Args:
        workers: how many at a time.
        what: in front of the progress bar, which is shown in a terminal only.
    """
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(items), desc=what, unit="sample", dynamic_ncols=True, disable=None) as bar,
    ):
        left = iter(items)
        waiting = deque(pool.submit(work, item) for item in islice(left, _AHEAD * workers))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(work, item) for item in islice(left, 1))
                bar.update()
                yield result
        finally:
            for future in waiting:
                future.cancel()

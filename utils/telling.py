"""One message where a run of several processes ends: the process that is first to ask says why."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

__all__ = ["is_first_to_tell", "launcher_keeps_store", "meeting_place", "wait_until_told"]

_PATIENCE = 3.0  # seconds
_KEY = "run ends"


def launcher_keeps_store() -> bool:
    """Whether the store is torchrun's, which outlives the processes of the run; otherwise the first process has it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def meeting_place(seconds: float) -> tuple[Store, int, int]:
    """The store where the processes of the run find each other, the rank and the number of processes.

    Raises:
        RuntimeError, ValueError: nobody answers, or the environment is not that of a launcher.
    """
    import torch.distributed as dist  # takes a second to import: not for a mistake in a command line

    wait = timedelta(seconds=seconds)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=wait))
    store.set_timeout(wait)
    # A launcher that starts the processes anew (--max-restarts) keeps its store: addresses of the dead ones in it
    # must not be met again.
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store), rank, world_size


def is_first_to_tell(store: Store | None = None, last: int = 0) -> bool:
    """Whether this process says why the run ends; from here on SIGTERM does not keep it from that.

    Args:
        store: that of the run; None before the processes are joined: then a launcher's is looked for.
        last: where no store answers, processes up to this rank tell.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher sends it as soon as one of the processes ended
    asked: list[int] = []

    def ask() -> None:
        try:
            there = meeting_place(_PATIENCE)[0] if store is None else store
            asked.append(there.add(_KEY, 1))
        except (RuntimeError, ValueError):  # whoever has the store is gone
            pass

    if store is not None or launcher_keeps_store():
        # In a thread: the first process may have the store and stand still, and then it never answers.
        thread = Thread(target=ask, daemon=True)
        thread.start()
        thread.join(2 * _PATIENCE if store is None else _PATIENCE)
    return asked == [1] if asked else os.environ.get("RANK", "0") in map(str, range(last + 1))


def wait_until_told(store: Store, count: int) -> None:
    """In the process that has the store: wait, not for long, until ``count`` processes have asked who tells."""
    end = time.monotonic() + _PATIENCE
    while store.add(_KEY, 0) < count and time.monotonic() < end:
        time.sleep(0.01)

"""Stopping a run between two steps, on SIGTERM (a cluster takes the machine back) or SIGINT (ctrl-C)."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from threading import Thread
from types import FrameType
from typing import Any, TypeVar

from utils.distributed import largest_over_processes
from utils.errors import StopRequested

__all__ = ["StopSignal", "in_worker", "starting_workers"]

T = TypeVar("T")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_CAN_LISTEN = hasattr(signal, "sigwaitinfo")  # not on macOS


class StopSignal:
    """Remembers a signal until the step that is being computed is done. A second ctrl-C interrupts at once.

    with StopSignal() as stop:
        for batch in stop.watch(batches):
            ...
            if stop.agree(my_loss_is_not_finite):  # optional: a flag of the step, on the same exchange
                ...
    """

    def __init__(self) -> None:
        self.received = 0  # the number of the signal
        self._agreed: int | None = None  # that of any process; None until it is asked for in this step
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if error is not None:  # the run ends, and says why: a launcher's SIGTERM must not come first
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def agree(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process; all processes must ask, once a step.

        The signals travel along, so that a step needs one exchange between the processes.
        """
        found, received = largest_over_processes([flag, self.received])
        self._agreed = int(received)
        return bool(found)

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches; after the one during which any process got a signal, all processes stop.

        All processes must watch at the same time; their numbers of batches may differ where the body does not call
        :meth:`agree`. A signal that comes after the call stops the run one step later.

        Raises:
            StopRequested: when the body of the loop is through with a batch.
        """
        assert isinstance(batches, Sized)
        rounds = int(largest_over_processes([len(batches)])[0])
        source = iter(batches)
        for _ in range(rounds):
            self._agreed = None
            batch = next(source, None)
            if batch is not None:
                yield batch
            if self._agreed is None:
                self.agree(False)
            if self._agreed:
                raise StopRequested(self._agreed)


@contextmanager
def starting_workers() -> Iterator[None]:
    """Loader processes that are started meanwhile are born deaf to SIGTERM; :func:`in_worker` gives them an ear."""
    if not _CAN_LISTEN:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_worker(_: int) -> None:
    """In a loader process: leave stopping to the main process, and end when it says so.

    A cluster sends SIGTERM to all processes at once, and the main process still needs this one's batches. It sends
    SIGTERM itself when it leaves and does not want them: ignoring that would keep it waiting.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _CAN_LISTEN:
        Thread(target=_end_with_main_process, daemon=True).start()


def _end_with_main_process() -> None:
    main = multiprocessing.parent_process()
    while main is not None and signal.sigwaitinfo({signal.SIGTERM}).si_pid != main.pid:
        pass
    os._exit(0)

"""Stopping a run between two steps, on SIGTERM (a cluster takes the machine back) or SIGINT (ctrl-C)."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sized
from types import FrameType
from typing import Any, TypeVar

import torch

from utils.distributed import largest_over_processes
from utils.errors import StopRequested

__all__ = ["StopSignal", "in_worker"]

T = TypeVar("T")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Remembers a signal until the step that is being computed is done. A second ctrl-C interrupts at once.

        with StopSignal(device) as stop:
            for batch in stop.watch(batches):
                ...

    Args:
        device: where the processes of the run talk to each other.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.received = 0  # the number of the signal
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def watch(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches; after the one during which any process got a signal, all processes stop.

        All processes must watch at the same time; their numbers of batches may differ.

        Raises:
            StopRequested: when the body of the loop is through with a batch.
        """
        assert isinstance(batches, Sized)
        rounds = int(largest_over_processes(len(batches), self.device))
        source = iter(batches)
        for _ in range(rounds):
            batch = next(source, None)
            if batch is not None:
                yield batch
            received = int(largest_over_processes(self.received, self.device))
            if received:
                raise StopRequested(received)


def in_worker(_: int) -> None:
    """In a loader process: leave stopping to the main process, and die when it says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

"""Does a network use time? Its accuracy when the steps of its inputs are changed, paired per sample."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.analysis.inspection import Inspected
from utils.analysis.predictions import Collector, Predictions
from utils.analysis.statistics import mcnemar, paired_difference, wilson
from utils.data.events import EventFrames
from utils.data.loaders import make_loaders, sample_seed
from utils.distributed import Process
from utils.engine import evaluate
from utils.errors import UserError
from utils.logger import progress_bar
from utils.prepare.frames import resized

__all__ = ["CHANGES", "ChangedFrames", "change_table", "changed_accuracies", "check_time"]

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]
SEED = 0
DROPPED = (0.1, 0.25, 0.5, 0.75)  # share of the events
NOISE = (0.1, 0.5, 1.0)  # events added, as a share of the sample's


def shuffled(counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The steps in another order, never the same one."""
    T = len(counts)
    order = rng.permutation(T)
    while T > 1 and np.array_equal(order, np.arange(T)):
        order = rng.permutation(T)
    return counts[order]


def dropped(counts: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """Every event is lost with the probability ``share``."""
    return rng.binomial(counts, 1 - share)


def noisy(counts: np.ndarray, rng: np.random.Generator, share: float) -> np.ndarray:
    """``share`` times as many events as the sample has are added, anywhere with the same probability."""
    added = rng.integers(0, counts.size, round(share * int(counts.sum())))
    return counts + np.bincount(added, minlength=counts.size).reshape(counts.shape)


CHANGES: dict[str, Change] = {
    "steps shuffled": shuffled,
    "steps reversed": lambda counts, _: counts[::-1],
    "first step at all steps": lambda counts, _: np.broadcast_to(counts[:1], counts.shape),
    "mean of the steps at all steps": lambda counts, _: np.broadcast_to(counts.mean(0, keepdims=True), counts.shape),
    **{f"{100 * share:.0f} % of the events dropped": partial(dropped, share=share) for share in DROPPED},
    **{f"noise: {100 * share:.0f} % more events": partial(noisy, share=share) for share in NOISE},
}


@dataclass
class ChangedFrames(Dataset):
    """Test samples with changed counts of events, resized after the change.

    A draw depends on the change and on the sample alone, not on processes or batches.
    """

    test: EventFrames
    name: str
    change: Change

    def __post_init__(self) -> None:
        # The counts themselves: events cannot be dropped from resized frames.
        self._counts = replace(self.test, frame_size=self.test.sensor, store=None)

    def __len__(self) -> int:
        return len(self.test)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        frames, label = self._counts[index]
        rng = np.random.default_rng(sample_seed(SEED, self.name, index))
        changed = np.ascontiguousarray(self.change(frames.numpy().astype(np.int64), rng))
        if self.test.frame_size != self.test.sensor:
            return resized(changed, self.test.frame_size), label
        return torch.from_numpy(changed).float(), label


def check_time(inspected: Inspected) -> None:
    """Check that the steps of the inputs can be changed.

    Raises:
        UserError: the network is of images, or has one step.
    """
    _frames_with_time(inspected)


def _frames_with_time(inspected: Inspected) -> EventFrames:
    test = inspected.test
    if not isinstance(test, EventFrames):
        raise UserError("--time is for event data: the time steps of an image are all the same; leave it out")
    if test.T < 2:
        raise UserError("--time needs a network with at least 2 time steps, and this one has 1; leave it out")
    return test


def changed_accuracies(
    inspected: Inspected, process: Process, batch_size: int, num_workers: int, unchanged: Predictions
) -> list[dict[str, Any]]:
    """The accuracy under every change: the unchanged input first.

    Args:
        inspected: of event data.
        process: this process; all take part.
        batch_size, num_workers: of the loaders.
        unchanged: predictions for the same samples as they are.

    Returns:
        A row each: ``name``, ``acc1``, its 95 % interval ``low`` and ``high`` (Wilson), and but for the first
        ``change``, ``change_low``, ``change_high`` (percentage points, paired bootstrap) and ``p`` (McNemar, exact).
    """
    test = _frames_with_time(inspected)
    rows = [{"name": "as recorded", **_accuracy(unchanged.correct)}]
    for name, predictions in _predictions(test, inspected, process, batch_size, num_workers):
        before, after = unchanged.correct, predictions.correct
        change, low, high = (100 * value for value in paired_difference(before, after, seed=SEED))
        rows.append(
            {"name": name, **_accuracy(after), "change": change, "change_low": low, "change_high": high,
             "p": mcnemar(before, after)}
        )  # fmt: skip
    return rows


def _predictions(
    test: EventFrames, inspected: Inspected, process: Process, batch_size: int, num_workers: int
) -> Iterator[tuple[str, Predictions]]:
    for name, change in CHANGES.items():
        data = argparse.Namespace(train=None, val=None, test=ChangedFrames(test, name, change))
        *_, batches = make_loaders(data, batch_size, num_workers, 0, process)
        collector = Collector()
        evaluate(inspected.net, progress_bar(batches, name, process), collector, process.device, inspected.prepare)
        yield name, collector.result()


def _accuracy(correct: np.ndarray) -> dict[str, Any]:
    count, right = len(correct), int(correct.sum())
    low, high = wilson(right, count)
    return {"acc1": 100 * right / count, "low": 100 * low, "high": 100 * high, "correct": right, "count": count}


def change_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The rows of :func:`changed_accuracies` in words, a head first."""
    lines = [["input", "accuracy", "95 % interval", "change, points", "95 % interval", "McNemar p"]]
    for row in rows:
        accuracy = f"{row['acc1']:.2f} % ({row['correct']}/{row['count']})"
        cells = [row["name"], accuracy, f"{row['low']:.1f} to {row['high']:.1f} %"]
        if "change" in row:
            interval = f"{row['change_low']:+.1f} to {row['change_high']:+.1f}"
            lines.append([*cells, f"{row['change']:+.2f}", interval, f"{row['p']:.2g}"])
        else:
            lines.append([*cells, "", "", ""])
    return lines

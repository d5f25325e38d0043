"""What a network predicts for every sample of the test set, and what follows from it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.analysis.statistics import wilson
from utils.data.events import EventFrames
from utils.data.images import ImageSet
from utils.distributed import gather
from utils.prepare.datasets import sample_name

__all__ = ["Collector", "Predictions", "confusion_csv", "csv_text", "in_order", "predictions_csv", "sample_path"]


@dataclass(frozen=True)
class Predictions:
    """Of every sample, in the order of the test set.

    Attributes:
        true, predicted: labels ``[N]``.
        score: output of the network for the predicted class, averaged over T, ``[N]``.
    """

    true: np.ndarray
    predicted: np.ndarray
    score: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """Whether each sample is correct, ``[N]`` bool."""
        return self.true == self.predicted

    def confusion(self, classes: int) -> np.ndarray:
        """How many samples of a class (row) were predicted as another (column), ``[K, K]``."""
        return np.bincount(self.true * classes + self.predicted, minlength=classes**2).reshape(classes, classes)

    def of_classes(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Accuracy of every class with its 95 % interval (Wilson), in percent."""
        rows = []
        for label, name in enumerate(classes):
            of_class = self.correct[self.true == label]
            correct, count = int(of_class.sum()), len(of_class)
            low, high = wilson(correct, count)
            acc1 = 100 * correct / count if count else None
            rows.append(
                {"class": name, "count": count, "correct": correct, "acc1": acc1, "low": 100 * low, "high": 100 * high}
            )
        return rows


class Collector:
    """Collects predictions during :func:`utils.engine.evaluate`, whose criterion it is.

    Every process sees every ``world_size``-th sample, as :func:`utils.data.loaders.make_loaders` deals them.
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Take a batch: logits ``[T, B, K]`` or ``[B, K]`` and labels ``[B]``; the loss is 0."""
        scores = logits.mean(0) if logits.ndim == 3 else logits
        predicted = scores.argmax(1)
        score = scores.gather(1, predicted[:, None])[:, 0]
        self._parts.append(torch.stack([labels.double(), predicted.double(), score.double()]))
        return logits.new_zeros(())

    def result(self) -> Predictions:
        """The predictions of all processes, on every process."""
        own = torch.cat(self._parts, 1).cpu().numpy() if self._parts else np.empty((3, 0))
        shares = gather(own)
        values = np.empty((3, sum(share.shape[1] for share in shares)))
        for rank, share in enumerate(shares):
            values[:, rank :: len(shares)] = share
        return Predictions(values[0].astype(int), values[1].astype(int), values[2])


def sample_path(test: EventFrames | ImageSet, index: int) -> Path:
    """The file of a test sample."""
    return Path((test.files if isinstance(test, EventFrames) else test.samples)[index][0])


def predictions_csv(found: Predictions, test: EventFrames | ImageSet, classes: Sequence[str]) -> str:
    """One row a sample: its name, true and predicted class, whether it is correct, and the score of the prediction."""
    rows = [
        [sample_name(sample_path(test, i)), classes[true], classes[predicted], int(true == predicted), f"{score:.8g}"]
        for i, (true, predicted, score) in enumerate(zip(found.true, found.predicted, found.score, strict=True))
    ]
    return csv_text([["sample", "true", "predicted", "correct", "score"], *rows])


def in_order(matrix: np.ndarray, classes: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """A confusion matrix and its classes as people order them: 2 before 10 where the names are numbers."""
    if not all(map(str.isdecimal, classes)):
        return matrix, list(classes)
    order = sorted(range(len(classes)), key=lambda label: int(classes[label]))
    return matrix[np.ix_(order, order)], [classes[label] for label in order]


def confusion_csv(matrix: np.ndarray, classes: Sequence[str]) -> str:
    """The confusion matrix ``[K, K]``: a row for each true class, a column for each predicted one."""
    return csv_text(
        [["true \\ predicted", *classes], *([name, *row] for name, row in zip(classes, matrix, strict=True))]
    )


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()

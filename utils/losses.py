"""Losses of the published recipes, mean over the batch: of logits over time ``[T, B, K]``, or of logits ``[B, K]``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cross_entropy", "mse_of_mean", "tet"]


def mse_of_mean(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error between the mean of the logits over T and the one-hot label."""
    mean = _at_least_float32(logits).mean(0)
    return F.mse_loss(mean, F.one_hot(labels, mean.shape[1]).to(mean))


def tet(logits: Tensor, labels: Tensor) -> Tensor:
    """Temporal efficient training: the mean over t of the cross-entropy of the logits at t.

    Source: Deng, Li, Zhang, Gu, "Temporal Efficient Training of Spiking Neural Network via Gradient
    Re-weighting", ICLR 2022: L_TET alone, without the MSE term that the authors add to it.
    """
    T, B = logits.shape[:2]
    return F.cross_entropy(_at_least_float32(logits).reshape(T * B, -1), labels.repeat(T))


def cross_entropy(label_smoothing: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy of logits ``[B, K]`` with labels ``[B]`` or, after Mixup, with class probabilities ``[B, K]``."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(_at_least_float32(logits), targets, label_smoothing=label_smoothing)

    return loss


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))

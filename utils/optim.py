"""Around the optimiser: the learning rate over the epochs, and an average of the weights over the steps."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["averaged", "cosine_one_epoch_late"]


def cosine_one_epoch_late(optimizer: torch.optim.Optimizer, epochs: int, warm_up: int = 0) -> LambdaLR:
    """The published ImageNet schedule, stepped once an epoch: epoch ``e`` of ``E`` trains at
    ``0.5 * lr * (1 + cos(pi * e / E))``, so the first one below ``lr`` and the last one at 0.

    Args:
        optimizer: its learning rate is ``lr``.
        epochs: E, with the warm-up.
        warm_up: W. The first W epochs rise: epoch ``e`` has ``lr * e / (W + 1)``. The others are the E - W epochs of
            the cosine.
    """

    def factor(epochs_done: int) -> float:
        epoch = epochs_done + 1
        if epoch <= warm_up:
            return epoch / (warm_up + 1)
        return 0.5 * (1 + math.cos(math.pi * (epoch - warm_up) / (epochs - warm_up)))

    return LambdaLR(optimizer, factor)


def averaged(net: nn.Module, decay: float, optimizer: torch.optim.Optimizer) -> nn.Module:
    """A network whose weights and buffers are the exponential moving average of those of ``net``, by timm.

    It is brought up to date after every step of ``optimizer`` (a step that the scaler skips does not count).
    """
    from timm.utils import ModelEmaV3  # takes seconds to import: only where it is wanted

    average = ModelEmaV3(net, decay=decay)
    optimizer.register_step_post_hook(lambda *_: average.update(net))
    return average.module

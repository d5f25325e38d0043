"""Around the optimiser: the learning rate over the epochs, and an average of the weights over the steps."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

__all__ = ["averaged", "cosine"]


def cosine(optimizer: torch.optim.Optimizer, epochs: int, warm_up: int = 0) -> LRScheduler:
    """A cosine from the learning rate to 0, stepped once an epoch.

    Args:
        epochs: of the whole schedule.
        warm_up: of these, the first so many rise in equal steps: epoch n has ``n / (warm_up + 1)`` of the rate.
    """
    falling = CosineAnnealingLR(optimizer, T_max=epochs - warm_up)
    if warm_up == 0:
        return falling
    rising = LinearLR(optimizer, start_factor=1 / (warm_up + 1), total_iters=warm_up)
    return SequentialLR(optimizer, [rising, falling], milestones=[warm_up])


def averaged(net: nn.Module, decay: float, optimizer: torch.optim.Optimizer) -> nn.Module:
    """A network whose weights and buffers are the exponential moving average of those of ``net``, by timm.

    It is brought up to date after every step of ``optimizer`` (a step that the scaler skips does not count).
    """
    from timm.utils import ModelEmaV3  # takes seconds to import: only where it is wanted

    average = ModelEmaV3(net, decay=decay)
    optimizer.register_step_post_hook(lambda *_: average.update(net))
    return average.module

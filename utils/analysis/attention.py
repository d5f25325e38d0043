"""The weights that SMA computes, over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from models import SMA
from models.neurons import reset_net

__all__ = ["mean_weights", "watch_attention"]


@torch.inference_mode()
def watch_attention(
    net: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    device: torch.device,
    see: Callable[[str, Tensor, Tensor], None],
) -> int:
    """Show the weights of every SMA for every batch.

    Args:
        net: in evaluation mode.
        batches: pairs of samples and labels.
        prepare: samples and labels on the device to the inputs of the network.
        device: where ``net`` is.
        see: gets the name of an SMA, its time weights ``[S, T, B]`` and its channel weights ``[S, T, B, C]``.

    Returns:
        The number of samples.
    """
    modules = {name: module for name, module in net.named_modules() if isinstance(module, SMA)}

    def observe(name: str, w_time: Tensor, w_channel: Tensor, _replaced: Tensor | None) -> None:
        per_step = w_channel if w_channel.ndim == 4 else w_channel[:, None].expand(-1, w_time.shape[1], -1, -1)
        see(name, w_time.double(), per_step.double())

    for name, module in modules.items():
        module.observer = partial(observe, name)
    count = 0
    try:
        for samples, labels in batches:
            inputs, _ = prepare(samples.to(device), labels)
            net(inputs)
            reset_net(net)
            count += len(labels)
    finally:
        for module in modules.values():
            module.observer = None
    return count


def mean_weights(
    net: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    device: torch.device,
) -> dict[str, Tensor]:
    """The mean of ``w_T w_C`` over the samples, by which every SMA weighs its branches: its name to ``[S, T, C]``.

    Arguments: see :func:`watch_attention`.
    """
    sums: dict[str, Tensor] = {}

    def see(name: str, w_time: Tensor, w_channel: Tensor) -> None:
        sums[name] = sums.get(name, 0) + (w_time[..., None] * w_channel).sum(2)

    count = watch_attention(net, batches, prepare, device, see)
    return {name: (total / count).float().cpu() for name, total in sums.items()}

"""Where a network spikes on one sample."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from models.neurons import reset_net
from utils.errors import UserError

__all__ = ["in_grey", "predict", "spike_maps"]

_MOST_LAYERS = 6


@torch.inference_mode()
def spike_maps(net: nn.Module, inputs: Tensor, wanted: list[str] | None) -> dict[str, np.ndarray]:
    """Where a network spikes on one sample: name of a layer to the share of its channels that spike, ``[T, h, w]``.

    Args:
        net: in evaluation mode.
        inputs: of one sample.
        wanted: names of neuron layers; None: those outside SMA that have a map, at most six, evenly spread.

    Raises:
        UserError: a name is no layer with a map.
    """
    maps: dict[str, np.ndarray] = {}
    handles = []

    def keep(name: str, _module: nn.Module, _inputs: tuple[Tensor, ...], spikes: Tensor) -> None:
        if spikes.ndim == 5:  # [T, 1, C, h, w]
            maps[name] = spikes[:, 0].float().mean(1).cpu().numpy()

    for name, module in net.named_modules():
        if hasattr(module, "v_threshold"):
            handles.append(module.register_forward_hook(partial(keep, name)))
    try:
        net(inputs)
    finally:
        for handle in handles:
            handle.remove()
        reset_net(net)
    if wanted is None:
        outside = [name for name in maps if ".S_Convs." not in name]
        chosen = np.unique(np.linspace(0, len(outside) - 1, min(_MOST_LAYERS, len(outside))).round().astype(int))
        wanted = [outside[i] for i in chosen]
    for name in wanted:
        if name not in maps:
            raise UserError(f"--layers {name} is no layer of neurons with a map; this network has {', '.join(maps)}")
    return {name: maps[name] for name in wanted}


@torch.inference_mode()
def predict(net: nn.Module, inputs: Tensor) -> int:
    """The class that a network in evaluation mode predicts for the inputs of one sample."""
    logits = net(inputs)
    reset_net(net)
    return int((logits.mean(0) if logits.ndim == 3 else logits).argmax(1))


def in_grey(sample: Tensor, T: int) -> np.ndarray:
    """A sample as grey pictures ``[T, H, W]``: where events are (polarities together), or an image, dark on white."""
    if sample.ndim == 4:
        return sample.sum(1).clamp(0, 1).numpy()
    return (1 - sample.float().mean(0) / 255).expand(T, -1, -1).numpy()

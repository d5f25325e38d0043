"""``SMA.forward`` made of two passes over the feature maps, and of convolutions that share their input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from einops import rearrange
from spikingjelly.activation_based import base
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .convolution import applies, branch_convolutions
from .dispatch import fires, functions_work, fuses, is_watched
from .passes import normalize_and_fire, weighted_sum

if TYPE_CHECKING:
    from ..sma import SMA, _Branch

__all__ = ["fast_forward", "in_sequence"]

Coded = tuple[Tensor, Tensor]  # features of a scale [T, B, C, H, W], and their mean over H and W [T, B, C]


def fast_forward(sma: SMA, x: Tensor) -> Tensor:
    """The same as the equations of ``sma`` on ``x`` ``[T, B, C, H, W]``, with the same numbers to rounding."""
    if _wants_channels_last(sma, x):
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
    branches = cast("list[_Branch]", list(sma.S_Convs))
    if sma.recompute and torch.is_grad_enabled() and functions_work(x):
        coded = [_encode_twice(branch, x) for branch in branches]
    else:
        coded = _encode(branches, x)
    features, means = zip(*coded, strict=True)
    g = torch.stack(means).sum(0)
    w_time, w_channel = sma.time_weights(g), sma.channel_weights(g)
    weights = w_time[..., None] * rearrange(w_channel, "s ... b c -> s (...) b c")
    replaced = sma.zoneout(w_time, w_channel)
    return weighted_sum(features, weights, replaced, are_spikes=all(fires(_neuron(branch)) for branch in branches))


def in_sequence(layers: nn.Sequential, x: Tensor) -> Tensor:
    """``layers(x)`` on ``[T, B, C, H, W]``, where a BatchNorm in a container and the neurons behind it are one pass."""
    if is_watched(layers):
        return nn.Sequential.forward(layers, x)
    todo = list(layers)
    while todo:
        layer = todo.pop(0)
        if isinstance(layer, nn.Sequential) and len(layer) == 1 and todo and fuses(layer[0], todo[0], x):
            x, _ = normalize_and_fire(x, layer[0], todo.pop(0))
        else:
            x = layer(x)
    return x


def _wants_channels_last(sma: SMA, x: Tensor) -> bool:
    """Whether the branches are faster so: depthwise ones on a CPU (some 3 times), half precision on a GPU."""
    if x.device.type == "cpu":
        return sma.groups == "channel"
    return x.is_cuda and torch.is_autocast_enabled("cuda")


def _encode(branches: list[_Branch], x: Tensor) -> list[Coded]:
    """What the branches make of ``x``. Where a hook watches one of them, all are called as the modules they are."""
    if any(map(is_watched, branches)):
        return [_with_mean(branch(x)) for branch in branches]
    return [_activate(branch, y) for branch, y in zip(branches, _convolutions(branches, x), strict=True)]


def _convolutions(branches: list[_Branch], x: Tensor) -> Iterator[Tensor]:
    """What the convolutions of the branches make of their common input, each ``[T, B, C, H, W]``."""
    flat, convs = x.flatten(0, 1), [branch.conv for branch in branches]
    weights = [conv.weight for conv in convs]
    plain = all(type(conv).forward is nn.Conv2d.forward and conv.groups == 1 for conv in convs)
    if plain and functions_work(flat, *weights) and applies(flat, weights, samples=len(x)):
        outputs: Iterable[Tensor] = branch_convolutions(flat, weights, [conv.bias for conv in convs])
    else:
        outputs = (conv(flat) for conv in convs)
    return (y.unflatten(0, x.shape[:2]) for y in outputs)


def _activate(branch: _Branch, y: Tensor) -> Coded:
    """Normalise ``y``, then the neurons or the ReLU."""
    if fuses(branch.bn, _neuron(branch), y):
        return normalize_and_fire(y, branch.bn, branch.lif)
    normalized = branch.bn(y.flatten(0, 1)).unflatten(0, y.shape[:2])
    return _with_mean(branch.lif(normalized) if hasattr(branch, "lif") else branch.act(normalized))


def _neuron(branch: _Branch) -> nn.Module | None:
    return getattr(branch, "lif", None)


def _with_mean(features: Tensor) -> Coded:
    return features, features.mean((-2, -1))


def _encode_twice(branch: _Branch, x: Tensor) -> Coded:
    """:func:`_encode` of one branch, of which nothing is kept: backward computes it again, from the same state."""
    contexts = nullcontext(), _SameState(branch)
    return checkpoint(lambda x: _encode([branch], x)[0], x, use_reentrant=False, context_fn=lambda: contexts)


class _SameState:
    """Every ``with`` block starts from the potentials of now, and leaves neurons and buffers as if it had not been."""

    def __init__(self, branch: _Branch):
        self.branch = branch
        self.neurons = [one for one in branch.modules() if isinstance(one, base.MemoryModule)]
        self.first = [dict(one._memories) for one in self.neurons]

    def __enter__(self) -> None:
        self.after = [dict(one._memories) for one in self.neurons]
        self.buffers = [buffer.clone() for buffer in self.branch.buffers()]
        self._remember(self.first)

    def __exit__(self, *_: object) -> None:
        self._remember(self.after)
        for buffer, value in zip(self.branch.buffers(), self.buffers, strict=True):
            buffer.copy_(value)
        del self.after, self.buffers

    def _remember(self, memories: list[dict[str, Any]]) -> None:
        for one, memory in zip(self.neurons, memories, strict=True):
            one._memories.update(memory)

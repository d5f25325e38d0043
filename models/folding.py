"""A network for evaluation, with BatchNorm inside the convolutions before it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

__all__ = ["folded"]


def folded(net: nn.Module) -> nn.Module:
    """A copy of ``net`` for evaluation in which a BatchNorm that follows a convolution is part of that convolution.

    The same function to rounding. ``net`` goes on as it was: the copy shares with it the parameters and buffers that
    folding leaves alone, and has new ones where it does not. The BatchNorm of an SMA branch with LIF neurons stays: it
    is part of what the neuron does with its input (``models.sma``). A network that someone watches with a hook is given
    back as it is; an observer of SMA sees the copy, too. Reset the neurons before.
    """
    if any(_is_watched(module) for module in net.modules()):
        return net
    observers = [module.observer for module in net.modules() if hasattr(module, "observer")]
    shared = {id(one): one for one in [*net.parameters(), *net.buffers(), *observers]}
    net = copy.deepcopy(net, memo=shared).eval()
    for parent in list(net.modules()):
        for first, name in _in_a_row(parent):
            conv, bn = _only(first, nn.Conv2d), _only(getattr(parent, name), _BatchNorm)
            if conv is None or bn is None or bn.running_mean is None:
                continue
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
            )
            setattr(parent, name, nn.Identity())
    return net


def _in_a_row(parent: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Children of which the second, by its name, takes what the first gives."""
    if isinstance(parent, nn.Sequential) or isinstance(getattr(parent, "act", None), nn.ReLU):  # a ReLU branch of SMA
        names = [name for name, _ in parent.named_children()]
        yield from zip(parent.children(), names[1:], strict=False)


def _only(module: nn.Module, kind: type[nn.Module]) -> nn.Module | None:
    """The module, or the only one inside it, where it is of that kind."""
    leaves = [leaf for leaf in module.modules() if not any(leaf.children())]
    return leaves[0] if len(leaves) == 1 and isinstance(leaves[0], kind) else None


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)

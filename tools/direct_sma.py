"""SMA as its equations stand, with SpikingJelly's own neurons: the oracle and the baseline of tools/benchmark.py.

Slow and readable: every tensor of the equations is made, the scales are stacked, AZO is a clone and index writes, and
autograd records it all.
"""

from __future__ import annotations

import copy

import torch
from einops import rearrange, reduce
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn

from models import SMA
from models.neurons import Rectangle

__all__ = ["PublishedNeuron", "as_direct", "direct_zoneout"]


class _DirectSMA(SMA):
    """Coding, squeeze, weights, AZO and fusion, one after the other; the light form where a channel weight has no T."""

    def forward(self, x: Tensor) -> Tensor:
        features = torch.stack([branch(x) for branch in self.S_Convs])  # [S, T, B, C, H, W]
        g = reduce(features.sum(0), "t b c h w -> t b c", "mean")
        w_time, w_channel = _time_weights(self, g), _channel_weights(self, g)
        per_step = w_channel if w_channel.ndim == 4 else rearrange(w_channel, "s b c -> s 1 b c")
        z = rearrange(w_time, "s t b -> s t b 1 1 1") * rearrange(per_step, "s t b c -> s t b c 1 1") * features
        if self.AZO and self.training:
            z = direct_zoneout(z, w_time, w_channel, self.RTR, self.RCR)
        return z.sum(0)


def _time_weights(sma: SMA, g: Tensor) -> Tensor:
    """``[S, T, B]``: the 1x1x1 convolutions as they are stored, with T in the place of the channels."""
    hidden = torch.relu(sma.T_before_attention_conv(reduce(g, "t b c -> b t 1 1 1", "mean")))
    scores = torch.stack([conv(hidden) for conv in sma.T_after_attention_convs])
    return rearrange(scores.softmax(0), "s b t 1 1 1 -> s t b")


def _channel_weights(sma: SMA, g: Tensor) -> Tensor:
    """``[S, T, B, C]``, in the light form ``[S, B, C]``."""
    light = sma.C_before_attention_conv.weight.ndim == 5
    g = reduce(g, "t b c -> b c 1 1 1", "mean") if light else rearrange(g, "t b c -> (t b) c 1 1")
    hidden = torch.relu(sma.C_before_attention_conv(g))
    weights = torch.stack([conv(hidden) for conv in sma.C_after_attention_convs]).softmax(0)
    return weights.flatten(2) if light else rearrange(weights, "s (t b) c 1 1 -> s t b c", t=sma.time)


def direct_zoneout(z: Tensor, w_time: Tensor, w_channel: Tensor, RTR: int, RCR: int) -> Tensor:
    """Attention ZoneOut on ``z`` ``[S, T, B, C, H, W]`` by index, scale by scale; called as ``attention_zoneout``."""
    S, T, _, C = z.shape[:4]
    out = z.clone()
    for s in range(S):
        steps = w_time[s].sum(1).topk(T // RTR, largest=False).indices
        of_steps = w_channel[s, steps].sum((0, 1)) if w_channel.ndim == 4 else w_channel[s].sum(0)
        channels = of_steps.topk(C // RCR, largest=False).indices
        steps = steps[steps > 0]  # step 0 has no predecessor
        out[s, steps[:, None], :, channels] = z[s, steps[:, None] - 1, :, channels]
    return out


class PublishedNeuron(nn.Module):
    """The neuron of ImageNet as a Python loop over the steps, all of it recorded by autograd.

    ``u_t = 0.25 u_{t-1} (1 - s_{t-1}) + x_t``, ``s_t = [u_t >= 0.5]``; written from the equation.
    """

    def __init__(self):
        super().__init__()
        self.spike = Rectangle()

    def forward(self, x: Tensor) -> Tensor:
        u = s = torch.zeros_like(x[0])
        spikes = []
        for step in x:
            u = 0.25 * u * (1 - s.detach()) + step
            s = self.spike(u - 0.5)
            spikes.append(s)
        return torch.stack(spikes)


def as_direct(net: nn.Module) -> nn.Module:
    """A copy of ``net`` with the same weights, SMA by its equations, and neurons by SpikingJelly or their equation."""
    net = copy.deepcopy(net)
    for module in list(net.modules()):
        if isinstance(module, SMA):
            module.__class__ = _DirectSMA
        for name, child in list(module.named_children()):
            if isinstance(child, neuron.LIFNode):
                setattr(module, name, _direct_neuron(child))
    return net


def _direct_neuron(node: neuron.LIFNode) -> nn.Module:
    if isinstance(node.surrogate_function, Rectangle):
        return PublishedNeuron()
    same = {key: getattr(node, key) for key in ("tau", "decay_input", "v_threshold", "v_reset", "detach_reset")}
    return neuron.LIFNode(**same, surrogate_function=surrogate.ATan(), step_mode="m")

"""Spiking Multiscale Attention (SMA) and Attention ZoneOut (AZO), as equations.

Shan, Zhang, Zhu, Qiu, Eshraghian, Qu, "Advancing Spiking Neural Networks Towards Multiscale Spatiotemporal
Interaction Learning", AAAI 2025, https://doi.org/10.1609/aaai.v39i2.32141. The steps (1) to (5) are those of the paper.

This file is complete alone: copy it into any project that has torch, einops and SpikingJelly (0.0.0.0.14 or 2.x; with
0.0.0.0.12 give your neuron as ``activation``). In a package next to the folder ``fast`` it
computes the same numbers faster.

    x = torch.rand(16, 2, 64, 32, 32)                       # [T, B, C, H, W], time first
    sma = SMA(channel=64, time=16, C_reduction=4, AZO=True)  # between a convolution and its BatchNorm
    y = sma(x)                                              # [16, 2, 64, 32, 32]
    functional.reset_net(sma)                               # after every batch: the branches hold LIF neurons
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

try:
    from .fast import fast_forward
except ImportError:  # the file was copied without that folder: the equations run
    fast_forward = None  # type: ignore[assignment]

__all__ = ["SMA", "SMA_L", "attention_zoneout"]


def attention_zoneout(z: Tensor, w_time: Tensor, w_channel: Tensor, RTR: int = 4, RCR: int = 4) -> Tensor:
    """Replace the least attended steps and channels of every scale by the step before (Attention ZoneOut).

    Per scale, the ``T // RTR`` steps with the smallest time weight (summed over the batch) are chosen, and the
    ``C // RCR`` channels with the smallest channel weight (summed over the batch and over the chosen steps). Every
    chosen step ``t > 0`` takes, in the chosen channels, the value that step ``t - 1`` had *before* any replacement.

    Args:
        z: weighted features of every scale, ``[S, T, B, C, H, W]``.
        w_time: time weights, ``[S, T, B]``.
        w_channel: channel weights, ``[S, T, B, C]``, or ``[S, B, C]`` where they do not depend on time (SMA-L).
        RTR: divisor of the number of steps, 1 to T.
        RCR: divisor of the number of channels, 1 to C.

    Returns:
        ``[S, T, B, C, H, W]``. The choice carries no gradient; a replaced value carries that of its source step.
    """
    return take_previous(z, zoneout_choice(w_time, w_channel, RTR, RCR))


def take_previous(z: Tensor, replaced: Tensor) -> Tensor:
    """``z [S, T, B, C, H, W]`` with the value of the step before where ``replaced [S, T, C]`` is True."""
    previous = torch.cat([z[:, :1], z[:, :-1]], dim=1)
    return torch.where(rearrange(replaced, "s t c -> s t 1 c 1 1"), previous, z)


@torch.no_grad()
def zoneout_choice(w_time: Tensor, w_channel: Tensor, RTR: int, RCR: int) -> Tensor:
    """What :func:`attention_zoneout` replaces, ``[S, T, C]``: True at the chosen channels of the chosen steps."""
    steps = _smallest(reduce(w_time, "s t b -> s t", "sum"), w_time.shape[1] // RTR)
    per_channel = reduce(w_channel, "s ... b c -> s ... c", "sum")
    if per_channel.ndim == 3:  # over the chosen steps only; not a product with them: 0 * inf would be nan
        per_channel = torch.where(steps[..., None], per_channel, torch.zeros_like(per_channel)).sum(1)
    channels = _smallest(per_channel, per_channel.shape[1] // RCR)
    replaced = rearrange(steps, "s t -> s t 1") & rearrange(channels, "s c -> s 1 c")
    return replaced & (torch.arange(w_time.shape[1], device=w_time.device) > 0)[:, None]  # step 0 stays


def _smallest(values: Tensor, count: int) -> Tensor:
    """Mark the ``count`` smallest entries of every row of ``[S, N]``."""
    chosen = values.topk(count, dim=1, largest=False).indices
    return (rearrange(chosen, "s n -> s n 1") == torch.arange(values.shape[1], device=values.device)).any(1)


class SMA(nn.Module):
    """Spiking Multiscale Attention: weigh the scales of a convolution against each other, per channel and per step.

    Goes between a convolution and its BatchNorm: ``Conv2d -> SMA -> BatchNorm2d -> LIF``; ``[T, B, C, H, W]`` to the
    same shape. The LIF branches keep their membrane potential: call ``functional.reset_net`` after every batch.

    Args:
        channel: number of channels C.
        time: number of time steps T. It is the size of the time projections, so the weights belong to one T.
        kernels: kernel size of every scale, odd.
        C_reduction: the hidden layer of the channel weights has ``channel // C_reduction`` units (`r_C`).
        T_reduction: the hidden layer of the time weights has ``int(time // T_reduction)`` units (`r_T`);
            may be a fraction (1.5 for ImageNet).
        AZO: apply Attention ZoneOut in training. ``eval()`` switches it off, as it does dropout.
        RCR: AZO replaces ``channel // RCR`` channels.
        RTR: AZO replaces at most ``time // RTR`` steps.
        activation: what follows the BatchNorm of a branch: ``"lif"`` (event data), ``"relu"`` (ImageNet; its
            BatchNorm is stored as ``bn.bn``), or a callable that returns a module for ``[T, B, C, H, W]``.
        groups: of the branch convolutions: 1 (published), or ``"channel"``: each channel is convolved alone, for 1/C of
            the weights and of the work. Another function with weights of another shape, under the same names.
        recompute: in training, keep only the outputs of the branches and compute the rest again in the backward pass:
            less memory for one more forward pass of the branches. The same result. Needs ``fast``.
        fast: use the folder ``fast`` where it is present. ``False`` runs the equations of this file.

    Attributes:
        observer: None, or called in every forward pass with the time weights ``[S, T, B]``, the channel weights
            ``[S, T, B, C]`` (SMA-L: ``[S, B, C]``) and what AZO replaced, ``[S, T, C]`` bool (None where it did not
            act): for pictures and statistics.

    Raises:
        ValueError: an argument is outside what can work; the message says what would.
    """

    _channel_conv: type[nn.Conv2d] | type[nn.Conv3d] = nn.Conv2d  # as released files store the channel projections

    def __init__(
        self,
        channel: int = 512,
        time: int = 16,
        kernels: Sequence[int] = (1, 3, 5, 7),
        C_reduction: int = 16,
        T_reduction: float = 4,
        AZO: bool = False,
        RCR: int = 4,
        RTR: int = 4,
        activation: str | Callable[[], nn.Module] = "lif",
        groups: int | str = 1,
        recompute: bool = False,
        fast: bool = True,
    ):
        super().__init__()
        kernels = list(kernels)
        _check_arguments(channel, time, kernels, C_reduction, T_reduction, AZO, RCR, RTR, activation, groups)
        if recompute and (not fast or fast_forward is None):
            raise ValueError("recompute=True needs fast=True and the folder fast/ next to sma.py; leave it out")
        self.channel, self.time, self.groups = channel, time, groups
        self.AZO, self.RCR, self.RTR = AZO, RCR, RTR
        self.recompute, self.fast = recompute, fast
        self.observer: Callable[[Tensor, Tensor, Tensor | None], None] | None = None
        c_units, t_units = channel // C_reduction, int(time // T_reduction)
        conv_groups = channel if groups == "channel" else 1
        self.S_Convs = nn.ModuleList(_Branch(channel, k, activation, conv_groups) for k in kernels)
        self.C_before_attention_conv = self._channel_conv(channel, c_units, 1)
        self.C_after_attention_convs = nn.ModuleList(self._channel_conv(c_units, channel, 1) for _ in kernels)
        self.T_before_attention_conv = nn.Conv3d(time, t_units, 1)
        self.T_after_attention_convs = nn.ModuleList(nn.Conv3d(t_units, time, 1) for _ in kernels)

    def extra_repr(self) -> str:
        azo = f"AZO={self.AZO}, RCR={self.RCR}, RTR={self.RTR}"
        return f"channel={self.channel}, time={self.time}, {azo}, groups={self.groups}, recompute={self.recompute}"

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 5 or x.shape[0] != self.time or x.shape[2] != self.channel:
            raise ValueError(
                f"{type(self).__name__} was built for [T={self.time}, B, C={self.channel}, H, W] and got "
                f"{list(x.shape)}; T and C are part of its weights, so build it for the T and C of the input"
            )
        if self.fast and fast_forward is not None:
            return fast_forward(self, x)
        # (1) Multiscale coding: f_s = LIF(BN(Conv_s(x))).
        f = torch.stack([branch(x) for branch in self.S_Convs])  # [S, T, B, C, H, W]
        # (2) Squeeze.
        g = reduce(f.sum(0), "t b c h w -> t b c", "mean")
        # (3) Channel weights and (4) time weights: two layers each, and a softmax over the scales.
        w_channel, w_time = self.channel_weights(g), self.time_weights(g)  # [S, T, B, C] (SMA-L: [S, B, C]), [S, T, B]
        # (5) Fusion: z_s = w_T,s w_C,s f_s, AZO on z in training, and the sum over the scales.
        z = rearrange(w_time, "s t b -> s t b 1 1 1") * rearrange(w_channel, "s ... b c -> s (...) b c 1 1") * f
        replaced = self.zoneout(w_time, w_channel)  # [S, T, C]
        return (z if replaced is None else take_previous(z, replaced)).sum(0)  # [T, B, C, H, W]

    def channel_weights(self, g: Tensor) -> Tensor:
        """From the squeeze ``g`` ``[T, B, C]``: ``[S, T, B, C]``, which sums to 1 over the scales."""
        hidden = torch.relu(_project(self.C_before_attention_conv, g))
        return _over_scales([_project(conv, hidden) for conv in self.C_after_attention_convs])

    def time_weights(self, g: Tensor) -> Tensor:
        """From the squeeze ``g`` ``[T, B, C]``: ``[S, T, B]``, which sums to 1 over the scales."""
        hidden = torch.relu(_project(self.T_before_attention_conv, reduce(g, "t b c -> b t", "mean")))
        weights = _over_scales([_project(conv, hidden) for conv in self.T_after_attention_convs])
        return rearrange(weights, "s b t -> s t b")

    def attention_weights(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The time and the channel weights from the branch outputs ``[S, T, B, C, H, W]``."""
        g = reduce(features.sum(0), "t b c h w -> t b c", "mean")
        return self.time_weights(g), self.channel_weights(g)

    def zoneout(self, w_time: Tensor, w_channel: Tensor) -> Tensor | None:
        """What AZO replaces in this pass, ``[S, T, C]`` bool; None where it does not act. The observer sees it."""
        act = self.AZO and self.training
        replaced = zoneout_choice(w_time, w_channel, self.RTR, self.RCR) if act else None
        if self.observer is not None:
            self.observer(w_time.detach(), w_channel.detach(), replaced)
        return replaced


class SMA_L(SMA):
    """Light form of SMA: one channel weight for all time steps.

    As :class:`SMA`, but the channel weights are computed from the mean over T, and AZO chooses the channels by
    their batch sum alone. The published divisors of its AZO are 16 for channels and 4 for steps.
    """

    _channel_conv = nn.Conv3d

    def __init__(
        self, channel: int = 512, time: int = 16, kernels: Sequence[int] = (1, 3, 5, 7), C_reduction: int = 16,
        T_reduction: float = 4, AZO: bool = False, RCR: int = 16, RTR: int = 4, **keywords: Any,
    ):  # fmt: skip
        super().__init__(channel, time, kernels, C_reduction, T_reduction, AZO, RCR, RTR, **keywords)

    def channel_weights(self, g: Tensor) -> Tensor:
        """From the squeeze ``g`` ``[T, B, C]``: ``[S, B, C]``, which sums to 1 over the scales."""
        return super().channel_weights(reduce(g, "t b c -> b c", "mean"))


def _project(conv: Any, x: Tensor) -> Tensor:
    """Apply a 1x1(x1) convolution to the last axis of ``x``: it is a linear layer stored in another shape."""
    return nn.functional.linear(x, conv.weight.flatten(1), conv.bias)


def _over_scales(scores: Sequence[Tensor]) -> Tensor:
    """Softmax over the scales. At least float32: under autocast a GPU does so, and a CPU would not."""
    stacked = torch.stack(list(scores))
    return stacked.softmax(0, dtype=torch.promote_types(stacked.dtype, torch.float32))


class _Branch(nn.Module):
    """One scale: activation(BN(Conv_k(x))), channel -> channel, ``[T, B, C, H, W]`` to the same shape."""

    def __init__(self, channel: int, kernel: int, activation: str | Callable[[], nn.Module], groups: int):
        super().__init__()
        self.conv = _Conv2d(channel, channel, kernel, padding=kernel // 2, groups=groups)
        if activation == "relu":  # the released files store its parameters as bn.bn.*
            self.bn: nn.Module = nn.Sequential(OrderedDict(bn=nn.BatchNorm2d(channel)))
            self.act: nn.Module = nn.ReLU()
        else:
            self.bn = nn.BatchNorm2d(channel)
            self.lif = _multi_step(activation() if callable(activation) else _lif())

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(rearrange(x, "t b c h w -> (t b) c h w")))  # statistics over T, B, H and W
        y = rearrange(y, "(t b) c h w -> t b c h w", t=x.shape[0])
        return self.lif(y) if hasattr(self, "lif") else self.act(y)


def _lif() -> nn.Module:
    """The LIF neuron of the published networks on event data, over all T steps at once."""
    try:
        from spikingjelly.activation_based import neuron, surrogate
    except ImportError as error:
        raise ImportError(
            f'activation="lif" needs SpikingJelly 0.0.0.0.14 or 2.x ({error}); with 0.0.0.0.12 give your neuron, '
            "for instance activation=lambda: MultiStepLIFNode(detach_reset=True, surrogate_function=surrogate.ATan())"
        ) from error
    return neuron.LIFNode(
        tau=2.0, v_threshold=1.0, v_reset=0.0, detach_reset=True, surrogate_function=surrogate.ATan(), step_mode="m"
    )


def _multi_step(module: nn.Module) -> nn.Module:
    """``module``, unless it would take T for the batch: a neuron of SpikingJelly in single-step mode."""
    of_012 = type(module).__module__ == "spikingjelly.clock_driven.neuron" and "MultiStep" not in type(module).__name__
    if of_012 or getattr(module, "step_mode", "m") == "s":
        name = type(module).__name__
        use = f"MultiStep{name}(...)" if of_012 else f'{name}(step_mode="m")'
        raise ValueError(f"activation makes a {name} in single-step mode; use activation=lambda: {use}")
    if not hasattr(module, "supported_step_mode"):  # SpikingJelly's containers look after what is inside
        for child in module.children():
            _multi_step(child)
    return module


class _Conv2d(nn.Conv2d):
    """Leaves out the taps that see nothing but zero padding: on a map of 2x2 a 7x7 kernel is a 3x3 kernel.

    The result is the same. With these taps, oneDNN's bfloat16 weight gradient is wrong (torch 2.15, AMD EPYC).
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        half = self.kernel_size[0] // 2
        rows, columns = (min(half, size - 1) for size in x.shape[-2:])
        if rows < half or columns < half:
            weight = weight[:, :, half - rows : half + rows + 1, half - columns : half + columns + 1]
        return nn.functional.conv2d(x, weight, bias, padding=(rows, columns), groups=self.groups)


def _check_arguments(channel, time, kernels, C_reduction, T_reduction, AZO, RCR, RTR, activation, groups) -> None:
    whole = {"channel": channel, "time": time, "C_reduction": C_reduction, "RCR": RCR, "RTR": RTR}
    for name, value in whole.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    if not T_reduction >= 1:
        raise ValueError(f"T_reduction={T_reduction!r} must be at least 1")
    if not kernels or any(not isinstance(k, int) or k < 1 or k % 2 == 0 for k in kernels):
        raise ValueError(f"kernels={kernels!r} must be a list of odd whole numbers, for instance [1, 3, 5, 7]")
    divisors = [("C_reduction", C_reduction, "no unit for channel", channel)]
    divisors += [("T_reduction", T_reduction, "no unit for time", time)]
    if AZO:
        divisors += [("RCR", RCR, "AZO no channel of channel", channel), ("RTR", RTR, "AZO no step of time", time)]
    for name, divisor, nothing, size in divisors:
        if size // divisor < 1:
            raise ValueError(f"{name}={divisor} leaves {nothing}={size}; use 1 to {size}")
    if not callable(activation) and activation not in ("lif", "relu"):
        raise ValueError(f"activation={activation!r} must be 'lif', 'relu' or a callable that returns a module")
    if groups not in (1, "channel"):
        raise ValueError(f"groups={groups!r} must be 1, the published form, or 'channel', which is depthwise")

"""Spiking Multiscale Attention (SMA) and Attention ZoneOut (AZO).

Shan, Zhang, Zhu, Qiu, Eshraghian, Qu, "Advancing Spiking Neural Networks Towards Multiscale Spatiotemporal
Interaction Learning", AAAI 2025, https://doi.org/10.1609/aaai.v39i2.32141.

This file stands alone: copy it into another project that has torch, einops and spikingjelly (0.0.0.0.14 or 2.x).

    x = torch.rand(16, 2, 64, 32, 32)                       # [T, B, C, H, W], time first
    sma = SMA(channel=64, time=16, C_reduction=4, AZO=True)  # between a convolution and its BatchNorm
    y = sma(x)                                              # [16, 2, 64, 32, 32]
    functional.reset_net(sma)                               # after every batch: the branches hold LIF neurons
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange, reduce
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn

__all__ = ["SMA", "SMA_L", "attention_zoneout"]


def attention_zoneout(z: Tensor, w_time: Tensor, w_channel: Tensor, RTR: int = 4, RCR: int = 4) -> Tensor:
    """Replace the least attended steps and channels of every scale by the step before (Attention ZoneOut).

    Per scale, the ``T // RTR`` steps with the smallest time weight (summed over the batch) are chosen, and the
    ``C // RCR`` channels with the smallest channel weight (summed over the batch and over the chosen steps). Every
    chosen step ``t > 0`` takes, in the chosen channels, the value that step ``t - 1`` had *before* any replacement
    (the snapshot form, with which the published networks are trained). Step 0 has no predecessor and stays.

    Args:
        z: weighted features of every scale, ``[S, T, B, C, H, W]``.
        w_time: time weights, ``[S, T, B]``.
        w_channel: channel weights, ``[S, T, B, C]``, or ``[S, B, C]`` where they do not depend on time (SMA-L).
        RTR: divisor of the number of steps, 1 to T.
        RCR: divisor of the number of channels, 1 to C.

    Returns:
        ``[S, T, B, C, H, W]``. The choice carries no gradient; a replaced value carries that of its source step.

    Source: Attention ZoneOut of the paper named at the top of this file.
    """
    return _replace_by_previous(z, _zoneout_choice(w_time, w_channel, RTR, RCR))


def _replace_by_previous(z: Tensor, replace: Tensor) -> Tensor:
    """``z [S, T, B, C, H, W]`` with the value of the step before where ``replace [S, T, C]`` is True."""
    previous = torch.cat([z[:, :1], z[:, :-1]], dim=1)
    return torch.where(rearrange(replace, "s t c -> s t 1 c 1 1"), previous, z)


@torch.no_grad()
def _zoneout_choice(w_time: Tensor, w_channel: Tensor, RTR: int, RCR: int) -> Tensor:
    """Which (step, channel) of every scale AZO replaces: ``[S, T, C]``, True where it does."""
    steps = _smallest(reduce(w_time, "s t b -> s t", "sum"), w_time.shape[1] // RTR)
    if w_channel.ndim == 4:
        per_step = reduce(w_channel, "s t b c -> s t c", "sum")
        # A sum over the chosen steps only. torch.where, not a product: 0 * inf would be nan.
        channel_sum = torch.where(steps[..., None], per_step, torch.zeros_like(per_step)).sum(1)
    else:
        channel_sum = reduce(w_channel, "s b c -> s c", "sum")
    channels = _smallest(channel_sum, channel_sum.shape[1] // RCR)
    replace = rearrange(steps, "s t -> s t 1") & rearrange(channels, "s c -> s 1 c")
    replace[:, 0] = False
    return replace


def _smallest(values: Tensor, count: int) -> Tensor:
    """Mark the ``count`` smallest entries of every row of ``[S, N]``."""
    chosen = values.topk(count, dim=1, largest=False).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, chosen, True)


def _default_lif() -> nn.Module:
    """The LIF neuron of the published networks on event data, over all T steps at once."""
    return neuron.LIFNode(
        tau=2.0, v_threshold=1.0, v_reset=0.0, detach_reset=True, surrogate_function=surrogate.ATan(), step_mode="m"
    )


class _WrappedBatchNorm(nn.Module):
    """A BatchNorm one level down: the ReLU form stores its parameters as ``bn.bn.*``, which is a file format."""

    def __init__(self, channel: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(channel)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x)


class _Conv2d(nn.Conv2d):
    """A convolution with odd kernel and stride 1 that leaves out the taps which would see nothing but zero padding.

    On a map of n pixels a tap more than n - 1 away from the centre never meets a pixel: 7x7 on 2x2 is 3x3. The same
    result for less work; and oneDNN's bfloat16 weight gradient is wrong for 7x7 on 2x2 (torch 2.15, AMD EPYC).
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        half = self.kernel_size[0] // 2
        rows, columns = (min(half, size - 1) for size in x.shape[-2:])
        if rows < half or columns < half:
            weight = weight[:, :, half - rows : half + rows + 1, half - columns : half + columns + 1]
        return nn.functional.conv2d(x, weight, bias, padding=(rows, columns))


class _Branch(nn.Module):
    """One scale: activation(BN(Conv_k(x))), channel -> channel, ``[T, B, C, H, W]`` to the same shape."""

    def __init__(self, channel: int, kernel: int, activation: str | Callable[[], nn.Module]):
        super().__init__()
        self.conv = _Conv2d(channel, channel, kernel, padding=kernel // 2)
        if activation == "relu":
            self.bn: nn.Module = _WrappedBatchNorm(channel)
            self.act: nn.Module = nn.ReLU()
        else:
            self.bn = nn.BatchNorm2d(channel)
            self.lif = _default_lif() if activation == "lif" else activation()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(rearrange(x, "t b c h w -> (t b) c h w")))  # statistics over T, B, H and W
        y = rearrange(y, "(t b) c h w -> t b c h w", t=x.shape[0])
        return self.lif(y) if hasattr(self, "lif") else self.act(y)


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

    Attributes:
        observer: None, or called in every forward pass with the time weights ``[S, T, B]``, the channel weights
            ``[S, T, B, C]`` (SMA-L: ``[S, B, C]``) and what AZO replaced, ``[S, T, C]`` bool (None where it did not
            act): for pictures and statistics.

    Raises:
        ValueError: an argument is outside what can work; the message says what would.

    Source: Spiking Multiscale Attention of the paper named at the top of this file.
    """

    # The kernel dimensions of the channel projections, as the released files store them (SMA: [out, in, 1, 1]).
    _channel_kernel: tuple[int, ...] = (1, 1)

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
    ):
        super().__init__()
        kernels = list(kernels)
        _check_arguments(channel, time, kernels, C_reduction, T_reduction, AZO, RCR, RTR, activation)
        self.channel, self.time = channel, time
        self.AZO, self.RCR, self.RTR = AZO, RCR, RTR
        self.observer: Callable[[Tensor, Tensor, Tensor | None], None] | None = None
        c_units, t_units = channel // C_reduction, int(time // T_reduction)
        c_conv = nn.Conv2d if len(self._channel_kernel) == 2 else nn.Conv3d
        self.S_Convs = nn.ModuleList(_Branch(channel, k, activation) for k in kernels)
        self.C_before_attention_conv = c_conv(channel, c_units, 1)
        self.C_after_attention_convs = nn.ModuleList(c_conv(c_units, channel, 1) for _ in kernels)
        self.T_before_attention_conv = nn.Conv3d(time, t_units, 1)
        self.T_after_attention_convs = nn.ModuleList(nn.Conv3d(t_units, time, 1) for _ in kernels)

    def extra_repr(self) -> str:
        return f"channel={self.channel}, time={self.time}, AZO={self.AZO}, RCR={self.RCR}, RTR={self.RTR}"

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 5 or x.shape[0] != self.time or x.shape[2] != self.channel:
            raise ValueError(
                f"{type(self).__name__} was built for [T={self.time}, B, C={self.channel}, H, W] and got "
                f"{list(x.shape)}; T and C are part of its weights, so build it for the T and C of the input"
            )
        features = torch.stack([branch(x) for branch in self.S_Convs])  # [S, T, B, C, H, W]
        w_time, w_channel = self.attention_weights(features)
        weights = w_time[..., None] * (w_channel if w_channel.ndim == 4 else w_channel[:, None])  # [S, T, B, C]
        z = rearrange(weights, "s t b c -> s t b c 1 1") * features
        replaced = None
        if self.AZO and self.training:
            replaced = _zoneout_choice(w_time, w_channel, self.RTR, self.RCR)
            z = _replace_by_previous(z, replaced)
        if self.observer is not None:
            self.observer(w_time.detach(), w_channel.detach(), replaced)
        return z.sum(0)

    def attention_weights(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the scales from the branch outputs ``[S, T, B, C, H, W]``.

        Returns:
            Time weights ``[S, T, B]`` and channel weights ``[S, T, B, C]`` (``[S, B, C]`` for SMA-L); either sums
            to 1 over the scales.
        """
        g = reduce(features, "s t b c h w -> s t b c", "mean").sum(0)  # the squeeze: mean over H, W of the sum over S
        return self._time_weights(g), self._channel_weights(g)

    def _time_weights(self, g: Tensor) -> Tensor:
        hidden = torch.relu(_project(self.T_before_attention_conv, reduce(g, "t b c -> b t", "mean")))
        per_scale = torch.stack([_project(conv, hidden) for conv in self.T_after_attention_convs])
        return rearrange(per_scale.softmax(0), "s b t -> s t b")

    def _channel_weights(self, g: Tensor) -> Tensor:
        hidden = torch.relu(_project(self.C_before_attention_conv, g))
        return torch.stack([_project(conv, hidden) for conv in self.C_after_attention_convs]).softmax(0)


class SMA_L(SMA):
    """Light form of SMA: one channel weight for all time steps.

    As :class:`SMA`, but the channel weights are computed from the mean over T, and AZO chooses the channels by
    their batch sum alone. The published divisors of its AZO are 16 for channels and 4 for steps.

    Source: the published light form, SMA-L.
    """

    _channel_kernel = (1, 1, 1)

    def __init__(
        self,
        channel: int = 512,
        time: int = 16,
        kernels: Sequence[int] = (1, 3, 5, 7),
        C_reduction: int = 16,
        T_reduction: float = 4,
        AZO: bool = False,
        RCR: int = 16,
        RTR: int = 4,
        activation: str | Callable[[], nn.Module] = "lif",
    ):
        super().__init__(channel, time, kernels, C_reduction, T_reduction, AZO, RCR, RTR, activation)

    def _channel_weights(self, g: Tensor) -> Tensor:
        return super()._channel_weights(reduce(g, "t b c -> b c", "mean"))


def _project(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a 1x1(x1) convolution to the last axis of ``x``: it is a linear layer stored in another shape."""
    return nn.functional.linear(x, conv.weight.flatten(1), conv.bias)


def _check_arguments(
    channel: int,
    time: int,
    kernels: list[int],
    C_reduction: int,
    T_reduction: float,
    AZO: bool,
    RCR: int,
    RTR: int,
    activation: str | Callable[[], nn.Module],
) -> None:
    for name, value in {"channel": channel, "time": time, "RCR": RCR, "RTR": RTR}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    if not kernels or any(not isinstance(k, int) or k < 1 or k % 2 == 0 for k in kernels):
        raise ValueError(f"kernels={kernels!r} must be a list of odd whole numbers, for instance [1, 3, 5, 7]")
    for name, value in {"C_reduction": C_reduction, "T_reduction": T_reduction}.items():
        if not value >= 1:
            raise ValueError(f"{name}={value!r} must be at least 1")
    if channel // C_reduction < 1:
        raise ValueError(f"C_reduction={C_reduction} leaves no unit for channel={channel}; use 1 to {channel}")
    if time // T_reduction < 1:
        raise ValueError(f"T_reduction={T_reduction} leaves no unit for time={time}; use 1 to {time}")
    if C_reduction != int(C_reduction):
        raise ValueError(f"C_reduction={C_reduction!r} must be a whole number")
    if AZO and channel < RCR:
        raise ValueError(f"RCR={RCR} leaves AZO no channel of channel={channel}; use 1 to {channel}")
    if AZO and time < RTR:
        raise ValueError(f"RTR={RTR} leaves AZO no step of time={time}; use 1 to {time}")
    if not callable(activation) and activation not in ("lif", "relu"):
        raise ValueError(f"activation={activation!r} must be 'lif', 'relu' or a callable that returns a module")

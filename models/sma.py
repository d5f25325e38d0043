"""Spiking Multiscale Attention (SMA) and Attention ZoneOut (AZO).

Shan, Zhang, Zhu, Qiu, Eshraghian, Qu, "Advancing Spiking Neural Networks Towards Multiscale Spatiotemporal
Interaction Learning", AAAI 2025, https://doi.org/10.1609/aaai.v39i2.32141.

This file stands alone: copy it into another project that has torch, einops and spikingjelly (0.0.0.0.14 or 2.x).
Beside fast/kernels.py in a package it runs its passes as kernels on a GPU, where Triton works.

    x = torch.rand(16, 2, 64, 32, 32)                       # [T, B, C, H, W], time first
    sma = SMA(channel=64, time=16, C_reduction=4, AZO=True)  # between a convolution and its BatchNorm
    y = sma(x)                                              # [16, 2, 64, 32, 32]
    functional.reset_net(sma)                               # after every batch: the branches hold LIF neurons
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from einops import rearrange, reduce
from spikingjelly.activation_based import base, neuron, surrogate
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:
    from .fast import kernels as _triton
except ImportError:  # no Triton on this machine, or this file was copied without that one
    _triton = None

__all__ = ["SMA", "SMA_L", "attention_zoneout", "has_kernels"]


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
        return nn.functional.conv2d(x, weight, bias, padding=(rows, columns), groups=self.groups)


# The fused path: all but the convolutions, without keeping more than backward needs. A pass over memory costs
# more than the arithmetic. On a GPU fast/kernels.py has the passes as kernels; the loops over steps here are for a CPU:
# they keep what they work on in the cache, and every feature map that is not allocated saves its page faults, too.


class _NormalizeAndFire(torch.autograd.Function):
    """LIF(BatchNorm(y)) with a hard, detached reset to 0, and the mean of the spikes over H and W.

    Keeps nothing but ``y``: backward computes the potentials again, with the same operations and so to the same bits.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        v: Tensor | None,
        bn: nn.BatchNorm2d,
        node: nn.Module,
        overwrite: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``y`` ``[T, B, C, H, W]``, normalised by ``mean`` and ``var`` ``[C]``; ``v``: the first potential (None: 0).

        Returns:
            Spikes like ``y`` (in its memory with ``overwrite``), their means ``[T, B, C]`` and the last potential.
        """
        ctx.save_for_backward(y, weight, bias, mean, var, v)
        ctx.bn, ctx.node, ctx.batch_statistics = bn, node, bn.training
        ctx.set_materialize_grads(False)  # nothing depends on the last potential, as a rule
        keep, gain = _leak(node)
        spikes = y if overwrite else torch.empty_like(y)
        fire = _triton.fire if _in_kernels(y) else _fire
        means, v = fire(y, *_charge_of_input(weight, bias, mean, var, bn.eps, gain), v, keep, node.v_threshold, spikes)
        return spikes, means, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        grad_spikes: Tensor | None,
        grad_means: Tensor | None,
        grad_v: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of ``y``, ``weight``, ``bias`` and ``v``."""
        y, weight, bias, mean, var, v = ctx.saved_tensors
        node, eps = ctx.node, ctx.bn.eps
        keep, gain = _leak(node)
        charge = _charge_of_input(weight, bias, mean, var, eps, gain)
        backward = _triton.fire_backward if _in_kernels(y) else _fire_backward
        grad, grad_v = backward(
            y, *charge, v, grad_spikes, grad_means, grad_v, keep, gain, node.v_threshold, node.surrogate_function.alpha
        )
        grad_y, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad.flatten(0, 1),
            y.flatten(0, 1),
            weight,
            mean,
            var,
            mean,
            (var + eps).rsqrt(),
            ctx.batch_statistics,
            eps,
            [True, True, True],
        )
        grad_v = grad_v if ctx.needs_input_grad[5] else None
        return grad_y.view_as(y), grad_weight, grad_bias, None, None, grad_v, None, None, None


def _leak(node: nn.Module) -> tuple[float, float]:
    """``keep`` and ``gain`` of a LIF neuron: ``u = keep * v + gain * x``."""
    return 1.0 - 1.0 / node.tau, 1.0 / node.tau if node.decay_input else 1.0


def _charge_of_input(
    weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, gain: float
) -> tuple[Tensor, Tensor]:
    """What BatchNorm makes of ``y``, times the neuron's gain: ``scale * y + shift``, each ``[C, 1, 1]``."""
    scale = weight * (var + eps).rsqrt()
    charge = torch.stack([scale, bias - mean * scale]) * gain
    return charge[0, :, None, None], charge[1, :, None, None]


def _fire(
    y: Tensor, scale: Tensor, shift: Tensor, v: Tensor | None, keep: float, threshold: float, spikes: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes ``spikes`` (may be ``y``); their means over H and W ``[T, B, C]``, and the last potential."""
    means = y.new_empty(y.shape[:3])
    for t in range(len(y)):
        u = _potential(y[t], scale, shift, v, keep)
        v = _reset(u, torch.ge(u, threshold, out=spikes[t]))
        torch.mean(spikes[t], (-2, -1), out=means[t])
    return means, v


def _fire_backward(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    v: Tensor | None,
    grad_spikes: Tensor | None,
    grad_means: Tensor | None,
    grad_v: Tensor | None,
    keep: float,
    gain: float,
    threshold: float,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of what :func:`_fire` charges with, times ``gain``, and of its first potential."""
    potentials = torch.empty_like(y, dtype=scale.dtype)  # before the reset; then, step by step, the gradient
    for t in range(len(y)):
        u = _potential(y[t], scale, shift, v, keep, out=potentials[t])
        v = _reset(u, torch.ge(u, threshold, out=torch.empty_like(u)))
    pixels = y.shape[-2] * y.shape[-1]
    for t in reversed(range(len(y))):
        u = potentials[t]
        grad = torch.zeros_like(u) if grad_spikes is None else grad_spikes[t]
        if grad_means is not None:
            grad = grad + grad_means[t, ..., None, None] / pixels
        # ATan: d spike / d u = (alpha / 2) / (1 + (pi / 2 * alpha * (u - threshold))^2)
        slope = u.sub(threshold).mul_(torch.pi / 2 * alpha).square_().add_(1.0).reciprocal_().mul_(alpha / 2)
        slope.mul_(grad)
        if grad_v is not None:  # a reset passes no gradient on
            slope.addcmul_(grad_v, torch.lt(u, threshold, out=torch.empty_like(u)))
        torch.mul(slope, gain, out=u)
        grad_v = slope.mul_(keep)
    return potentials.to(y.dtype), grad_v


def _potential(
    y: Tensor, scale: Tensor, shift: Tensor, v: Tensor | None, keep: float, out: Tensor | None = None
) -> Tensor:
    """The potential of one step before the reset, ``[B, C, H, W]``."""
    u = torch.mul(y, scale, out=out).add_(shift)
    return u if v is None else u.add_(v, alpha=keep)


def _reset(u: Tensor, spikes: Tensor) -> Tensor:
    """``u - u * spikes``: products are several times faster than masks."""
    return torch.addcmul(u, u, spikes.to(u.dtype), value=-1.0)


class _WeightedSum(torch.autograd.Function):
    """``out = sum over s of z_s`` with ``z_s = weights_s * f_s``, a step of ``z_s`` replaced by the one before by AZO.

    A replaced ``z_s[t]`` is ``z_s[t - 1]``, so the sum reads ``f_s[t - 1]`` there and no ``z`` is ever made. Of spikes
    one bit is kept for backward; other features are kept as they are.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        weights: Tensor,
        replaced: Tensor | None,
        are_spikes: bool,
        *features: Tensor,
    ) -> Tensor:
        """``weights`` ``[S, T, B, C]``, ``replaced`` ``[S, T, C]`` bool or None, S features ``[T, B, C, H, W]``."""
        ctx.in_kernels = _in_kernels(weights) and len(features) <= _triton.most_scales
        ctx.are_spikes, ctx.dtype = are_spikes, features[0].dtype
        differentiates = any(ctx.needs_input_grad)
        weighted_sum = _triton.weighted_sum if ctx.in_kernels else _weighted_sum
        out, kept = weighted_sum(features, *_shares(weights, replaced), are_spikes and differentiates)
        if differentiates:
            ctx.save_for_backward(weights, replaced, *kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``weights`` and of the features."""
        weights, replaced, *kept = ctx.saved_tensors
        backward = _triton.weighted_sum_backward if ctx.in_kernels else _weighted_sum_backward
        shares = _shares(weights, replaced)
        grad_own, grad_borrowed, grads = backward(grad, *shares, ctx.are_spikes, kept, ctx.dtype)
        if replaced is not None:
            replaced = replaced[:, :, None]
            grad_own = grad_own * ~replaced
            grad_own[:, :-1] += (grad_borrowed * replaced)[:, 1:]
        return grad_own, None, None, *grads


def _shares(weights: Tensor, replaced: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a step takes of its own features and of those of the step before (None: nothing), ``[S, T, B, C]``."""
    if replaced is None:
        return weights, None
    of_channels = replaced[:, :, None]  # for the whole batch
    borrowed = torch.zeros_like(weights)
    borrowed[:, 1:] = weights[:, :-1] * of_channels[:, 1:]
    return weights * ~of_channels, borrowed


def _weighted_sum(
    features: Sequence[Tensor], own: Tensor, borrowed: Tensor | None, are_spikes: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    """The sum, and the features for backward: of spikes a bit each."""
    out = torch.empty_like(features[0], dtype=torch.promote_types(own.dtype, features[0].dtype))
    borrows = _borrows(own, borrowed)
    for t, sum_of_step in enumerate(out):
        torch.mul(features[0][t], own[0, t, ..., None, None], out=sum_of_step)
        for s, f in enumerate(features):
            if s > 0:
                sum_of_step.addcmul_(f[t], own[s, t, ..., None, None])
            if borrows[s][t]:
                sum_of_step.addcmul_(f[t - 1], borrowed[s, t, ..., None, None])
    return out, [_pack(f) for f in features] if are_spikes else features


def _weighted_sum_backward(
    grad: Tensor, own: Tensor, borrowed: Tensor | None, are_spikes: bool, kept: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of :func:`_weighted_sum` for ``own``, ``borrowed`` and the features, these in ``dtype``."""
    borrows = _borrows(own, borrowed)
    grad_own, grad_borrowed = torch.zeros_like(own), torch.zeros_like(own)
    grads = [torch.empty_like(grad, dtype=dtype) for _ in kept]
    for t in range(len(grad)):
        for s, kept_of_scale in enumerate(kept):
            f = _unpack(kept_of_scale[t], grad[t]) if are_spikes else kept_of_scale[t]
            grad_own[s, t] = (grad[t] * f).sum((-2, -1))
            torch.mul(grad[t], own[s, t, ..., None, None], out=grads[s][t])
            if t + 1 < len(grad) and borrows[s][t + 1]:
                grad_borrowed[s, t + 1] = (grad[t + 1] * f).sum((-2, -1))
                grads[s][t].addcmul_(grad[t + 1], borrowed[s, t + 1, ..., None, None])
    return grad_own, grad_borrowed, grads


def _borrows(own: Tensor, borrowed: Tensor | None) -> list[list[bool]]:
    """By scale and step, whether it takes anything of the step before."""
    if borrowed is None:
        return [[False] * own.shape[1]] * len(own)
    return borrowed.flatten(2).any(2).tolist()


def _pack(spikes: Tensor) -> Tensor:
    """Spikes ``[T, ...]`` as bits ``[T, bytes]``: bit j of byte i is spike ``j * bytes + i`` of its step."""
    powers = 2.0 ** torch.arange(8, dtype=spikes.dtype, device=spikes.device)
    steps = [nn.functional.pad(step.flatten(), (0, -step.numel() % 8)).view(8, -1) for step in spikes]
    return torch.stack([(powers @ step).to(torch.uint8) for step in steps])


def _unpack(bits: Tensor, like: Tensor) -> Tensor:
    """The spikes of a step, packed by :func:`_pack`, in shape and type of ``like``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)[:, None]
    return ((bits >> shifts) & 1).flatten()[: like.numel()].view(like.shape).to(like.dtype)


def _in_kernels(x: Tensor) -> bool:
    """Whether a pass over ``x`` runs in the kernels of fast/kernels.py. A compiler makes its own."""
    return x.is_cuda and not torch.compiler.is_compiling() and has_kernels(x.device)


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether the kernels work on ``device``: seen once, on a small problem that PyTorch solves, too."""
    if _triton is None:
        return False
    try:
        with torch.no_grad():
            _compare_kernels(device)
    except (
        Exception
    ) as error:  # Triton fails in many ways: too old, no compiler, no driver, a GPU that it does not know
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        warnings.warn(f"SMA runs without its Triton kernels on {device} ({what}): the same, slower", stacklevel=2)
        return False
    return True


def _compare_kernels(device: torch.device) -> None:
    """Every kernel on a small problem, half of it AZO's.

    Raises:
        RuntimeError: one of them gives something else than PyTorch.
    """
    generator = torch.Generator().manual_seed(0)
    y, grad = (torch.randn(3, 2, 5, 6, 7, generator=generator).to(device) for _ in range(2))
    scale = torch.ones(5, 1, 1, device=device)
    weights = torch.rand(2, 3, 2, 5, generator=generator).to(device)
    replaced = torch.zeros(2, 3, 5, dtype=torch.bool, device=device)
    replaced[0, 1, 2:] = True
    results = []
    for fire, fire_backward, weighted_sum, weighted_sum_backward in (
        (_fire, _fire_backward, _weighted_sum, _weighted_sum_backward),
        (_triton.fire, _triton.fire_backward, _triton.weighted_sum, _triton.weighted_sum_backward),
    ):
        spikes, shares = torch.empty_like(y), _shares(weights, replaced)
        means, _ = fire(y, scale, 0.3 * scale, None, 0.5, 1.0, spikes)
        grad_y, _ = fire_backward(y, scale, 0.3 * scale, None, grad, means, None, 0.5, 0.5, 1.0, 2.0)
        out, kept = weighted_sum([spikes, spikes], *shares, True)
        _, _, grads = weighted_sum_backward(grad, *shares, True, kept, y.dtype)
        results.append([spikes, means, grad_y, out, *grads])
    for expected, found in zip(*results, strict=True):
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
            raise RuntimeError("a kernel computes something else than PyTorch")


class _Branch(nn.Module):
    """One scale: activation(BN(Conv_k(x))), channel -> channel, ``[T, B, C, H, W]`` to the same shape."""

    def __init__(self, channel: int, kernel: int, activation: str | Callable[[], nn.Module], groups: int):
        super().__init__()
        self.conv = _Conv2d(channel, channel, kernel, padding=kernel // 2, groups=groups)
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

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output of the branch and its mean over H and W, ``[T, B, C]``."""
        if not self._can_be_fused(x):
            features = self(x)
            return features, features.mean((-2, -1))
        y = self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        v = self.lif.v if torch.is_tensor(self.lif.v) else None  # a number after a reset: 0
        mean, var = _statistics(self.bn, y)
        overwrite = not torch.is_grad_enabled()
        affine = self.bn.weight, self.bn.bias
        features, means, self.lif.v = _NormalizeAndFire.apply(y, *affine, mean, var, v, self.bn, self.lif, overwrite)
        return features, means

    def gives_spikes(self) -> bool:
        """Whether the branch ends with the neuron that :class:`_NormalizeAndFire` computes: its output is 0 or 1."""
        node = getattr(self, "lif", None)
        return (
            (type(node) is neuron.LIFNode or getattr(node, "computes_lif", False))
            and isinstance(node.surrogate_function, surrogate.ATan)
            and node.surrogate_function.spiking
            and node.step_mode == "m"
            and node.v_reset == 0.0
            and node.detach_reset
        )

    def _can_be_fused(self, x: Tensor) -> bool:
        bn = self.bn
        return (
            (x.device.type == "cpu" or _in_kernels(x))
            and self.gives_spikes()
            and not self.lif.store_v_seq
            and type(bn) is nn.BatchNorm2d
            and bn.affine
            and bn.track_running_stats
            and bn.momentum is not None
            and not self._is_watched()
        )

    def _is_watched(self) -> bool:
        """Whether a hook wants to see what the modules of the branch give."""
        return torch.nn.modules.module._has_any_global_hook() or any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
            for m in self.modules()
        )


def _statistics(bn: nn.BatchNorm2d, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[C]`` by which ``bn`` normalises; in training those of ``y``, and the running ones follow."""
    if not bn.training:
        return bn.running_mean, bn.running_var
    bn.num_batches_tracked.add_(1)
    with torch.no_grad():
        return torch.batch_norm_update_stats(y.flatten(0, 1), bn.running_mean, bn.running_var, bn.momentum)


def _encode_twice(branch: _Branch, x: Tensor) -> tuple[Tensor, Tensor]:
    """:meth:`_Branch.encode`, of which nothing is kept: backward computes it again, from the same state."""
    memories = [(node, dict(node._memories)) for node in branch.modules() if isinstance(node, base.MemoryModule)]
    contexts = lambda: (nullcontext(), _as_before(branch, memories))  # noqa: E731
    return checkpoint(branch.encode, x, use_reentrant=False, context_fn=contexts)


@contextmanager
def _as_before(branch: _Branch, memories: list[tuple[nn.Module, dict]]) -> Iterator[None]:
    """Neurons start from ``memories``; afterwards they and the running statistics are as if nothing had happened."""
    memories_now = [(node, dict(node._memories)) for node, _ in memories]
    buffers_now = [buffer.clone() for buffer in branch.buffers()]
    for node, memory in memories:
        node._memories.update(memory)
    try:
        yield
    finally:
        for node, memory in memories_now:
            node._memories.update(memory)
        for buffer, value in zip(branch.buffers(), buffers_now, strict=True):
            buffer.copy_(value)


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
        checkpoint: in training, keep nothing of the branches but their spikes and compute the rest once more in
            backward: less memory for one more forward pass of the branches. The same result.

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
        groups: int | str = 1,
        checkpoint: bool = False,
    ):
        super().__init__()
        kernels = list(kernels)
        _check_arguments(channel, time, kernels, C_reduction, T_reduction, AZO, RCR, RTR, activation, groups)
        self.channel, self.time = channel, time
        self.AZO, self.RCR, self.RTR = AZO, RCR, RTR
        self.observer: Callable[[Tensor, Tensor, Tensor | None], None] | None = None
        self.groups, self.checkpoint = groups, checkpoint
        c_units, t_units = channel // C_reduction, int(time // T_reduction)
        c_conv = nn.Conv2d if len(self._channel_kernel) == 2 else nn.Conv3d
        self.S_Convs = nn.ModuleList(
            _Branch(channel, k, activation, channel if groups == "channel" else 1) for k in kernels
        )
        self.C_before_attention_conv = c_conv(channel, c_units, 1)
        self.C_after_attention_convs = nn.ModuleList(c_conv(c_units, channel, 1) for _ in kernels)
        self.T_before_attention_conv = nn.Conv3d(time, t_units, 1)
        self.T_after_attention_convs = nn.ModuleList(nn.Conv3d(t_units, time, 1) for _ in kernels)

    def extra_repr(self) -> str:
        azo = f"AZO={self.AZO}, RCR={self.RCR}, RTR={self.RTR}"
        return f"channel={self.channel}, time={self.time}, {azo}, groups={self.groups}, checkpoint={self.checkpoint}"

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 5 or x.shape[0] != self.time or x.shape[2] != self.channel:
            raise ValueError(
                f"{type(self).__name__} was built for [T={self.time}, B, C={self.channel}, H, W] and got "
                f"{list(x.shape)}; T and C are part of its weights, so build it for the T and C of the input"
            )
        if self._wants_channels_last(x):
            x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
        encode = _encode_twice if self.checkpoint and torch.is_grad_enabled() else _Branch.encode
        features, means = zip(*(encode(branch, x) for branch in self.S_Convs), strict=True)
        w_time, w_channel = self._weights(torch.stack(means).sum(0))
        weights = w_time[..., None] * (w_channel if w_channel.ndim == 4 else w_channel[:, None])  # [S, T, B, C]
        replaced = None
        if self.AZO and self.training:
            replaced = _zoneout_choice(w_time, w_channel, self.RTR, self.RCR)
        if self.observer is not None:
            self.observer(w_time.detach(), w_channel.detach(), replaced)
        if torch.compiler.is_compiling():  # the compiler fuses the equation as it stands
            z = weights[..., None, None] * torch.stack(features)
            return (z if replaced is None else _replace_by_previous(z, replaced)).sum(0)
        are_spikes = all(branch.gives_spikes() for branch in self.S_Convs)
        return _WeightedSum.apply(weights, replaced, are_spikes, *features)

    def _wants_channels_last(self, x: Tensor) -> bool:
        """Whether the branches are faster so: depthwise ones on a CPU (some 3 times), half precision on a GPU."""
        if x.device.type == "cpu":
            return self.groups == "channel"
        return x.is_cuda and torch.is_autocast_enabled("cuda")

    def attention_weights(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the scales from the branch outputs ``[S, T, B, C, H, W]``.

        Returns:
            Time weights ``[S, T, B]`` and channel weights ``[S, T, B, C]`` (``[S, B, C]`` for SMA-L); either sums
            to 1 over the scales.
        """
        return self._weights(reduce(features, "s t b c h w -> s t b c", "mean").sum(0))

    def _weights(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """The same from the squeeze ``g`` ``[T, B, C]``: the mean over H and W of the sum over the scales."""
        return self._time_weights(g), self._channel_weights(g)

    def _time_weights(self, g: Tensor) -> Tensor:
        hidden = torch.relu(_project(self.T_before_attention_conv, reduce(g, "t b c -> b t", "mean")))
        per_scale = torch.stack([_project(conv, hidden) for conv in self.T_after_attention_convs])
        return rearrange(_over_scales(per_scale), "s b t -> s t b")

    def _channel_weights(self, g: Tensor) -> Tensor:
        hidden = torch.relu(_project(self.C_before_attention_conv, g))
        return _over_scales(torch.stack([_project(conv, hidden) for conv in self.C_after_attention_convs]))


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
        groups: int | str = 1,
        checkpoint: bool = False,
    ):
        super().__init__(
            channel, time, kernels, C_reduction, T_reduction, AZO, RCR, RTR, activation, groups, checkpoint
        )

    def _channel_weights(self, g: Tensor) -> Tensor:
        return super()._channel_weights(reduce(g, "t b c -> b c", "mean"))


def _over_scales(scores: Tensor) -> Tensor:
    """Softmax over the scales, in float32 also under autocast: on a GPU autocast does so, on a CPU it does not."""
    return scores.softmax(0, dtype=torch.promote_types(scores.dtype, torch.float32))


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
    groups: int | str,
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
    if groups not in (1, "channel"):
        raise ValueError(f"groups={groups!r} must be 1, the published form, or 'channel', which is depthwise")

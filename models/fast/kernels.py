"""The passes of SMA after its convolutions as Triton kernels, for a GPU. ``loops.py`` has the same four functions.

A tensor is read and written once, in the layout in which the convolutions leave it (``[T, B, C, H, W]`` contiguous, or
each step channels-last). What is computed is float32 whatever is stored (float64 where the parameters are).

A program has a tile of P pixels and some channels of one sample, and goes through all T steps of it: the membrane
potential stays in registers. Nothing is summed in an order that depends on the run: spikes are counted (whole numbers
are exact in float32), and other sums over pixels are made in parts that are added in a fixed order. The backward pass
computes the potentials again, to the same bits: neither pass may fuse a product and a sum (``enable_fp_fusion``).

Triton compiles at the first use and needs a C compiler and Python's headers (``Python.h``) for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["fire", "fire_backward", "most_scales", "weighted_sum", "weighted_sum_backward"]

most_scales = 8  # a byte has a bit for the spike of each
_TILE = 512  # pixels times channels: with 16 steps no kernel needs more registers than an H100 has
_MOST_TILES_IN_A_PART = 8  # of pixels, whose sum one program makes


def fire(
    y: Tensor, scale: Tensor, shift: Tensor, v: Tensor | None, decay: float, threshold: float, spikes: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`models.fast.loops.fire`, for ``y`` in one of the two layouts."""
    tiles = _Tiles(y)
    counts = torch.zeros(y.shape[:3], dtype=scale.dtype, device=y.device)
    last = torch.empty_like(y[0], dtype=scale.dtype)
    with torch.cuda.device_of(y):
        _fire[tiles.grid](
            y, scale, shift, y if v is None else _laid_out_as(v, y[0]), spikes, counts, last, *tiles.sizes,
            decay, threshold, v is not None, **tiles.constants, enable_fp_fusion=False,
        )  # fmt: skip
    return counts / tiles.pixels, last


def fire_backward(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    v: Tensor | None,
    grad_spikes: Tensor | None,
    grad_means: Tensor | None,
    grad_v: Tensor | None,
    decay: float,
    input_scale: float,
    threshold: float,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """:func:`models.fast.loops.fire_backward`."""
    tiles = _Tiles(y)
    grad, grad_first = torch.empty_like(y), torch.empty_like(y[0], dtype=scale.dtype)
    given = (v, y[0]), (grad_spikes, y), (grad_means, None), (grad_v, y[0])
    tensors = [y if one is None else _laid_out_as(one, like) for one, like in given]
    with torch.cuda.device_of(y):
        _fire_backward[tiles.grid](
            y, scale, shift, *tensors, grad, grad_first, *tiles.sizes, decay, input_scale, threshold, alpha,
            *(one is not None for one, _ in given), **tiles.constants, enable_fp_fusion=False,
        )  # fmt: skip
    return grad, grad_first


def weighted_sum(
    features: Sequence[Tensor], current: Tensor, previous: Tensor | None, are_spikes: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """:func:`models.fast.loops.weighted_sum` for at most ``most_scales`` features.

    For the backward pass it returns one byte for the spikes of all scales.
    """
    first = features[0] if _is_channels_last(features[0]) else features[0].contiguous()
    features = [_laid_out_as(f, first) for f in features]
    tiles = _Tiles(features[0])
    out = torch.empty_like(features[0], dtype=torch.promote_types(current.dtype, features[0].dtype))
    bits = torch.empty_like(out, dtype=torch.uint8) if are_spikes else out
    with torch.cuda.device_of(out):
        _weighted_sum[tiles.grid](
            tuple(features), *_both(current, previous), out, bits, *tiles.sizes, previous is not None, are_spikes,
            **tiles.constants,
        )  # fmt: skip
    return out, (bits,) if are_spikes else tuple(features)


def weighted_sum_backward(
    grad: Tensor, current: Tensor, previous: Tensor | None, are_spikes: bool, kept: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """:func:`models.fast.loops.weighted_sum_backward`."""
    S, T, B, C = current.shape
    tiles = _Tiles(kept[0])
    grad = _laid_out_as(grad, kept[0])
    grads = [torch.empty_like(kept[0], dtype=dtype) for _ in range(S)]
    of_pixels = triton.cdiv(tiles.pixels, tiles.constants["BLOCK_P"])
    in_a_part = min(of_pixels, _MOST_TILES_IN_A_PART)
    parts = triton.cdiv(of_pixels, in_a_part)
    sums = current.new_zeros((1 if previous is None else 2, parts, S, T, B, C))
    with torch.cuda.device_of(grad):
        _weighted_sum_backward[(T * B * parts, tiles.grid[1])](
            grad, *_both(current, previous), tuple(kept), tuple(grads), sums[0], sums[-1], *tiles.sizes,
            parts, in_a_part, previous is not None, are_spikes, **tiles.constants,
        )  # fmt: skip
    grad_current, *grad_previous = sums.sum(1)
    return grad_current, grad_previous[0] if grad_previous else None, grads


def _both(current: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weights for a kernel; it reads the second only where ``has_previous`` is set."""
    current = current.contiguous()
    return current, current if previous is None else previous.contiguous()


class _Tiles:
    """How the programs share out a tensor ``[T, B, C, H, W]``: tiles of pixels and channels, each with all T steps."""

    def __init__(self, y: Tensor):
        T, B, C, H, W = y.shape
        self.pixels = H * W
        if _is_channels_last(y):
            strides = B * C * H * W, C * H * W, 1, C
            block_c = min(64, triton.next_power_of_2(C))
        else:
            strides = B * C * H * W, C * H * W, H * W, 1
            block_c = 1
        block_p = min(_TILE // block_c, triton.next_power_of_2(self.pixels))
        self.grid = (B * triton.cdiv(self.pixels, block_p), triton.cdiv(C, block_c))
        self.sizes = (B, C, self.pixels, *strides)
        self.constants = {"T": T, "BLOCK_P": block_p, "BLOCK_C": block_c}


def _is_channels_last(y: Tensor) -> bool:
    return not y.is_contiguous() and y.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def _laid_out_as(x: Tensor, like: Tensor | None) -> Tensor:
    """``x`` with the strides of ``like`` (None: contiguous)."""
    if like is None or x.stride() == like.stride():
        return x.contiguous() if like is None else x
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


@triton.jit
def _tile(C, P, of_b, of_c, of_p, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sample, channels, where the sample begins, where in a sample the tile lies, and which of it is inside.

    Only the beginning needs 64 bits, and it is one number: registers decide how much of a GPU a kernel fills.
    """
    of_pixels = tl.cdiv(P, BLOCK_P)
    b = tl.program_id(0) // of_pixels
    p = tl.program_id(0) % of_pixels * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = p[:, None] * of_p + c[None, :] * of_c
    return b, c, b.to(tl.int64) * of_b, at, (p < P)[:, None] & (c < C)[None, :]


@triton.jit
def _fire(
    y, scale, shift, first, spikes, counts, last,
    B, C, P, step, of_b, of_c, of_p,
    decay: tl.constexpr, threshold: tl.constexpr, has_first: tl.constexpr,
    T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, c, begin, at, inside = _tile(C, P, of_b, of_c, of_p, BLOCK_P, BLOCK_C)
    scale_c = tl.load(scale + c, mask=c < C, other=0.0)[None, :]
    shift_c = tl.load(shift + c, mask=c < C, other=0.0)[None, :]
    v = tl.zeros([BLOCK_P, BLOCK_C], scale.dtype.element_ty)
    if has_first:
        v = tl.load(first + begin + at, mask=inside, other=0.0).to(v.dtype)
    for t in range(T):
        now = begin + tl.cast(step, tl.int64) * t
        u = tl.load(y + now + at, mask=inside, other=0.0).to(v.dtype) * scale_c + shift_c + v * decay
        fires = (u >= threshold) & inside
        v = tl.where(fires, 0.0, u)
        fired = fires.to(v.dtype)
        tl.store(spikes + now + at, fired.to(spikes.dtype.element_ty), mask=inside)
        # Relaxed: any other order is a fence, which empties the L1 cache at every step.
        tl.atomic_add(counts + (t * B + b) * C + c, tl.sum(fired, 0), mask=c < C, sem="relaxed")
    tl.store(last + begin + at, v, mask=inside)


@triton.jit
def _fire_backward(
    y, scale, shift, first, grad_spikes, grad_means, grad_last, grad, grad_first,
    B, C, P, step, of_b, of_c, of_p,
    decay: tl.constexpr, input_scale: tl.constexpr, threshold: tl.constexpr, alpha: tl.constexpr,
    has_first: tl.constexpr, has_spikes: tl.constexpr, has_means: tl.constexpr, has_last: tl.constexpr,
    T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, c, begin, at, inside = _tile(C, P, of_b, of_c, of_p, BLOCK_P, BLOCK_C)
    scale_c = tl.load(scale + c, mask=c < C, other=0.0)[None, :]
    shift_c = tl.load(shift + c, mask=c < C, other=0.0)[None, :]
    v = tl.zeros([BLOCK_P, BLOCK_C], scale.dtype.element_ty)
    if has_first:
        v = tl.load(first + begin + at, mask=inside, other=0.0).to(v.dtype)
    potentials = ()  # before the reset, of all steps, in registers
    for t in tl.static_range(T):
        now = begin + tl.cast(step, tl.int64) * t
        u = tl.load(y + now + at, mask=inside, other=0.0).to(v.dtype) * scale_c + shift_c + v * decay
        potentials = potentials + (u,)  # type: ignore[assignment]  # noqa: RUF005 (Triton knows no unpacking)
        v = tl.where(u >= threshold, 0.0, u)
    grad_v = tl.zeros([BLOCK_P, BLOCK_C], scale.dtype.element_ty)
    if has_last:
        grad_v = tl.load(grad_last + begin + at, mask=inside, other=0.0).to(grad_v.dtype)
    for back in tl.static_range(T):
        now = begin + tl.cast(step, tl.int64) * (T - 1 - back)
        u = potentials[T - 1 - back]
        of_spike = tl.zeros([BLOCK_P, BLOCK_C], scale.dtype.element_ty)
        if has_spikes:
            of_spike += tl.load(grad_spikes + now + at, mask=inside, other=0.0).to(of_spike.dtype)
        if has_means:
            mean = tl.load(grad_means + ((T - 1 - back) * B + b) * C + c, mask=c < C, other=0.0)
            of_spike += (mean.to(of_spike.dtype) / P)[None, :]
        x = (u - threshold) * (1.5707963267948966 * alpha)
        of_u = of_spike * (alpha / 2) / (x * x + 1.0) + tl.where(u < threshold, grad_v, 0.0)
        tl.store(grad + now + at, (of_u * input_scale).to(grad.dtype.element_ty), mask=inside)
        grad_v = of_u * decay
    tl.store(grad_first + begin + at, grad_v, mask=inside)


@triton.jit
def _weighted_sum(
    features, current, previous, out, bits,
    B, C, P, step, of_b, of_c, of_p,
    has_previous: tl.constexpr, are_spikes: tl.constexpr,
    T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, c, begin, at, inside = _tile(C, P, of_b, of_c, of_p, BLOCK_P, BLOCK_C)
    for t in range(T):
        now = begin + tl.cast(step, tl.int64) * t
        total = tl.zeros([BLOCK_P, BLOCK_C], current.dtype.element_ty)
        spikes = tl.zeros([BLOCK_P, BLOCK_C], tl.int32)
        for s in tl.static_range(len(features)):
            weight = ((s * T + t) * B + b) * C + c
            w = tl.load(current + weight, mask=c < C, other=0.0)[None, :]
            f = tl.load(features[s] + now + at, mask=inside, other=0.0)
            total += w * f.to(total.dtype)
            if are_spikes:
                spikes += (f != 0).to(tl.int32) << s
            if has_previous:
                w = tl.load(previous + weight, mask=c < C, other=0.0)[None, :]
                f = tl.load(features[s] + (now - step) + at, mask=inside & (w != 0), other=0.0)
                total += w * f.to(total.dtype)
        tl.store(out + now + at, total.to(out.dtype.element_ty), mask=inside)
        if are_spikes:
            tl.store(bits + now + at, spikes.to(tl.uint8), mask=inside)


@triton.jit
def _weighted_sum_backward(
    grad, current, previous, kept, grads, current_sums, previous_sums,
    B, C, P, step, of_b, of_c, of_p, parts, in_a_part,
    has_previous: tl.constexpr, are_spikes: tl.constexpr,
    T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % parts
    t = tl.program_id(0) // parts // B
    b = tl.program_id(0) // parts % B
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    now = t.to(tl.int64) * step + b.to(tl.int64) * of_b
    for s in tl.static_range(len(grads)):
        weight = ((s * T + t) * B + b) * C + c
        sums = part * len(grads) * T * B * C
        w = tl.load(current + weight, mask=c < C, other=0.0)[None, :]
        total = tl.zeros([BLOCK_P, BLOCK_C], current.dtype.element_ty)
        next_w = tl.zeros([1, BLOCK_C], current.dtype.element_ty)
        next_total = tl.zeros([BLOCK_P, BLOCK_C], current.dtype.element_ty)
        if has_previous:
            next_w = tl.load(previous + weight + B * C, mask=(c < C) & (t + 1 < T), other=0.0)[None, :]
        for i in range(in_a_part):
            p = (part * in_a_part + i) * BLOCK_P + tl.arange(0, BLOCK_P)
            at = p[:, None] * of_p + c[None, :] * of_c
            inside = (p < P)[:, None] & (c < C)[None, :]
            if are_spikes:
                f = ((tl.load(kept[0] + now + at, mask=inside, other=0) >> s) & 1).to(total.dtype)
            else:
                f = tl.load(kept[s] + now + at, mask=inside, other=0.0).to(total.dtype)
            g = tl.load(grad + now + at, mask=inside, other=0.0).to(total.dtype)
            total += g * f
            of_feature = g * w
            if has_previous:
                g = tl.load(grad + (now + step) + at, mask=inside & (next_w != 0), other=0.0).to(total.dtype)
                next_total += g * f
                of_feature += g * next_w
            tl.store(grads[s] + now + at, of_feature.to(grads[s].dtype.element_ty), mask=inside)
        tl.store(current_sums + sums + weight, tl.sum(total, 0), mask=c < C)
        if has_previous:
            tl.store(previous_sums + sums + weight + B * C, tl.sum(next_total, 0), mask=(c < C) & (t + 1 < T))

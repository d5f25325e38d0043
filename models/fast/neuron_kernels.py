"""The LIF neurons of both families of networks as Triton kernels, for a GPU.

``models/neurons.py`` has the same functions in PyTorch and uses these where they run. A program takes a block of
neurons through all T steps, so the membrane potential stays in registers; it is float32 whatever is stored (float64
where the input is). Backward computes the potentials again from the input, which is all that is kept. The operations
and their order are SpikingJelly's, and no multiplication is fused with an addition, so spikes are the same bits.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["fire", "fire_backward", "run_on"]

_BLOCK = 1024  # neurons of a program
_MOST_POTENTIALS = 4096  # that a program keeps in backward, of all T steps: 32 registers of a thread
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def run_on(device: torch.device) -> bool:
    """Whether the kernels can be tried on ``device``: a GPU, or anything under ``TRITON_INTERPRET=1``."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def fire(x: Tensor, v: Tensor | None, tau: float, decay_input: bool, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """LIF neurons with a hard reset to 0.

    The potential of a step is ``v + (x - v) / tau`` with ``decay_input`` and ``(1 - 1 / tau) * v + x`` without.

    Args:
        x: inputs, ``[T, ...]``; ``tau`` other than a power of two rounds differently from a division.
        v: the first potential, ``[...]``; None: 0.

    Returns:
        Spikes like ``x``, the last potential, and ``x`` in the layout that :func:`fire_backward` needs.
    """
    x = x if _is_dense(x) else x.contiguous()
    spikes = _steps_like(x)
    last = torch.empty_like(x[0], dtype=torch.promote_types(x.dtype, torch.float32))
    neurons = x[0].numel()
    with torch.cuda.device_of(x):
        _fire[(triton.cdiv(neurons, _BLOCK),)](
            x, last if v is None else _laid_out_as(v, x[0]), spikes, last, neurons, x.stride(0), spikes.stride(0),
            1.0 - 1.0 / tau, 1.0 / tau, threshold, decay_input, v is not None, len(x), _BLOCK, **_OPTIONS,
        )  # fmt: skip
    return spikes, last, x


def fire_backward(
    x: Tensor,
    v: Tensor | None,
    grad_spikes: Tensor | None,
    grad_last: Tensor | None,
    tau: float,
    decay_input: bool,
    threshold: float,
    alpha: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of :func:`fire` for ``x``, ``[T, ...]``, and for ``v``.

    A reset passes no gradient on.

    Args:
        x: as :func:`fire` returns it.
        grad_spikes, grad_last: of the spikes and of the last potential; None: 0.
        alpha: of the ATan surrogate; None: the rectangular one, 1 where ``|u - threshold| < 0.5``.
    """
    grad = _steps_like(x)
    grad_first = None if v is None else torch.empty_like(x[0], dtype=torch.promote_types(x.dtype, torch.float32))
    first, of_last = (x if one is None else _laid_out_as(one, x[0]) for one in (v, grad_last))
    of_spikes = x if grad_spikes is None else _laid_out_as(grad_spikes, grad)
    neurons = x[0].numel()
    block = max(128, min(_BLOCK, triton.next_power_of_2(_MOST_POTENTIALS // len(x))))
    with torch.cuda.device_of(x):
        _fire_backward[(triton.cdiv(neurons, block),)](
            x, first, of_spikes, of_last, grad, grad if grad_first is None else grad_first,
            neurons, x.stride(0), grad.stride(0), 1.0 - 1.0 / tau, 1.0 / tau, threshold, decay_input,
            alpha or 0.0, alpha is None, v is not None, grad_spikes is not None, grad_last is not None, len(x), block,
            **_OPTIONS,
        )  # fmt: skip
    return grad, grad_first


def _is_dense(x: Tensor) -> bool:
    """Whether every step fills one piece of memory: contiguous or channels-last; equal steps may share theirs."""
    step = x[0]
    fills = step.is_contiguous() or (step.ndim == 4 and step.is_contiguous(memory_format=torch.channels_last))
    return fills and (len(x) == 1 or x.stride(0) in (0, step.numel()))


def _steps_like(x: Tensor) -> Tensor:
    """Memory for all steps, each laid out as those of ``x``."""
    return x.new_empty_strided(x.shape, (x[0].numel(), *x.stride()[1:]))


def _laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    return x if x.stride() == like.stride() else torch.empty_like(like, dtype=x.dtype).copy_(x)


@triton.jit
def _charge(x, v, decay: tl.constexpr, gain: tl.constexpr, decay_input: tl.constexpr):
    if decay_input:
        return v + (x - v) * gain
    else:
        return v * decay + x


@triton.jit
def _fire(
    x, first, spikes, last, N, step_of_x, step,
    decay: tl.constexpr, gain: tl.constexpr, threshold: tl.constexpr, decay_input: tl.constexpr,
    has_first: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    v = tl.zeros([BLOCK], last.dtype.element_ty)
    if has_first:
        v = tl.load(first + at, mask=inside, other=0.0).to(v.dtype)
    for t in range(T):
        charge = tl.load(x + tl.cast(step_of_x, tl.int64) * t + at, mask=inside, other=0.0).to(v.dtype)
        u = _charge(charge, v, decay, gain, decay_input)
        fires = u >= threshold
        v = tl.where(fires, 0.0, u)
        fired = fires.to(v.dtype).to(spikes.dtype.element_ty)  # the interpreter cannot make bfloat16 of a truth
        tl.store(spikes + tl.cast(step, tl.int64) * t + at, fired, mask=inside)
    tl.store(last + at, v, mask=inside)


@triton.jit
def _fire_backward(
    x, first, grad_spikes, grad_last, grad, grad_first, N, step_of_x, step,
    decay: tl.constexpr, gain: tl.constexpr, threshold: tl.constexpr, decay_input: tl.constexpr,
    alpha: tl.constexpr, rectangular: tl.constexpr,
    has_first: tl.constexpr, has_spikes: tl.constexpr, has_last: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    real: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    v = tl.zeros([BLOCK], real)
    if has_first:
        v = tl.load(first + at, mask=inside, other=0.0).to(real)
    potentials = ()  # before the reset, of all steps, in registers
    for t in tl.static_range(T):
        charge = tl.load(x + tl.cast(step_of_x, tl.int64) * t + at, mask=inside, other=0.0).to(real)
        u = _charge(charge, v, decay, gain, decay_input)
        potentials = potentials + (u,)  # type: ignore[assignment]  # noqa: RUF005 (Triton knows no unpacking)
        v = tl.where(u >= threshold, 0.0, u)
    grad_v = tl.zeros([BLOCK], real)
    if has_last:
        grad_v = tl.load(grad_last + at, mask=inside, other=0.0).to(real)
    for back in tl.static_range(T):
        now = tl.cast(step, tl.int64) * (T - 1 - back)
        u = potentials[T - 1 - back]
        of_u = tl.where(u < threshold, grad_v, 0.0)
        if has_spikes:
            of_spike = tl.load(grad_spikes + now + at, mask=inside, other=0.0).to(real)
            if rectangular:
                of_u += tl.where(tl.abs(u - threshold) < 0.5, of_spike, 0.0)
            else:
                above = (u - threshold) * (1.5707963267948966 * alpha)
                of_u += of_spike * (alpha / 2) / (above * above + 1.0)
        of_x = of_u
        if decay_input:
            of_x = of_u * gain
        tl.store(grad + now + at, of_x.to(grad.dtype.element_ty), mask=inside)
        grad_v = of_u * decay
    if has_first:
        tl.store(grad_first + at, grad_v, mask=inside)

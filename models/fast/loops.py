"""The passes of SMA after its convolutions in PyTorch: loops over the steps, made for a CPU.

A pass over memory costs more than the arithmetic. So a step is finished while it is in the cache, and no feature map is
made that can be avoided: every new one costs its page faults, too. ``kernels.py`` has the same functions for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["fire", "fire_backward", "pack", "unpack", "weighted_sum", "weighted_sum_backward"]


def fire(
    y: Tensor, scale: Tensor, shift: Tensor, v: Tensor | None, decay: float, threshold: float, spikes: Tensor
) -> tuple[Tensor, Tensor | None]:
    """LIF neurons with a hard reset to 0 on ``u_t = decay * v_{t-1} + scale * y_t + shift``.

    Args:
        y: ``[T, B, C, H, W]``.
        scale, shift: ``[C, 1, 1]``; potentials have their type.
        v: the first potential, ``[B, C, H, W]``; None: 0.
        decay: what stays of a potential in a step.
        threshold: a neuron fires where its potential reaches it.
        spikes: where the spikes are written to, like ``y``; may be ``y``.

    Returns:
        The means of the spikes over H and W, ``[T, B, C]``, and the last potential.
    """
    means = y.new_empty(y.shape[:3])
    for t in range(len(y)):
        u = _potential(y[t], scale, shift, v, decay)
        v = _reset(u, torch.ge(u, threshold, out=spikes[t]))
        torch.mean(spikes[t], (-2, -1), out=means[t])
    return means, v


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
) -> tuple[Tensor, Tensor | None]:
    """Gradients of :func:`fire` for ``scale * y + shift``, times ``input_scale``, like ``y``, and for ``v``.

    Args:
        y, scale, shift, v, decay, threshold: as :func:`fire` had them.
        grad_spikes, grad_means, grad_v: gradients of the spikes and of the two results; None: 0.
        input_scale: what the neuron multiplies its input by.
        alpha: of the surrogate gradient ATan. A reset passes no gradient on.
    """
    potentials = torch.empty_like(y, dtype=scale.dtype)  # before the reset; then, step by step, the gradient
    for t in range(len(y)):
        u = _potential(y[t], scale, shift, v, decay, out=potentials[t])
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
        torch.mul(slope, input_scale, out=u)
        grad_v = slope.mul_(decay)
    return potentials.to(y.dtype), grad_v


def _potential(
    y: Tensor, scale: Tensor, shift: Tensor, v: Tensor | None, decay: float, out: Tensor | None = None
) -> Tensor:
    """The potential of one step before the reset, ``[B, C, H, W]``."""
    u = torch.mul(y, scale, out=out).add_(shift)
    return u if v is None else u.add_(v, alpha=decay)


def _reset(u: Tensor, spikes: Tensor) -> Tensor:
    """``u - u * spikes``: products are several times faster than masks."""
    return torch.addcmul(u, u, spikes.to(u.dtype), value=-1.0)


def weighted_sum(
    features: Sequence[Tensor], current: Tensor, previous: Tensor | None, are_spikes: bool
) -> tuple[Tensor, Sequence[Tensor]]:
    """``out_t = sum over s of current_s,t * f_s,t + previous_s,t * f_s,t-1``.

    Args:
        features: of every scale, ``[T, B, C, H, W]``.
        current, previous: weights ``[S, T, B, C]``; ``previous`` of step 0 is 0, and None is 0 throughout.
        are_spikes: whether the features are 0 or 1.

    Returns:
        The sum, in the wider type of weights and features, and what :func:`weighted_sum_backward` needs: the features,
        or a bit for each spike.
    """
    out = torch.empty_like(features[0], dtype=torch.promote_types(current.dtype, features[0].dtype))
    takes = _takes_previous(current, previous)
    for t, sum_of_step in enumerate(out):
        torch.mul(features[0][t], current[0, t, ..., None, None], out=sum_of_step)
        for s, f in enumerate(features):
            if s > 0:
                sum_of_step.addcmul_(f[t], current[s, t, ..., None, None])
            if previous is not None and takes[s][t]:
                sum_of_step.addcmul_(f[t - 1], previous[s, t, ..., None, None])
    return out, [pack(f) for f in features] if are_spikes else features


def weighted_sum_backward(
    grad: Tensor, current: Tensor, previous: Tensor | None, are_spikes: bool, kept: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of :func:`weighted_sum` for ``current``, ``previous`` and the features.

    Args:
        grad: of the sum, ``[T, B, C, H, W]``.
        current, previous, are_spikes: as :func:`weighted_sum` had them.
        kept: what it returned.
        dtype: type of the features and of their gradients.
    """
    takes = _takes_previous(current, previous)
    grad_current, grad_previous = torch.zeros_like(current), torch.zeros_like(current)
    grads = [torch.empty_like(grad, dtype=dtype) for _ in kept]
    for t in range(len(grad)):
        for s, kept_of_scale in enumerate(kept):
            f = unpack(kept_of_scale[t], grad[t]) if are_spikes else kept_of_scale[t]
            grad_current[s, t] = (grad[t] * f).sum((-2, -1))
            torch.mul(grad[t], current[s, t, ..., None, None], out=grads[s][t])
            if previous is not None and t + 1 < len(grad) and takes[s][t + 1]:
                grad_previous[s, t + 1] = (grad[t + 1] * f).sum((-2, -1))
                grads[s][t].addcmul_(grad[t + 1], previous[s, t + 1, ..., None, None])
    return grad_current, grad_previous, grads


def _takes_previous(current: Tensor, previous: Tensor | None) -> list[list[bool]]:
    """By scale and step, whether anything is taken of the step before. A GPU would have to wait: there it may be."""
    S, T = current.shape[:2]
    if previous is None:
        return [[False] * T] * S
    if previous.device.type != "cpu" or type(previous) is not Tensor:  # a fake tensor has no values
        return [[False] + [True] * (T - 1)] * S
    return previous.flatten(2).any(2).tolist()


def pack(spikes: Tensor) -> Tensor:
    """Spikes ``[T, ...]`` as bits ``[T, bytes]``: bit j of byte i is spike ``j * bytes + i`` of its step."""
    powers = 2.0 ** torch.arange(8, dtype=spikes.dtype, device=spikes.device)
    steps = [nn.functional.pad(step.flatten(), (0, -step.numel() % 8)).view(8, -1) for step in spikes]
    return torch.stack([(powers @ step).to(torch.uint8) for step in steps])


def unpack(bits: Tensor, like: Tensor) -> Tensor:
    """The spikes of a step, packed by :func:`pack`, in shape and type of ``like``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)[:, None]
    return ((bits >> shifts) & 1).flatten()[: like.numel()].view(like.shape).to(like.dtype)

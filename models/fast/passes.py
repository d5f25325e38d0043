"""The two passes of SMA after its convolutions: BatchNorm with the neurons, and the weighted sum of the scales.

Each keeps as little as it can for the backward pass. Each is there twice: as a function of autograd, whose values come
from ``kernels.py`` or ``loops.py``, and as an equation, which serves where such a function cannot: under the transforms
of ``torch.func``, in ``torch.jit.trace``, and for gradients that are differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .dispatch import functions_work, implementation

__all__ = ["Neuron", "normalize_and_fire", "weighted_sum"]


class Neuron(NamedTuple):
    """A LIF neuron with a hard, detached reset to 0: ``u_t = decay * v_{t-1} + input_scale * x_t``, surrogate ATan."""

    decay: float
    input_scale: float
    threshold: float
    alpha: float

    @staticmethod
    def of(node: Any) -> Neuron:
        """The constants of a ``LIFNode`` of SpikingJelly."""
        input_scale = 1.0 / node.tau if node.decay_input else 1.0
        return Neuron(1.0 - 1.0 / node.tau, input_scale, node.v_threshold, node.surrogate_function.alpha)

    def fire(self, x: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The equation: spikes of ``x`` ``[T, ...]``, starting from the potential ``v`` (None: 0), and the last one."""
        spikes = []
        for step in x.unbind():
            u = self.input_scale * step if v is None else self.decay * v + self.input_scale * step
            fires = (u.detach() >= self.threshold).to(u.dtype)
            surrogate = torch.atan(torch.pi / 2 * self.alpha * (u - self.threshold)) / torch.pi
            spikes.append(fires + (surrogate - surrogate.detach()))  # the value of one, the gradient of the other
            v = u * (1.0 - fires)
        return torch.stack(spikes), v


def normalize_and_fire(y: Tensor, bn: Any, node: Any) -> tuple[Tensor, Tensor]:
    """``node(bn(y))`` in one pass; the statistics of ``bn`` and the potential of ``node`` follow.

    Args:
        y: ``[T, B, C, H, W]``. Without gradients the spikes take its memory.
        bn: with running statistics.
        node: a multi-step LIF neuron, as :func:`models.fast.dispatch.fuses` wants it.

    Returns:
        Spikes like ``y``, and their means over H and W, ``[T, B, C]``.
    """
    v = node.v if torch.is_tensor(node.v) else None  # a number after a reset: 0
    if not functions_work(y, bn.weight, bn.bias):
        spikes, node.v = Neuron.of(node).fire(bn(y.flatten(0, 1)).unflatten(0, y.shape[:2]), v)
        return spikes, spikes.mean((-2, -1))
    mean, var = _statistics(bn, y)
    constants = _Constants(Neuron.of(node), bn.eps, bn.training, overwrite=not torch.is_grad_enabled())
    spikes, means, node.v = _NormalizeAndFire.apply(y, bn.weight, bn.bias, mean, var, v, constants)
    return spikes, means


def _statistics(bn: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[C]`` by which ``bn`` normalises; in training those of ``y``, and the running ones follow."""
    if not bn.training:
        return bn.running_mean, bn.running_var
    bn.num_batches_tracked.add_(1)
    with torch.no_grad():
        return torch.batch_norm_update_stats(y.flatten(0, 1), bn.running_mean, bn.running_var, bn.momentum)


class _Constants(NamedTuple):
    neuron: Neuron
    eps: float
    of_batch: bool  # whether the statistics are those of y
    overwrite: bool


class _NormalizeAndFire(torch.autograd.Function):
    """Keeps nothing but ``y``: backward computes the potentials again, by the same operations to the same bits."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        v: Tensor | None,
        constants: _Constants,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``y`` ``[T, B, C, H, W]``, normalised by ``mean`` and ``var`` ``[C]``; ``v`` is the first potential."""
        ctx.save_for_backward(y, weight, bias, mean, var, v)
        ctx.constants = constants
        ctx.set_materialize_grads(False)  # nothing depends on the last potential, as a rule
        neuron, spikes = constants.neuron, y if constants.overwrite else torch.empty_like(y)
        charge = _charge(weight, bias, mean, var, constants)
        means, v = implementation(y).fire(y, *charge, v, neuron.decay, neuron.threshold, spikes)
        return spikes, means, v

    @staticmethod
    def backward(
        ctx: Any, grad_spikes: Tensor | None, grad_means: Tensor | None, grad_v: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of ``y``, ``weight``, ``bias`` and ``v``."""
        if _differentiated_again(grad_spikes, grad_means, grad_v):
            y, weight, bias, mean, var, v = _unpacked(ctx)
            equation = partial(_normalize_and_fire, mean, var, ctx.constants)
            *grads, of_v = _gradients_of(equation, [y, weight, bias, v], [grad_spikes, grad_means, grad_v])
            return *grads, None, None, of_v, None
        y, weight, bias, mean, var, v = ctx.saved_tensors
        neuron, eps = ctx.constants.neuron, ctx.constants.eps
        grad, grad_v = implementation(y).fire_backward(
            y, *_charge(weight, bias, mean, var, ctx.constants), v, grad_spikes, grad_means, grad_v, *neuron
        )
        grad_y, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad.flatten(0, 1),
            y.flatten(0, 1),
            weight,
            mean,
            var,
            mean,
            (var + eps).rsqrt(),
            ctx.constants.of_batch,
            eps,
            [True, True, True],
        )
        return grad_y.view_as(y), grad_weight, grad_bias, None, None, grad_v if ctx.needs_input_grad[5] else None, None


def _charge(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, constants: _Constants) -> tuple[Tensor, Tensor]:
    """BatchNorm of ``y`` times the neuron's input scale, as ``scale * y + shift``, each ``[C, 1, 1]``."""
    scale = weight * (var + constants.eps).rsqrt()
    charge = torch.stack([scale, bias - mean * scale]) * constants.neuron.input_scale
    return charge[0, :, None, None], charge[1, :, None, None]


def _normalize_and_fire(
    mean: Tensor, var: Tensor, constants: _Constants, y: Tensor, weight: Tensor, bias: Tensor, v: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The equation of :class:`_NormalizeAndFire`."""
    given = (None, None) if constants.of_batch else (mean, var)
    x = y.flatten(0, 1).to(weight.dtype)
    x = nn.functional.batch_norm(x, given[0], given[1], weight, bias, constants.of_batch, 0.0, constants.eps)
    spikes, v = constants.neuron.fire(x.unflatten(0, y.shape[:2]), v)
    return spikes.to(y.dtype), spikes.mean((-2, -1)).to(y.dtype), v


def weighted_sum(features: Sequence[Tensor], weights: Tensor, replaced: Tensor | None, are_spikes: bool) -> Tensor:
    """``out = sum over s of z_s`` with ``z_s = weights_s * f_s``, a step of ``z_s`` replaced by the one before by AZO.

    Args:
        features: of every scale, ``[T, B, C, H, W]``.
        weights: ``[S, T, B, C]``.
        replaced: where AZO acts, ``[S, T, C]`` bool; None: nowhere.
        are_spikes: whether the features are 0 or 1. One bit of them is kept for the backward pass.

    Returns:
        ``[T, B, C, H, W]``.
    """
    if torch.compiler.is_compiling() or not functions_work(weights):  # a compiler fuses the equation as it stands
        return _weighted_sum(weights, replaced, *features)
    return _WeightedSum.apply(weights, replaced, are_spikes, *features)


def _weighted_sum(weights: Tensor, replaced: Tensor | None, *features: Tensor) -> Tensor:
    """The equation of :class:`_WeightedSum`."""
    z = weights[..., None, None] * torch.stack(features)
    if replaced is not None:
        previous = torch.cat([z[:, :1], z[:, :-1]], dim=1)
        z = torch.where(rearrange(replaced, "s t c -> s t 1 c 1 1"), previous, z)
    return z.sum(0)


class _WeightedSum(torch.autograd.Function):
    """A replaced ``z_s[t]`` is ``z_s[t - 1]``, so the sum reads ``f_s[t - 1]`` there, and no ``z`` is ever made."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, replaced: Tensor | None, are_spikes: bool, *features: Tensor) -> Tensor:
        ctx.implementation = implementation(features[0], len(features))
        ctx.are_spikes, ctx.dtype, ctx.scales = are_spikes, features[0].dtype, len(features)
        differentiates = any(ctx.needs_input_grad)
        shares = _shares(weights, replaced)
        out, kept = ctx.implementation.weighted_sum(features, *shares, are_spikes and differentiates)
        if differentiates:
            ctx.save_for_backward(weights, replaced, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``weights`` and of the features."""
        weights, replaced, *kept = ctx.saved_tensors
        if _differentiated_again(grad):
            features = _spikes_again(ctx) if ctx.are_spikes else kept
            of_weights, *of_features = _gradients_of(
                lambda weights, *features: (_weighted_sum(weights, replaced, *features),), [weights, *features], [grad]
            )
            return of_weights, None, None, *of_features
        backward, shares = ctx.implementation.weighted_sum_backward, _shares(weights, replaced)
        of_current, of_previous, grads = backward(grad, *shares, ctx.are_spikes, kept, ctx.dtype)
        if replaced is not None:
            replaced = replaced[:, :, None]
            of_current = of_current * ~replaced
            of_current[:, :-1] += (of_previous * replaced)[:, 1:]
        return of_current, None, None, *grads


def _shares(weights: Tensor, replaced: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a step takes of its own features and of those of the step before (None: nothing), ``[S, T, B, C]``."""
    if replaced is None:
        return weights, None
    of_channels = replaced[:, :, None]  # for every sample of the batch
    previous = torch.zeros_like(weights)
    previous[:, 1:] = weights[:, :-1] * of_channels[:, 1:]
    return weights * ~of_channels, previous


# Gradients of gradients: the backward pass of a pass is then that of its equation.


def _differentiated_again(*grads: Tensor | None) -> bool:
    """In a backward pass: whether autograd records it (``create_graph``) or a transform maps it over many gradients."""
    return not torch.compiler.is_compiling() and (torch.is_grad_enabled() or not functions_work(*grads))


def _gradients_of(
    equation: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of ``equation(*inputs)`` for its inputs, themselves differentiable, from those of its outputs."""
    record = torch.is_grad_enabled()
    with torch.enable_grad():
        cut = [one if one is None else one.view_as(one) for one in inputs]  # what comes before is not followed
        outputs = equation(*cut)
    wanted = [one for one in cut if one is not None and one.requires_grad]
    given = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    outputs, grads = zip(*given, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=record, allow_unused=True))
    return [next(found) if one is not None and one.requires_grad else None for one in cut]


def _spikes_again(ctx: Any) -> list[Tensor]:
    """The features of a weighted sum as functions of what they came from: of themselves only bits were kept."""
    nodes = [node for node, _ in ctx.next_functions[-ctx.scales :]]
    if not all(isinstance(node, _NormalizeAndFire._backward_cls) for node in nodes):
        raise RuntimeError(
            "this gradient of SMA cannot be differentiated again, because a branch is frozen, watched by a hook or has "
            "neurons of another kind; use SMA(..., fast=False)"
        )
    features = []
    for node in nodes:
        y, weight, bias, mean, var, v = _unpacked(node)
        features.append(_normalize_and_fire(mean, var, node.constants, y, weight, bias, v)[0])
    return features


def _unpacked(ctx: Any) -> tuple[Tensor, ...]:
    """``ctx.saved_tensors``, which a checkpoint lets nobody unpack twice."""
    if not hasattr(ctx, "unpacked"):
        ctx.unpacked = ctx.saved_tensors
    return ctx.unpacked

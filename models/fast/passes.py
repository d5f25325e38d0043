"""The two passes of SMA after its convolutions: BatchNorm with the neurons, and the weighted sum of the scales.

Each keeps as little as it can for the backward pass. They are functions of autograd, whose values come from
``kernels.py`` or ``loops.py``; where such functions cannot serve, their equations run (``equations.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import equations
from .dispatch import functions_work, implementation
from .equations import Neuron, differentiated_again, gradients_of

__all__ = ["normalize_and_fire", "weighted_sum"]


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
        if differentiated_again(grad_spikes, grad_means, grad_v):
            *grads, of_v = gradients_of(*_NormalizeAndFire.equation(ctx), [grad_spikes, grad_means, grad_v])
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

    @staticmethod
    def equation(ctx: Any) -> tuple[Callable[..., Sequence[Tensor | None]], list[Tensor | None]]:
        """The pass as an equation, and its inputs with the graph that they come from."""
        if not hasattr(ctx, "unpacked"):  # a checkpoint lets nobody unpack them twice
            ctx.unpacked = ctx.saved_tensors
        y, weight, bias, mean, var, v = ctx.unpacked
        given = {} if ctx.constants.of_batch else {"mean": mean, "var": var}
        more = {"eps": ctx.constants.eps, "neuron": ctx.constants.neuron}
        return partial(equations.normalize_and_fire, **given, **more), [y, weight, bias, v]


def _charge(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, constants: _Constants) -> tuple[Tensor, Tensor]:
    """BatchNorm of ``y`` times the neuron's input scale, as ``scale * y + shift``, each ``[C, 1, 1]``."""
    scale = weight * (var + constants.eps).rsqrt()
    charge = torch.stack([scale, bias - mean * scale]) * constants.neuron.input_scale
    return charge[0, :, None, None], charge[1, :, None, None]


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
        return equations.weighted_sum(weights, replaced, *features)
    return _WeightedSum.apply(weights, replaced, are_spikes, *features)


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
        if differentiated_again(grad):
            features = _spikes_again(ctx) if ctx.are_spikes else kept
            of_weights, *grads = gradients_of(
                lambda weights, *features: [equations.weighted_sum(weights, replaced, *features)],
                [weights, *features],
                [grad],
            )
            return of_weights, None, None, *grads
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


def _spikes_again(ctx: Any) -> list[Tensor | None]:
    """The features of a weighted sum as functions of what they came from: of themselves only bits were kept."""
    nodes = [node for node, _ in ctx.next_functions[-ctx.scales :]]
    if not all(isinstance(node, _NormalizeAndFire._backward_cls) for node in nodes):
        raise RuntimeError(
            "this gradient of SMA cannot be differentiated again, because a branch is frozen, watched by a hook or has "
            "neurons of another kind; use SMA(..., fast=False)"
        )
    passes = [_NormalizeAndFire.equation(node) for node in nodes]
    return [equation(*inputs)[0] for equation, inputs in passes]

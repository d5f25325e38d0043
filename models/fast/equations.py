"""The passes of SMA as equations: what runs where a function of autograd cannot.

That is under the transforms of ``torch.func``, in ``torch.jit.trace``, with forward-mode derivatives, and for gradients
that are differentiated again: the backward pass of a function is then that of its equation (:func:`gradients_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .dispatch import functions_work

__all__ = ["Neuron", "differentiated_again", "gradients_of", "normalize_and_fire", "weighted_sum"]


class Neuron(NamedTuple):
    """A LIF neuron with a hard, detached reset to 0: ``u_t = decay * v_{t-1} + input_scale * x_t``.

    Attributes:
        decay: what stays of a potential in a step.
        input_scale: what an input is multiplied by.
        threshold: a neuron fires where its potential reaches it.
        alpha: of the surrogate gradient ATan; None: 1 where a potential is within 0.5 of the threshold, else 0.
    """

    decay: float
    input_scale: float
    threshold: float
    alpha: float | None

    @staticmethod
    def of(node: Any) -> Neuron:
        """The neuron of a ``LIFNode`` of SpikingJelly."""
        alpha = getattr(node.surrogate_function, "alpha", None)
        return Neuron(1.0 - 1.0 / node.tau, 1.0 / node.tau if node.decay_input else 1.0, node.v_threshold, alpha)

    def fire(self, x: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Spikes of ``x`` ``[T, ...]`` from the first potential ``v`` ``[...]`` (None: 0), and the last potential."""
        spikes = []
        for step in x.unbind():
            u = self.input_scale * step if v is None else self.decay * v + self.input_scale * step
            above = u - self.threshold
            fires = (above.detach() >= 0).to(u.dtype)
            if self.alpha is None:
                surrogate = above.clamp(-0.5, 0.5)
            else:
                surrogate = torch.atan(torch.pi / 2 * self.alpha * above) / torch.pi
            spikes.append(fires + (surrogate - surrogate.detach()))  # the value of one, the gradient of the other
            v = u * (1.0 - fires)
        return torch.stack(spikes), v


def normalize_and_fire(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None,
    neuron: Neuron,
    eps: float,
    mean: Tensor | None = None,
    var: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """BatchNorm and LIF neurons.

    Args:
        y: ``[T, B, C, H, W]``.
        weight, bias: of the BatchNorm, ``[C]``.
        v: the first potential, ``[B, C, H, W]``; None: 0.
        neuron, eps: constants of both.
        mean, var: the statistics, ``[C]``; None: those of ``y``.

    Returns:
        Spikes like ``y``, their means over H and W ``[T, B, C]``, and the last potential.
    """
    x = y.flatten(0, 1).to(weight.dtype)
    x = nn.functional.batch_norm(x, mean, var, weight, bias, mean is None, 0.0, eps)
    spikes, v = neuron.fire(x.unflatten(0, y.shape[:2]), v)
    return spikes.to(y.dtype), spikes.mean((-2, -1)).to(y.dtype), v


def weighted_sum(weights: Tensor, replaced: Tensor | None, *features: Tensor) -> Tensor:
    """``sum over s of weights_s * f_s``, where ``replaced`` of the step before.

    Args:
        weights: ``[S, T, B, C]``.
        replaced: ``[S, T, C]`` bool; None: nowhere.
        features: of every scale, ``[T, B, C, H, W]``.
    """
    z = weights[..., None, None] * torch.stack(features)
    if replaced is not None:
        previous = torch.cat([z[:, :1], z[:, :-1]], dim=1)
        z = torch.where(rearrange(replaced, "s t c -> s t 1 c 1 1"), previous, z)
    return z.sum(0)


def differentiated_again(*grads: Tensor | None) -> bool:
    """In a backward pass: whether autograd records it (``create_graph=True``), or a transform runs it."""
    return not torch.compiler.is_compiling() and (torch.is_grad_enabled() or not functions_work(*grads))


def gradients_of(
    equation: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients for the inputs of an equation, in a form that can be differentiated again.

    Args:
        equation: gives the outputs from the inputs.
        inputs: as a function of autograd unpacks them, so with the graph that they come from.
        grads: of the outputs; None: 0.

    Returns:
        For every input its gradient; None where it is None or needs none.
    """
    record = torch.is_grad_enabled()
    with torch.enable_grad():
        cut = [one if one is None else one.view_as(one) for one in inputs]  # what comes before is not followed
        outputs = equation(*cut)
    wanted = [one for one in cut if one is not None and one.requires_grad]
    given = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    outputs, grads = zip(*given, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=record, allow_unused=True))
    return [next(found) if one is not None and one.requires_grad else None for one in cut]

"""The convolutions of all branches of SMA at once, on a CPU: one transform of the input, products, inverse transforms.

The branches read the same input ``x [N, C, H, W]``, each with a kernel of its own odd size (stride 1, padding k // 2).
For kernels 1, 3, 5, 7 direct convolutions take 84 multiplications a pixel and pair of channels. Here it is 9.5, and
transforms that do not grow with the number of pairs.

**A tile along one axis.** v outputs need h = 7 // 2 more inputs on either side. On these L = v + 2h inputs (of which
the ends are the map's zero padding, if it ends there) take the kernel as periodic: with the discrete Fourier transform
F of length L then ``y = F^-1 (F x * F w)``, and the v outputs in the middle are right (overlap-save). One tile for all
of the axis needs only L = H + h, since the same zeros pad both ends.

**Two axes, real numbers.** Along the columns F takes L real pixels to L real numbers: real and imaginary part of the
frequencies 0 to L/2, the first and the last of which are real. Along the rows it takes these two, for one column
frequency, to L complex numbers ``a + ib``. The kernel has ``c + id`` there; Gauss's three products multiply the two:

    (a + b) c + i (a + b) c        a (d - c) i        - b (c + d)

So with constant real matrices A, B, D, and ``*`` for R products, each on its own, a tile is

    y = D ((A x) * (B w))          A x: a + b, a, b          B w: c, d - c, -(c + d)

With channels each of the R products is a product of matrices, and these are nearly all of the arithmetic. All
transforms are products of matrices, too: any L will do, and at these sizes they are several times faster than FFTs.

**Backward** is the adjoint, with the same matrices: ``grad_x = A' sum over s ((D' grad_y_s) * (B w_s))`` and
``grad_w_s = B' ((A x) * (D' grad_y_s))``. So the branches share the transforms on the side of x in both directions.
Only x and the weights are kept in between.

Shapes, with I x J tiles in a map:

    x              [N, C, H, W]
    columns of x   [L, H, J, n, C]      gather: along the columns, n samples at a time
    A x            [R, I, J, n, C]      encode: along the rows, one column frequency at a time
    B w_s          [R, K, C]
    products       [R, I, J, n, K]      of one column frequency: (A x)_r (B w_s)_r', R products of matrices
    columns of y_s [L, H, J, n, K]      decode: along the rows
    y_s            [N, K, H, W]         scatter: along the columns
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .transforms import Kernel, Transforms, held, transforms
from .workers import empty, in_order, room, share

__all__ = ["applies", "branch_convolutions", "estimate"]

# The cost of one kernel's products, of the transforms of one side times C, and of those of one kernel times the pixels
# of all samples, in multiplications of a direct convolution for a pixel and a pair of channels. Fitted to times on an
# AMD EPYC; `python tools/benchmark.py convolutions` shows how they fit your machine.
PRODUCTS, TRANSFORMS, KERNEL = 4.2, 330.0, 33000.0


def applies(x: Tensor, weights: Sequence[Tensor], samples: int) -> bool:
    """Whether :func:`branch_convolutions` can compute these convolutions, and sooner than one after the other.

    Args:
        x: ``[N, C, H, W]``.
        weights: of every branch.
        samples: the least N that x can have (T of SMA): the choice must not depend on the size of a batch.

    The environment variable ``SMA_CONVOLUTIONS`` overrides the choice where there is one: ``direct`` or ``shared``.
    """
    kernels, C = [weight.shape[-1] for weight in weights], x.shape[1]
    possible = (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and all(
            w.dtype == x.dtype and w.shape[1:] == (C, k, k) and k % 2 for w, k in zip(weights, kernels, strict=True)
        )
        and max(kernels) > 1
    )
    choice = os.environ.get("SMA_CONVOLUTIONS", "")
    if not possible or choice in ("direct", "shared"):
        return possible and choice == "shared"
    return x.dtype == torch.float32 and estimate(kernels, samples, *x.shape[1:]) < 0.8


def estimate(kernels: Sequence[int], N: int, C: int, H: int, W: int) -> float:
    """About which share of the time of direct convolutions :func:`branch_convolutions` takes in training."""
    wide = [k for k in kernels if k > 1]
    shared = PRODUCTS * len(wide) + TRANSFORMS * (1 + len(wide)) / C + KERNEL * len(wide) / (N * H * W)
    return shared / sum(k * k for k in wide)


def branch_convolutions(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """``conv2d(x, weight, bias, padding=k // 2)`` of every branch; that of a 1x1 kernel as it stands.

    Args:
        x: ``[N, C, H, W]``, float32 or float64, on a CPU.
        weights: of branch s ``[K, C, k, k]`` with an odd k.
        biases: ``[K]`` or None.

    Returns:
        ``[N, K, H, W]`` of every branch.
    """
    wide = [s for s, weight in enumerate(weights) if weight.shape[-1] > 1]
    parameters = [weights[s] for s in wide] + [biases[s] for s in wide]
    found = iter(_SharedTransform.apply(x.contiguous(), torch.is_grad_enabled(), *parameters))
    return tuple(
        next(found) if s in wide else nn.functional.conv2d(x, weight, bias)
        for s, (weight, bias) in enumerate(zip(weights, biases, strict=True))
    )


class _SharedTransform(torch.autograd.Function):
    """The algorithm at the top of this file and its adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, trains: bool, *parameters: Any) -> tuple[Tensor, ...]:
        """``x`` contiguous; ``parameters``: the weights of all branches, then their biases."""
        weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        ctx.save_for_backward(x, *weights)
        ctx.set_materialize_grads(False)
        N, _, H, W = x.shape
        t = _transforms_of(x, weights)
        if trains:
            held.clear()  # a training step needs the memory
        kernels = [Kernel(t, weight, hold=not trains) for weight in weights]
        outputs = [empty(x.dtype, N, len(weight), H, W) for weight in weights]

        def multiply(columns: Tensor, results: list[Tensor], frequency: slice) -> None:
            spectrum = t.x.encode(columns, frequency, "A x")
            for kernel, bias, result in zip(kernels, biases, results, strict=True):
                products = room("products", x.dtype, *spectrum.shape[:-1], kernel.K)
                for part, transformed in kernel.spectrum(frequency):
                    torch.bmm(spectrum[part].flatten(1, 3), transformed.mT, out=products[part].flatten(1, 3))
                if frequency.start == 0 and bias is not None:  # a constant is the frequency 0
                    products[0] += bias * t.area
                t.y.decode(products, result, frequency)

        for samples in t.rounds(N):
            columns = t.x.gather(x[samples], "columns of x")
            shape = columns.shape[:-1]
            results = [room(f"columns of y{s}", x.dtype, *shape, one.K) for s, one in enumerate(kernels)]
            share(partial(multiply, columns, results), t.frequencies)
            for result, output in zip(results, outputs, strict=True):
                t.y.scatter(result, output[samples])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and of ``parameters``."""
        x, *weights = ctx.saved_tensors
        present = [s for s, grad in enumerate(grads) if grad is not None]
        adjoint = _direct_adjoint if torch.is_grad_enabled() else _adjoint  # the first can be differentiated again
        grad_x, of_weights, of_biases = adjoint(
            x, [weights[s] for s in present], [grad for grad in grads if grad is not None]
        )
        found: list[Tensor | None] = [grad_x, None, *[None] * (2 * len(weights))]
        for s, of_weight, of_bias in zip(present, of_weights, of_biases, strict=True):
            found[2 + s], found[2 + len(weights) + s] = of_weight, of_bias
        return tuple(grad if needed else None for grad, needed in zip(found, ctx.needs_input_grad, strict=True))


def _transforms_of(x: Tensor, weights: Sequence[Tensor]) -> Transforms:
    return transforms(*x.shape[-2:], max(weight.shape[-1] for weight in weights) // 2, x.dtype)


Gradients = tuple[Tensor | None, list[Tensor], list[Tensor]]  # of x, of the weights and of the biases


def _adjoint(x: Tensor, weights: list[Tensor], grads: list[Tensor]) -> Gradients:
    if not grads:
        return None, [], []
    grads = [grad.contiguous() for grad in grads]
    t = _transforms_of(x, weights)
    kernels = [Kernel(t, weight) for weight in weights]
    grad_x = empty(x.dtype, *x.shape).zero_()
    grad_biases = [x.new_zeros(len(weight)) for weight in weights]

    def multiply(columns: Tensor, results: list[Tensor], frequency: slice) -> list[Tensor]:
        spectrum = t.x.encode(columns, frequency, "A x")
        grad_spectrum = room("gradient of A x", x.dtype, *spectrum.shape)
        of_kernels = []
        for s, (kernel, result) in enumerate(zip(kernels, results, strict=True)):
            grad = t.y.encode(result, frequency, "products")
            of_kernels.append(kernel.empty_gradient(frequency))
            for part, transformed in kernel.spectrum(frequency):
                of_part = grad[part].flatten(1, 3)
                grad_spectrum[part].flatten(1, 3).baddbmm_(of_part, transformed, beta=int(s > 0))
                torch.bmm(of_part.mT, spectrum[part].flatten(1, 3), out=transformed)
                kernel.add_part(of_kernels[s], part, transformed)
            if frequency.start == 0:
                grad_biases[s] += grad[0].sum((0, 1, 2)) * t.area
        t.x.decode(grad_spectrum, columns, frequency)  # in the place of what was encoded
        return of_kernels

    for samples in t.rounds(len(x)):
        columns = t.x.gather(x[samples], "columns of x")
        results = [t.y.gather(grad[samples], f"columns of y{s}") for s, grad in enumerate(grads)]
        by_frequency = in_order(partial(multiply, columns, results), t.frequencies)
        for frequency, of_kernels in zip(t.frequencies, by_frequency, strict=True):
            for kernel, grad in zip(kernels, of_kernels, strict=True):
                kernel.add_gradient(grad, frequency)
        t.x.scatter(columns, grad_x[samples])
    return grad_x, [kernel.gradient() for kernel in kernels], grad_biases


def _direct_adjoint(x: Tensor, weights: list[Tensor], grads: list[Tensor]) -> Gradients:
    """The same by torch, whose gradients have gradients."""
    found = [
        torch.ops.aten.convolution_backward(
            grad, x, weight, [len(weight)], [1, 1], [weight.shape[-1] // 2] * 2, [1, 1], False, [0, 0], 1, [True] * 3
        )
        for weight, grad in zip(weights, grads, strict=True)
    ]
    of_x, of_weights, of_biases = zip(*found, strict=True)
    return sum(of_x[1:], of_x[0]), list(of_weights), list(of_biases)

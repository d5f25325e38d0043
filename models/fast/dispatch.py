"""Which form of SMA's passes runs where: the one place that decides."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import loops

try:
    from . import kernels
except ImportError:  # no Triton on this machine
    kernels = None  # type: ignore[assignment]

__all__ = ["fires", "functions_work", "fuses", "has_kernels", "implementation", "is_watched"]


def functions_work(*tensors: Tensor | None) -> bool:
    """Whether our functions of autograd can be applied: not in ``torch.jit.trace`` (they could not be saved), not under
    a transform of ``torch.func``, and not to what carries a forward-mode derivative. Elsewhere the equations run. So
    they do under ``torch.compile``, which fuses them; an exported program has the operations of the functions.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    # There is no public question for a transform; this is what torch.autograd.Function itself asks.
    return not (
        torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or any(forward_ad.unpack_dual(one).tangent is not None for one in tensors if one is not None)
    )


def fuses(bn: nn.Module, node: Any, y: Tensor) -> bool:
    """Whether a BatchNorm and the neurons behind it can be one pass over ``y`` ``[T, B, C, H, W]``.

    On a GPU without kernels the neurons of SpikingJelly, which may have some, are the faster ones.
    """
    return (
        fires(node)
        and not node.store_v_seq
        and type(bn) is nn.BatchNorm2d
        and bn.affine
        and bn.track_running_stats
        and bn.momentum is not None
        and (y.device.type == "cpu" or not functions_work(y) or implementation(y) is not loops)
    )


def fires(node: Any) -> bool:
    """Whether this is a neuron that the fused pass knows, so that its output is 0 or 1."""
    return (
        (type(node) is neuron.LIFNode or getattr(node, "computes_lif", False))
        and isinstance(node.surrogate_function, surrogate.ATan)
        and node.surrogate_function.spiking
        and node.step_mode == "m"
        and node.v_reset == 0.0
        and node.detach_reset
        and getattr(node, "fast", True)
    )


def is_watched(module: nn.Module) -> bool:
    """Whether a hook wants to see what this module or one inside takes and gives: then all of them are called."""
    return torch.nn.modules.module._has_any_global_hook() or any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in module.modules()
    )


def implementation(x: Tensor, scales: int = 1) -> ModuleType:
    """The module with the passes over ``x`` ``[T, B, C, H, W]``: ``kernels`` or ``loops``."""
    if not x.is_cuda or kernels is None or torch.compiler.is_compiling():
        return loops
    channels_last = not x.is_contiguous()
    return kernels if scales <= kernels.most_scales and has_kernels(x.device, x.dtype, channels_last) else loops


_works: dict[tuple[torch.device, torch.dtype, bool], bool] = {}


def has_kernels(device: torch.device, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> bool:
    """Whether the Triton kernels work: seen at the first use, on a small problem that PyTorch solves, too.

    Args:
        device: where they would run.
        dtype, channels_last: of the feature maps.

    Returns:
        False, with a warning, where they raise or compute something else. Without memory for the trial they are left
        out this time only.
    """
    if kernels is None or type(torch.empty(0)) is not Tensor:  # fake tensors have no values to compare
        return False
    case = device, dtype, channels_last
    if case not in _works:
        try:
            with torch.no_grad():
                compare_kernels(*case)
            _works[case] = True
        except torch.OutOfMemoryError:
            return False
        except Exception as error:  # Triton fails in many ways: no compiler, no driver, a GPU that it does not know
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            warnings.warn(f"SMA runs without its Triton kernels on {device} ({what}): the same, slower", stacklevel=2)
            _works[case] = False
    return _works[case]


def compare_kernels(
    device: torch.device, dtype: torch.dtype, channels_last: bool, shape: tuple[int, ...] = (3, 2, 5, 6, 7)
) -> None:
    """Every kernel on a problem of ``shape`` ``[T, B, C, H, W]`` with carried potentials, half of it AZO's.

    Raises:
        RuntimeError: one of them gives something else than PyTorch.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator).to(device)
        if len(shape) < 5:
            return x
        form = torch.channels_last if channels_last else torch.contiguous_format
        return x.to(dtype).flatten(0, 1).contiguous(memory_format=form).unflatten(0, shape[:2])

    T, B, C = shape[:3]
    y, grad, grad_means, v = random(*shape), random(*shape), random(T, B, C), random(*shape[1:])
    scale, shift, current, previous = random(C, 1, 1), random(C, 1, 1), random(2, T, B, C), random(2, T, B, C)
    previous[:, 0] = previous[1] = 0
    results = []
    for passes in (loops, kernels):
        spikes = torch.empty_like(y)
        means, last = passes.fire(y, scale, shift, v, 0.5, 1.0, spikes)
        grad_y, grad_v = passes.fire_backward(y, scale, shift, v, grad, grad_means, v, 0.5, 0.5, 1.0, 2.0)
        out, kept = passes.weighted_sum([spikes, 1 - spikes], current, previous, True)
        grad_current, _, grads = passes.weighted_sum_backward(grad, current, previous, True, kept, dtype)
        results.append([spikes, means, last, grad_y, grad_v, out, grad_current, *grads])
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 2e-2
    for expected, found in zip(*results, strict=True):
        if not torch.allclose(found.float(), expected.float(), rtol=tolerance, atol=tolerance / 10):
            raise RuntimeError("a kernel computes something else than PyTorch")

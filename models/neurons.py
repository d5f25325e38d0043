"""How the LIF neurons of the networks are made and which kernels run them.

The only file that knows the difference between the two generations of SpikingJelly: 0.0.0.0.14, whose neurons choose
between a PyTorch and a CuPy backend, and 2.x, which has no CuPy code and picks its own kernels.
"""

from __future__ import annotations

import importlib.metadata
import types
import warnings

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    # 0.0.0.0.14 compiles its neurons with torch.jit.script, of which current torch warns once in every process.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

__all__ = ["BackendError", "lif", "per_step", "reset_net", "select_backend", "spikingjelly_version"]

reset_net = functional.reset_net  # after every batch: forget the membrane potentials
per_step = layer.SeqToANNContainer  # a plain layer on every step at once: [T, B, ...] as [T * B, ...] and back


class BackendError(ValueError):
    """The wanted backend cannot run here; the message is one sentence that says why and what can."""


def spikingjelly_version() -> str:
    """The installed version of SpikingJelly."""
    return importlib.metadata.version("spikingjelly")


def _has_backends() -> bool:
    """True for SpikingJelly 0.0.0.0.14, where a neuron has a ``backend``."""
    return hasattr(functional, "set_backend")


class _LIFSequence(torch.autograd.Function):
    """All steps of the LIF neuron of :func:`lif` on a CPU, with the surrogate gradient of ATan and a detached reset.

    The same operations in the same order as SpikingJelly's, so the same bits forward. SpikingJelly lets autograd
    record some ten small operations a step, and the backward of every ``x[t]`` fills a tensor of all steps with zeros.
    Here only the potential before the reset is kept, and the backward has one pass over it.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, v: Tensor, tau: float, threshold: float, alpha: float
    ) -> tuple[Tensor, Tensor]:
        """Inputs ``x`` ``[T, ...]`` and the potential ``v`` ``[...]`` to spikes ``[T, ...]`` and the last potential."""
        potentials = torch.empty_like(x)  # before the reset
        spikes = torch.empty_like(x)
        for t in range(x.shape[0]):
            torch.sub(x[t], v, out=potentials[t])
            potentials[t].div_(tau).add_(v)
            fired = potentials[t] >= threshold
            spikes[t] = fired
            v = potentials[t].masked_fill(fired, 0.0)
        ctx.save_for_backward(potentials)
        ctx.tau, ctx.threshold, ctx.alpha = tau, threshold, alpha
        return spikes, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_spikes: Tensor, grad_v: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs and of the first potential."""
        (potentials,) = ctx.saved_tensors
        # ATan: d spike / d u = (alpha / 2) / (1 + (pi / 2 * alpha * (u - threshold))^2), for all steps at once.
        grad_x = (potentials - ctx.threshold).mul_(torch.pi / 2 * ctx.alpha).square_().add_(1.0).reciprocal_()
        grad_x.mul_(ctx.alpha / 2).mul_(grad_spikes)
        for t in reversed(range(len(potentials))):
            kept = grad_v.masked_fill(potentials[t] >= ctx.threshold, 0.0)  # a reset passes no gradient on
            grad_x[t].add_(kept).div_(ctx.tau)
            # u = x / tau + (1 - 1 / tau) v
            grad_v = grad_x[t] * (ctx.tau - 1.0)
        return grad_x, grad_v, None, None, None


class _LIFNode(neuron.LIFNode):
    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        if x_seq.device.type == "cpu" and not self.store_v_seq:
            v = self.v if torch.is_tensor(self.v) else torch.zeros_like(x_seq[0])
            spikes, self.v = _LIFSequence.apply(x_seq, v, self.tau, self.v_threshold, self.surrogate_function.alpha)
            return spikes
        # The CuPy kernels of 0.0.0.0.14 know float32 and float16 only, and raise on bfloat16 autocast.
        if x_seq.dtype == torch.bfloat16 and getattr(self, "backend", "torch") == "cupy":
            return super().multi_step_forward(x_seq.float()).to(torch.bfloat16)
        return super().multi_step_forward(x_seq)


def lif() -> nn.Module:
    """The multi-step LIF neuron of SMA-VGG8, ``[T, ...]`` to spikes of the same shape.

    ``tau=2, v_threshold=1, v_reset=0``, input decayed, reset detached, ATan surrogate (alpha 2): the neuron of the
    published networks on event data.
    """
    return _LIFNode(
        tau=2.0, v_threshold=1.0, v_reset=0.0, detach_reset=True, surrogate_function=surrogate.ATan(), step_mode="m"
    )


def select_backend(net: nn.Module, wanted: str, device: torch.device) -> str:
    """Let the neurons of ``net`` run on the wanted backend.

    Args:
        net: a network whose neurons are SpikingJelly's.
        wanted: ``"auto"`` (the fastest that works), ``"cupy"`` or ``"torch"``.
        device: where the network will run.

    Returns:
        The backend really used, in words for the header of a run, with the reason where it is not the fastest.

    Raises:
        BackendError: ``wanted`` is ``"cupy"`` and CuPy cannot be used; the message has the real reason.
    """
    if not _has_backends():
        return _select_in_2x(wanted, device)
    if wanted == "torch":
        problem = "asked for"
    elif device.type != "cuda":
        problem = f"the device is {device}, and CuPy needs a CUDA GPU"
    else:
        problem = _cupy_problem(device)
    if problem is None:
        functional.set_backend(net, "cupy", instance=neuron.LIFNode)
        return "cupy"
    if wanted == "cupy":
        raise BackendError(f"--backend cupy cannot be used: {problem}; use --backend auto or torch")
    return (
        "torch"
        if device.type != "cuda"
        else f"torch ({problem})"
        if wanted == "torch"
        else f"torch (no CuPy: {problem})"
    )


def _select_in_2x(wanted: str, device: torch.device) -> str:
    version = spikingjelly_version()
    if wanted == "cupy":
        raise BackendError(
            f"--backend cupy cannot be used: SpikingJelly {version} has no CuPy code; use --backend auto, "
            "or install spikingjelly==0.0.0.0.14"
        )
    if device.type != "cuda":
        return "torch"
    try:
        from spikingjelly._ops.lif import _selection

        if wanted == "torch":
            _selection._requested = "torch"
        return f"{_selection._select(device.index or 0).name} (kernels of SpikingJelly {version})"
    except (ImportError, AttributeError) as error:  # another 2.x may arrange this differently
        if wanted == "torch":
            raise BackendError(
                f"--backend torch cannot be chosen in SpikingJelly {version} ({error}); use --backend auto"
            ) from error
        return f"chosen by SpikingJelly {version}"


def _cupy_problem(device: torch.device) -> str | None:
    """Why the CuPy backend of 0.0.0.0.14 cannot be used on ``device``; None when a trial step worked."""
    try:
        import cupy  # noqa: F401
        from spikingjelly.activation_based.auto_cuda import base

        _mend_numpy_int(base)
        trial = lif()
        trial.backend = "cupy"
        trial(torch.ones(2, 2, device=device, requires_grad=True)).sum().backward()
        torch.cuda.synchronize(device)
    except Exception as error:  # CuPy fails in many ways: no package, no driver, no compiler, another CUDA
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _mend_numpy_int(base: types.ModuleType) -> None:
    """Give SpikingJelly 0.0.0.0.14's kernel code the ``np.int`` that numpy removed in 1.24.

    Its argument check compares dtypes with ``np.int`` and raises AttributeError on the first GPU step. The name
    ``np`` of that one module is replaced by a view of numpy that has it; numpy and the package stay untouched.
    """
    if not hasattr(base.np, "int"):
        base.np = types.SimpleNamespace(**vars(base.np), int=int)

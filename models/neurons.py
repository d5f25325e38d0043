"""How the LIF neurons of the networks are made and which kernels run them.

The only file that knows the difference between the two generations of SpikingJelly: 0.0.0.0.14, whose neurons choose
between a PyTorch and a CuPy backend, and 2.x, which has no CuPy code and picks its own kernels.
"""

from __future__ import annotations

import importlib.metadata
import types
import warnings
from functools import partial

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    # 0.0.0.0.14 compiles its neurons with torch.jit.script, of which current torch warns once in every process.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

__all__ = [
    "BackendError",
    "Rectangle",
    "dropout",
    "lif",
    "ms_lif",
    "multi_dimensional_attention",
    "per_step",
    "reset_net",
    "select_backend",
    "spikingjelly_version",
    "temporal_wise_attention",
]

reset_net = functional.reset_net  # after every batch: forget the membrane potentials
dropout = partial(layer.Dropout, step_mode="m")  # one mask for all T steps, drawn anew after every reset
per_step = layer.SeqToANNContainer  # a plain layer on every step at once: [T, B, ...] as [T * B, ...] and back


class BackendError(ValueError):
    """The wanted backend cannot run here; the message is one sentence that says why and what can."""


def spikingjelly_version() -> str:
    """The installed version of SpikingJelly."""
    return importlib.metadata.version("spikingjelly")


def _has_backends() -> bool:
    """True for SpikingJelly 0.0.0.0.14, where a neuron has a ``backend``."""
    return hasattr(functional, "set_backend")


class Rectangle(nn.Module):
    """Surrogate function of the ImageNet networks: a spike where ``x >= 0``, and gradient 1 where ``|x| < 0.5``.

    SpikingJelly has none that means the same in both generations: ``PiecewiseLeakyReLU`` has another height in each,
    and ``Rect`` exists in 2.x only, without a kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _RectangleSpike.apply(x)

    @staticmethod
    def cuda_codes(y: str, x: str, dtype: str) -> str:
        """The gradient as a line of CUDA, for the CuPy kernels of SpikingJelly 0.0.0.0.14."""
        from spikingjelly.activation_based.auto_cuda import cfunction

        half = cfunction.constant(None, 0.5, dtype)
        return cfunction.greater_than(z=y, x=half, y=cfunction.abs(None, x, dtype), dtype=dtype)


class _RectangleSpike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_spikes: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _rounded_as_published(grad_spikes) * (x.abs() < 0.5)


def _rounded_as_published(grad_spikes: Tensor) -> Tensor:
    """The published spikes of the ImageNet neuron are float32, and so is what reaches them backward.

    It shows in double precision only, where the reference vectors were made.
    """
    return grad_spikes.float().double() if grad_spikes.dtype == torch.float64 else grad_spikes


def _surrogate_gradient(function: nn.Module, x: Tensor) -> Tensor:
    """d spike / d x of either surrogate function; ``x`` is overwritten."""
    if isinstance(function, Rectangle):
        return x.abs_().lt_(0.5)
    # ATan: (alpha / 2) / (1 + (pi / 2 * alpha * x)^2)
    alpha = function.alpha
    return x.mul_(torch.pi / 2 * alpha).square_().add_(1.0).reciprocal_().mul_(alpha / 2)


class _LIFSequence(torch.autograd.Function):
    """All steps of a LIF neuron in PyTorch, with a hard, detached reset to 0.

    The same operations in the same order as SpikingJelly's, so the same bits forward. SpikingJelly lets autograd
    record some ten small operations a step, and the backward of every ``x[t]`` fills a tensor of all steps with zeros.
    Here only the potential before the reset is kept, and the backward goes over it once.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, v: Tensor | None, node: neuron.LIFNode
    ) -> tuple[Tensor, Tensor]:
        """Inputs ``x`` ``[T, ...]`` and the potential ``v`` ``[...]`` to spikes ``[T, ...]`` and the last potential.

        Without ``v`` the potential starts at 0.
        """
        keeps = any(ctx.needs_input_grad)
        potentials = torch.empty_like(x if keeps else x[:1])  # before the reset, all of them for backward
        spikes = torch.empty_like(x)
        for t in range(x.shape[0]):
            u = potentials[t if keeps else 0]
            if node.decay_input:  # u = v + (x - v) / tau
                if v is None:
                    torch.div(x[t], node.tau, out=u)
                else:
                    torch.sub(x[t], v, out=u)
                    u.div_(node.tau).add_(v)
            elif v is None:
                u.copy_(x[t])
            else:  # u = (1 - 1 / tau) v + x
                torch.mul(v, 1.0 - 1.0 / node.tau, out=u)
                u.add_(x[t])
            torch.ge(u, node.v_threshold, out=spikes[t])
            v = torch.addcmul(u, u, spikes[t], value=-1.0)  # u - u * s: products are several times faster than masks
        if keeps:
            ctx.save_for_backward(potentials)
        ctx.node = node
        ctx.set_materialize_grads(False)  # nothing depends on the last potential, as a rule
        return spikes, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_spikes: Tensor | None, grad_v: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs and of the first potential."""
        (potentials,) = ctx.saved_tensors
        node = ctx.node
        if grad_spikes is None:
            grad_spikes = torch.zeros_like(potentials)
        if isinstance(node.surrogate_function, Rectangle):
            grad_spikes = _rounded_as_published(grad_spikes)
        grad_x = torch.empty_like(potentials)
        for t in reversed(range(len(potentials))):  # step by step: the temporary tensors stay in the cache
            u = potentials[t]
            gradient = _surrogate_gradient(node.surrogate_function, u - node.v_threshold)
            torch.mul(gradient, grad_spikes[t], out=grad_x[t])
            if grad_v is not None:
                not_reset = torch.lt(u, node.v_threshold, out=gradient)  # a reset passes no gradient on
                grad_x[t].addcmul_(grad_v, not_reset)
            if node.decay_input:  # du / dx = 1 / tau
                grad_x[t].div_(node.tau)
            if t > 0 or ctx.needs_input_grad[1]:  # du / dv = 1 - 1 / tau, in either form
                grad_v = grad_x[t] * (node.tau - 1.0 if node.decay_input else 1.0 - 1.0 / node.tau)
        return grad_x, grad_v if ctx.needs_input_grad[1] else None, None


class _LIFNode(neuron.LIFNode):
    computes_lif = True  # models/sma.py may compute the same function in its own way

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        if not self.store_v_seq and self._is_python_loop(x_seq.device):
            v = self.v if torch.is_tensor(self.v) else None  # a number after a reset: 0
            spikes, self.v = _LIFSequence.apply(x_seq, v, self)
            return spikes
        # The CuPy kernels of 0.0.0.0.14 know float32 and float16 only, and raise on bfloat16 autocast.
        if x_seq.dtype == torch.bfloat16 and getattr(self, "backend", "torch") == "cupy":
            return super().multi_step_forward(x_seq.float()).to(torch.bfloat16)
        return super().multi_step_forward(x_seq)

    def _is_python_loop(self, device: torch.device) -> bool:
        """Whether SpikingJelly has no kernel here and would loop over the steps."""
        if device.type == "cpu":
            return True
        return self.backend == "torch" if _has_backends() else isinstance(self.surrogate_function, Rectangle)


def lif() -> nn.Module:
    """The multi-step LIF neuron of SMA-VGG8, ``[T, ...]`` to spikes of the same shape.

    ``tau=2, v_threshold=1, v_reset=0``, input decayed, reset detached, ATan surrogate (alpha 2): the neuron of the
    published networks on event data.
    """
    return _LIFNode(
        tau=2.0, v_threshold=1.0, v_reset=0.0, detach_reset=True, surrogate_function=surrogate.ATan(), step_mode="m"
    )


def ms_lif() -> nn.Module:
    """The multi-step LIF neuron of SMA-MS-ResNet, ``[T, ...]`` to spikes of the same shape.

    ``u_t = 0.25 u_{t-1} (1 - s_{t-1}) + x_t``, a spike where ``u >= 0.5``, the reset detached, surrogate gradient 1
    where ``|u - 0.5| < 0.5``: the neuron of the published networks on ImageNet, but for ``>=``, which is SpikingJelly's
    rule; the publication has ``>``. The two differ only where ``u`` is 0.5 to the last bit.
    """
    return _LIFNode(
        tau=4 / 3,
        decay_input=False,
        v_threshold=0.5,
        v_reset=0.0,
        detach_reset=True,
        surrogate_function=Rectangle(),
        step_mode="m",
    )


def temporal_wise_attention(T: int, reduction: int) -> nn.Module:
    """SpikingJelly's TemporalWiseAttention, ``[T, B, C, H, W]`` to the same shape.

    Source: Yao et al., "Temporal-Wise Attention Spiking Neural Networks for Event Streams Classification".
    """
    return _as_module(layer.TemporalWiseAttention)(T, reduction)


def multi_dimensional_attention(T: int, C: int, reduction: int) -> nn.Module:
    """SpikingJelly's MultiDimensionalAttention (time, channel and space), ``[T, B, C, H, W]`` to the same shape.

    Source: Yao et al., "Attention Spiking Neural Networks". That of 0.0.0.0.14 lacks the ReLU that its forward calls.
    """
    attention = _as_module(layer.MultiDimensionalAttention)(T, C, reduction_t=reduction, reduction_c=reduction)
    if not hasattr(attention, "relu"):
        attention.relu = nn.ReLU()
    return attention


def _as_module(cls: type) -> type:
    """The attention of 0.0.0.0.14 is no ``nn.Module``, without which it has no parameters and cannot be called."""
    return cls if issubclass(cls, nn.Module) else type(cls.__name__, (cls, nn.Module), {})


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
        return _select_in_2x(net, wanted, device)
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


def _select_in_2x(net: nn.Module, wanted: str, device: torch.device) -> str:
    version = spikingjelly_version()
    if wanted == "cupy":
        raise BackendError(
            f"--backend cupy cannot be used: SpikingJelly {version} has no CuPy code; use --backend auto, "
            "or install spikingjelly==0.0.0.0.14"
        )
    if device.type != "cuda":
        return "torch"
    if any(isinstance(module, Rectangle) for module in net.modules()):
        return f"torch (SpikingJelly {version} has no kernel for the rectangular surrogate)"
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
        for trial in (lif(), ms_lif()):
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

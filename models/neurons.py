"""How the LIF neurons of the networks are made and which kernels run them.

The only file that knows the difference between the two generations of SpikingJelly: 0.0.0.0.14, whose neurons choose
between a PyTorch and a CuPy backend, and 2.x, which has no CuPy code. Both can use the Triton kernels of this project.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import types
import warnings
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    # 0.0.0.0.14 compiles its neurons with torch.jit.script, of which current torch warns once in every process.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

from .fast.dispatch import functions_work
from .fast.equations import Neuron

try:
    from .fast import neuron_kernels
except ImportError:  # no Triton on this machine
    neuron_kernels = None  # type: ignore[assignment]

__all__ = [
    "Backend",
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
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx: Any, grad_spikes: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _rounded_as_published(grad_spikes) * (x.abs() < 0.5)


def _rounded_as_published(grad_spikes: Tensor) -> Tensor:
    """The published spikes of the ImageNet neuron are float32, and so is what reaches them backward.

    It shows in double precision only, where the reference vectors were made.
    """
    return grad_spikes.float().double() if grad_spikes.dtype == torch.float64 else grad_spikes


class _LIFSequence(torch.autograd.Function):
    """All steps of a LIF neuron with a hard, detached reset to 0, in a Triton kernel or in PyTorch.

    The same operations in the same order as SpikingJelly's, so the same bits forward. SpikingJelly lets autograd
    record some ten small operations a step, and the backward of every ``x[t]`` fills a tensor of all steps with zeros.
    Potentials are float32 at least, whatever the input is.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor | None, node: _LIFNode) -> tuple[Tensor, Tensor]:
        """Inputs ``x`` ``[T, ...]`` and the potential ``v`` ``[...]`` to spikes ``[T, ...]`` and the last potential.

        Without ``v`` the potential starts at 0.
        """
        in_kernel = node.runs_in == "triton" and neuron_kernels.run_on(x.device)
        equation = node.tau, node.decay_input, node.v_threshold
        if in_kernel:
            spikes, last, kept = neuron_kernels.fire(x, v, *equation)
        else:
            spikes, last, kept = _fire(x, v, *equation, keeps=any(ctx.needs_input_grad))
        ctx.in_kernel, ctx.equation, ctx.alpha = in_kernel, equation, node.alpha
        ctx.save_for_backward(kept, v)
        ctx.set_materialize_grads(False)  # nothing depends on the last potential, as a rule
        return spikes, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_spikes: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs and of the first potential."""
        kept, v = ctx.saved_tensors
        tau, decay_input, threshold = ctx.equation
        if ctx.alpha is None and grad_spikes is not None:
            grad_spikes = _rounded_as_published(grad_spikes)
        if ctx.in_kernel:
            grads = neuron_kernels.fire_backward(
                kept, v, grad_spikes, grad_last, tau, decay_input, threshold, ctx.alpha
            )
        else:
            grads = _fire_backward(kept, grad_spikes, grad_last, tau, decay_input, threshold, ctx.alpha)
        return grads[0], grads[1] if ctx.needs_input_grad[1] else None, None


def _fire(
    x: Tensor, v: Tensor | None, tau: float, decay_input: bool, threshold: float, keeps: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes like ``x``, the last potential, and with ``keeps`` the potentials before the reset, ``[T, ...]``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    potentials = torch.empty_like(x if keeps else x[:1], dtype=dtype)
    spikes = torch.empty_like(x)
    v = torch.zeros_like(potentials[0]) if v is None else v.to(dtype)
    for t in range(x.shape[0]):
        u, charge = potentials[t if keeps else 0], x[t].to(dtype)
        if decay_input:  # u = v + (x - v) / tau
            torch.sub(charge, v, out=u).div_(tau).add_(v)
        else:  # u = (1 - 1 / tau) v + x
            torch.mul(v, 1.0 - 1.0 / tau, out=u).add_(charge)
        fired = torch.ge(u, threshold, out=spikes[t]).to(dtype)
        v = torch.addcmul(u, u, fired, value=-1.0)  # u - u * s: products are several times faster than masks
    return spikes, v, potentials


def _fire_backward(
    potentials: Tensor,
    grad_spikes: Tensor | None,
    grad_v: Tensor | None,
    tau: float,
    decay_input: bool,
    threshold: float,
    alpha: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the inputs and of the first potential; ``alpha`` of ATan, None: the rectangular surrogate."""
    grad_x = torch.empty_like(potentials, dtype=None if grad_spikes is None else grad_spikes.dtype)
    for t in reversed(range(len(potentials))):  # step by step: the temporary tensors stay in the cache
        u = potentials[t]
        if grad_spikes is None:
            grad = torch.zeros_like(u)
        else:
            grad = _surrogate_gradient(alpha, u - threshold).mul_(grad_spikes[t])
        if grad_v is not None:  # a reset passes no gradient on
            grad.addcmul_(grad_v, torch.lt(u, threshold, out=torch.empty_like(u)))
        torch.div(grad, tau if decay_input else 1.0, out=grad_x[t])  # du / dx = 1 / tau
        grad_v = grad.mul_(1.0 - 1.0 / tau)  # du / dv, in either form
    return grad_x, grad_v


def _surrogate_gradient(alpha: float | None, x: Tensor) -> Tensor:
    """d spike / d x; ``x`` is overwritten."""
    if alpha is None:
        return x.abs_().lt_(0.5)
    # ATan: (alpha / 2) / (1 + (pi / 2 * alpha * x)^2)
    return x.mul_(torch.pi / 2 * alpha).square_().add_(1.0).reciprocal_().mul_(alpha / 2)


class _LIFNode(neuron.LIFNode):
    computes_lif = True  # models/fast may compute the same function in its own way
    fast = True  # False: SpikingJelly's own loop over the steps
    runs_in = "torch"  # or "cupy" or "triton": select_backend
    v: Any

    @property
    def alpha(self) -> float | None:
        """Of the ATan surrogate; None for the rectangular one."""
        return None if isinstance(self.surrogate_function, Rectangle) else self.surrogate_function.alpha

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        if self.store_v_seq or not self.fast:  # SpikingJelly's own, which has the potentials of all steps
            return super().multi_step_forward(x_seq)
        if not functions_work(x_seq):  # torch.jit.trace, torch.func: in plain operations
            v = self.v if torch.is_tensor(self.v) else None
            spikes, self.v = Neuron.of(self).fire(x_seq.to(torch.promote_types(x_seq.dtype, torch.float32)), v)
            return spikes.to(x_seq.dtype)
        # In evaluation 0.0.0.0.14 has no kernel, but a scripted loop that keeps half-precision potentials.
        if self.runs_in == "cupy" and self.training and x_seq.is_cuda:
            return self._in_cupy(x_seq)
        v = self.v if torch.is_tensor(self.v) else None  # a number after a reset: 0
        spikes, self.v = _LIFSequence.apply(x_seq, v, self)
        return spikes

    def _in_cupy(self, x: Tensor) -> Tensor:
        """SpikingJelly's CuPy kernels of 0.0.0.0.14, which know float32 and float16 only and read flat memory.

        They get a channels-last input as a permuted view: flattened as it is, every map would be copied twice.
        """
        dtype = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
        turned = x.ndim == 5 and not x.is_contiguous() and x.movedim(2, 4).is_contiguous()
        if torch.is_tensor(self.v):
            self.v = (self.v.movedim(1, 3) if turned else self.v).to(dtype)
        spikes = super().multi_step_forward((x.movedim(2, 4) if turned else x).to(dtype))
        if turned:
            spikes, self.v = spikes.movedim(4, 2), self.v.movedim(3, 1)
        return spikes.to(x.dtype)


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


class Backend(NamedTuple):
    """What runs the neurons: ``"torch"``, ``"triton"`` or ``"cupy"``; and why, or where (may be empty)."""

    name: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def select_backend(net: nn.Module, wanted: str, device: torch.device) -> Backend:
    """Let the neurons of ``net`` run on the wanted backend.

    Args:
        net: a network whose neurons are SpikingJelly's.
        wanted: ``"auto"``, ``"cupy"`` (SpikingJelly 0.0.0.0.14 in training), ``"triton"`` (the kernels of this
            project) or ``"torch"``. ``"auto"`` is the first of these that gives what PyTorch gives, on a CPU torch.
        device: where the network will run.

    Raises:
        BackendError: ``wanted`` is ``"cupy"`` or ``"triton"`` and cannot be used; the message has the real reason.
    """
    reason = "asked for" if wanted == "torch" and device.type == "cuda" else ""
    candidates = {"auto": ("cupy", "triton") if device.type == "cuda" else (), "torch": ()}.get(wanted, (wanted,))
    problems: list[str] = []
    for name in candidates:
        problem = _problem(name, device)
        if problem is None:
            reason = "in training; PyTorch in evaluation" if name == "cupy" else "; ".join(problems)
            return Backend(_set_backend(net, name), reason)
        problems.append(f"no {_TITLES[name]}: {problem}")
    if wanted in candidates:
        raise BackendError(f"--backend {wanted} cannot be used: {problem}; use --backend auto or torch")
    return Backend(_set_backend(net, "torch"), reason or "; ".join(problems))


_TITLES = {"cupy": "CuPy", "triton": "Triton"}


def _set_backend(net: nn.Module, name: str) -> str:
    if _has_backends():
        functional.set_backend(net, "cupy" if name == "cupy" else "torch", instance=neuron.LIFNode)
    for module in net.modules():
        if isinstance(module, _LIFNode):
            module.runs_in = name
    return name


def _problem(name: str, device: torch.device) -> str | None:
    """Why a backend cannot be used on ``device``; None when a trial gave what PyTorch gives."""
    if name == "cupy" and not _has_backends():
        return f"SpikingJelly {spikingjelly_version()} has no CuPy code"
    if name == "triton" and neuron_kernels is None:
        return "the package triton is not installed"
    if device.type != "cuda" and (name == "cupy" or not neuron_kernels.run_on(device)):
        return f"the device is {device}, and {_TITLES[name]} needs a CUDA GPU"
    try:
        if name == "cupy":
            import cupy  # noqa: F401
            from spikingjelly.activation_based.auto_cuda import base

            _mend_numpy_int(base)
        for make, dtype in itertools.product((lif, ms_lif), (torch.float32, torch.float16)):
            _try(make(), name, dtype, device)
    except torch.OutOfMemoryError:
        raise  # says nothing of the backend
    except Exception as error:  # they fail in many ways: no package, no driver, no compiler, another CUDA
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _try(node: nn.Module, name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Training and evaluation on a small channels-last input whose potentials are exact in every precision.

    Raises:
        RuntimeError: something else than in PyTorch came out.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 25, (3, 2, 5, 6, 4), generator=generator).movedim(4, 2) / 8
    results = []
    for backend, on, precision in (("torch", "cpu", torch.float32), (name, device, dtype)):
        _set_backend(node, backend)
        inputs = x.to(on, precision).detach().requires_grad_()
        spikes = node.train()(inputs)
        spikes.sum().backward()
        reset_net(node)
        results.append([spikes.detach(), inputs.grad, node.eval()(inputs.detach())])
        reset_net(node)
    for what, expected, found in zip(("spikes", "gradients", "spikes in evaluation"), *results, strict=True):
        if not torch.allclose(found.float().cpu(), expected, rtol=0.02, atol=1e-3):
            raise RuntimeError(f"{what} in {str(dtype).removeprefix('torch.')} are not those of PyTorch")


def _mend_numpy_int(base: Any) -> None:
    """Give SpikingJelly 0.0.0.0.14's kernel code the ``np.int`` that numpy removed in 1.24.

    Its argument check compares dtypes with ``np.int`` and raises AttributeError on the first GPU step. The name
    ``np`` of that one module is replaced by a view of numpy that has it; numpy and the package stay untouched.
    """
    if not hasattr(base.np, "int"):
        base.np = types.SimpleNamespace(**vars(base.np), int=int)

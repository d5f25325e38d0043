"""The path that a GPU takes, walked on a machine without one: fake tensors, kernels that only note their arguments.

Two walks, since neither can do all. On fake CUDA tensors a forward pass runs as on a GPU, with its autocast, but
autograd cannot go back (it asks for a CUDA context). On meta tensors that say they are on a GPU both run, and autocast
is imitated. Either stops where devices mix or where the host asks for a value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from models.fast import dispatch, kernels, loops, neuron_kernels, passes
from models.neurons import reset_net

__all__ = [
    "HostQuestionError",
    "Launch",
    "backward",
    "cuda_autocast",
    "cupy_sources",
    "fake_cuda_forward",
    "gpu_claims",
    "launches",
    "neurons_in",
    "no_questions",
    "pretended_step",
]

GPU = torch.device("cuda", 0)
MODULES = (kernels, neuron_kernels)


class HostQuestionError(RuntimeError):
    """The host waits for a value of the GPU, and the GPU for the host's next command."""


class Launch(NamedTuple):
    """A call of a Triton kernel: its name as ``module.function``, and the arguments; a tensor as its type."""

    kernel: str
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]


class _Recorder:
    """Stands for a kernel: ``kernel[grid](...)`` is noted and not run."""

    def __init__(self, name: str, found: list[Launch]):
        self.name, self.found = name, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: Any, **keywords: Any) -> None:
        tensors = [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]
        if len({x.device for x in tensors}) != 1:
            raise RuntimeError(f"{self.name} gets tensors on {sorted({str(x.device) for x in tensors})}")
        plain = tree_map(lambda x: x.dtype if isinstance(x, Tensor) else x, arguments)
        launch = Launch(self.name, tuple(plain), tuple(keywords.items()))
        if launch not in self.found:
            self.found.append(launch)


@contextmanager
def launches(work: bool = True) -> Iterator[list[Launch]]:
    """Inside, every Triton kernel of ``models/fast`` only notes what it is called with.

    Args:
        work: whether the kernels of SMA count as working; without, a GPU runs SMA in PyTorch.
    """
    found: list[Launch] = []
    with ExitStack() as stack:
        for module in MODULES:
            for name, value in vars(module).items():
                if type(value).__name__ in ("JITFunction", "InterpretedFunction"):
                    full = f"{module.__name__}.{name}"
                    stack.enter_context(patch.object(module, name, _Recorder(full, found)))
        passes_in = kernels if work else loops
        for module in (dispatch, passes):
            stack.enter_context(patch.object(module, "implementation", lambda x, scales=1: passes_in))
        stack.enter_context(patch.object(torch.cuda, "device_of", lambda tensor: nullcontext()))
        yield found


# What waits for a value of the device, or cannot know the size of its result without.
_QUESTIONS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim")


class no_questions(TorchDispatchMode):
    """Inside, asking a tensor for its value raises :class:`HostQuestionError`."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._opname in _QUESTIONS and args[0].device.type != "cpu":  # an optimiser's count of steps is on the CPU
            raise HostQuestionError(f"{func} on the path of a GPU")
        if func is torch.ops.aten.batch_norm_update_stats.default:  # torch has no shapes for it
            x = args[0]
            return tuple(x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2))
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and args[0].is_contiguous(memory_format=torch.channels_last):
            result = result.contiguous(memory_format=torch.channels_last)  # as on a GPU; meta float16 gives contiguous
        return result


class gpu_claims(TorchFunctionMode):
    """Inside, meta tensors say that they are on a GPU, where new ones become meta tensors; autocast is a GPU's."""

    _HALF = frozenset(["conv1d", "conv2d", "conv3d", "linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "einsum"])
    _FULL = frozenset(["softmax", "log_softmax", "sum", "prod", "cumsum", "pow", "rsqrt", "reciprocal", "exp", "log"])
    _FULL |= {"norm", "mse_loss", "cross_entropy", "nll_loss", "layer_norm"}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            if func.__self__ is torch.Tensor.is_cuda:
                return args[0].is_meta
            value = func(*args)
            if sys._getframe(1).f_code.co_name == "_default_meta_extractor":
                return value  # torch.utils.checkpoint compares with what it saw outside
            return GPU if isinstance(value, torch.device) and value.type == "meta" else value
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if name in ("tolist", "numpy", "cpu"):
            raise HostQuestionError(f"Tensor.{name} on the path of a GPU")
        args, kwargs = tree_map(lambda x: torch.device("meta") if _is_gpu(x) else x, (args, kwargs or {}))
        if name in self._HALF | self._FULL and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda") if name in self._HALF else torch.float32
            args, kwargs = tree_map(lambda x: x.to(dtype) if _is_float(x) else x, (args, kwargs))
        return func(*args, **kwargs)


def _is_gpu(x: Any) -> bool:
    return (isinstance(x, torch.device) and x.type == "cuda") or (isinstance(x, str) and x.startswith("cuda"))


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16, torch.float32)


@contextmanager
def cuda_autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """``torch.autocast("cuda")``, also where there is no GPU; None: off."""
    with _autocast_works(), torch.autocast("cuda", dtype=dtype or torch.float16, enabled=dtype is not None):
        yield


@contextmanager
def _autocast_works() -> Iterator[None]:
    """Inside, autocast does not switch itself off for want of a GPU."""
    available = patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with available, patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True):
        yield


Make = Callable[[], nn.Module]
Choose = Callable[[nn.Module], Any]


def fake_cuda_forward(
    make: Make, shape: tuple[int, ...], amp: torch.dtype | None, choose: Choose, training: bool = True
) -> tuple[nn.Module, Tensor]:
    """A forward pass on fake CUDA tensors; raises where devices mix or a value is asked for.

    Args:
        make: makes the network.
        shape: of its input.
        amp: the type of autocast; None: none.
        choose: is given the network and may choose the backend of its neurons.

    Returns:
        The network with the state of that pass, and its output.
    """
    with FakeTensorMode(), no_questions():
        with torch.device(GPU):
            net, x = make(), torch.zeros(shape)
        choose(net.train(training))
        with cuda_autocast(amp):
            return net, net(x)


def pretended_step(
    make: Make, shape: tuple[int, ...], amp: torch.dtype | None, choose: Choose, training: bool = True
) -> nn.Module:
    """Forward, backward and reset on meta tensors that say they are on a GPU; arguments as for the other walk."""
    with no_questions():
        with torch.device("meta"):
            net, x = make().train(training), torch.zeros(shape)
        choose(net)
        with cuda_autocast(amp), gpu_claims():
            y = net(x)
        with gpu_claims():
            backward(y.float().pow(2).mean())
            reset_net(net)
    return net


def backward(loss: Tensor) -> None:
    """``loss.backward()``, by the call below it, which does not leave :class:`gpu_claims`."""
    run = torch.autograd.Variable._execution_engine.run_backward
    with _autocast_works():  # recomputation enters it again
        run((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)


def neurons_in(name: str) -> Choose:
    """Chooses a backend without trying it."""

    def choose(net: nn.Module) -> None:
        for module in net.modules():
            if hasattr(module, "runs_in"):
                setattr(module, "runs_in", name)  # noqa: B010 (to the type checker a module has tensors only)

    return choose


def cupy_sources(make: Make, shape: tuple[int, ...], amp: torch.dtype | None) -> dict[str, str]:
    """The CUDA sources that SpikingJelly 0.0.0.0.14 writes for the neurons of a network, by title.

    None with SpikingJelly 2.x, which has no CuPy code. CuPy itself is not needed.
    """
    try:
        from spikingjelly.activation_based import base
        from spikingjelly.activation_based.auto_cuda import neuron_kernel
    except ImportError:
        return {}
    found: dict[str, str] = {}

    class Noted:
        """Stands for the autograd function of the kernels."""

        @staticmethod
        def apply(x: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
            if x.dtype not in (torch.float16, torch.float32) or v.dtype != x.dtype:
                raise RuntimeError(f"the CuPy kernels get inputs of {x.dtype} and potentials of {v.dtype}")
            for kernel in arguments[-2:]:  # forward and backward
                surrogate = getattr(kernel, "surrogate_function", None)
                form = getattr(surrogate, "__qualname__", "").split(".")[0]
                found[f"{kernel.kernel_name}, decay_input={kernel.decay_input} {form}".strip()] = kernel.full_codes
            return x * 1, x * 1

    def choose(net: nn.Module) -> None:
        neurons_in("cupy")(net)
        for module in net.modules():
            if hasattr(module, "runs_in"):
                setattr(module, "backend", "cupy")  # noqa: B010

    with launches(), patch.object(neuron_kernel, "LIFNodeATGF", Noted), patch.object(base, "cupy", object()):
        pretended_step(make, shape, amp, choose)
    return found

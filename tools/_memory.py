"""Peak memory of a training step without running it: shapes only, every allocation counted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from models.neurons import reset_net
from tools._without_gpu import backward, cuda_autocast, gpu_claims, launches, neurons_in, no_questions

__all__ = ["Step", "step_of"]

BLOCK = 512  # bytes: the CUDA allocator hands out multiples


class _Allocations(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, the most that were alive at once, and operations.

    torch's own MemTracker and FlopCounterMode watch the modules, and a watched SMA runs module by module.
    """

    def __init__(self, block: int):
        super().__init__()
        self.block = block
        self.alive = self.peak = self.gradients = self.gradients_at_peak = 0
        self.operations = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=result)
        self.add(result)
        return result

    def add(self, tensors: Any) -> None:
        """Count what is new among them, until it is freed."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            size = -(-storage.nbytes() // self.block) * self.block
            self._known.add(key)
            self.alive += size
            weakref.finalize(storage, self._free, key, size).atexit = False
            if self.alive > self.peak:
                self.peak, self.gradients_at_peak = self.alive, self.gradients

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


@dataclass(frozen=True)
class Step:
    """A training step: bytes of its parts and at its peak, and floating-point operations."""

    weights: int
    buffers: int
    optimizer: int
    gradients: int  # that are there at the peak
    input: int
    peak: int
    operations: int  # of convolutions and linear layers, forward and backward

    @property
    def activations(self) -> int:
        """The rest at the peak: what backward needs, and what is only passing."""
        return self.peak - self.weights - self.buffers - self.optimizer - self.gradients - self.input


def step_of(
    make: Callable[[], nn.Module],
    optimizer_of: Callable[[Any], torch.optim.Optimizer],
    shape: tuple[int, ...],
    amp: torch.dtype | None,
    device: str = "cuda",
    neurons: str = "triton",
    recompute: bool | None = None,
) -> Step:
    """What a training step needs, after one that made the state of the optimiser.

    Args:
        make: makes the network.
        optimizer_of: parameters to their optimiser.
        shape: of the input.
        amp: the type of autocast; None: none.
        device: ``"cuda"``, as with the Triton kernels of SMA, or ``"cpu"``.
        neurons: on a GPU ``"triton"`` or ``"torch"``.
        recompute: of every SMA; None: as the network is made.
    """
    on_gpu = device == "cuda"
    with ExitStack() as stack:
        if on_gpu:
            stack.enter_context(launches())
            stack.enter_context(no_questions())
        else:
            stack.enter_context(FakeTensorMode())
        with torch.device("meta" if on_gpu else "cpu"):
            net, x = make().train(), torch.zeros(shape)
        neurons_in(neurons if on_gpu else "torch")(net)
        for module in net.modules():
            if hasattr(module, "recompute") and recompute is not None:
                setattr(module, "recompute", recompute)  # noqa: B010 (to the type checker a module has tensors only)
        optimizer = optimizer_of(net.parameters())
        allocations = _Allocations(BLOCK if on_gpu else 1)
        allocations.add([*net.parameters(), *net.buffers(), x])

        def note(parameter: Tensor) -> None:
            if parameter.grad is not None:
                allocations.gradients += parameter.grad.nbytes

        for parameter in net.parameters():
            parameter.register_post_accumulate_grad_hook(note)

        with allocations:
            for _ in range(2):
                optimizer.zero_grad(set_to_none=True)
                allocations.gradients = allocations.operations = 0
                allocations.peak = allocations.alive
                _train(net, x, amp, on_gpu)
                optimizer.step()
        states = tree_leaves(optimizer.state_dict()["state"])
        return Step(
            weights=_bytes(net.parameters()),
            buffers=_bytes(net.buffers()),
            optimizer=_bytes(one for one in states if isinstance(one, Tensor)),
            gradients=allocations.gradients_at_peak,
            input=x.nbytes,
            peak=allocations.peak,
            operations=allocations.operations,
        )


def _train(net: nn.Module, x: Tensor, amp: torch.dtype | None, on_gpu: bool) -> None:
    with _precision(amp, on_gpu):
        y = net(x)
    with gpu_claims() if on_gpu else ExitStack():
        backward(y.float().pow(2).mean())
        reset_net(net)


@contextmanager
def _precision(amp: torch.dtype | None, on_gpu: bool) -> Iterator[None]:
    if on_gpu:
        with cuda_autocast(amp), gpu_claims():
            yield
    else:
        with torch.autocast("cpu", dtype=amp or torch.bfloat16, enabled=amp is not None):
            yield


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)

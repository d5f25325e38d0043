"""Firing rates and operations of a spiking network, counted while it runs: sums only, no activation is kept.

What is counted, per layer:

- A convolution or linear layer: one operation for each connection of each output, ``elements of the output x fan-in``,
  bias left out. It is an **accumulate (AC)** where the input of the layer held only 0 and 1 over all data, and then
  only the share of the inputs that are 1 costs one: ``AC = rate of the input x connections``, the field's usual
  estimate. Every other input is real-valued, and all connections are **multiply-accumulates (MAC)**.
- **Synaptic operations**: the same without the connections to zero padding, one by one: every nonzero input (MAC: every
  input) times the outputs that it really reaches.
- SMA: its branches are convolutions and counted as these; they read a real-valued map, so they are MAC. Its gating:
  *squeeze* (one AC for each nonzero branch output), *projections* (MAC), *weighting* (the products of the time and
  channel weights, MAC; then one operation for each branch output, AC for spikes and MAC for real values).

Not counted, as usual: BatchNorm (an affine map that can be folded into the layer before, or into the weights of SMA),
pooling, dropout, the state of the neurons, additions of residual connections, softmax, memory. What the software
computes once for T equal inputs (the stem of MS-ResNet) counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from models.sma import SMA, SMA_L
from utils.distributed import gather

__all__ = ["LayerCount", "OperationCounter", "fan_out"]

CONNECTIONS = (nn.Conv2d, nn.Linear)
GATING = ("squeeze", "projections", "weighting")


@dataclass
class LayerCount:
    """What was counted at one place of the network, over all samples.

    Attributes:
        name: of the module.
        kind: ``"conv"``, ``"linear"``, ``"neuron"``, ``"squeeze"``, ``"projections"`` or ``"weighting"``.
        part: ``"network"``, ``"SMA branches"`` or ``"SMA gating"``.
        inputs: elements of the input (neuron: of the output).
        nonzero: those that are not 0 (neuron: spikes).
        binary: there were only 0 and 1.
        connections: operations if nothing were 0, padding included.
        reached: the same without padding.
        from_nonzero: those of ``reached`` that start at a nonzero input.
        macs: operations that are multiply-accumulates whatever the input.
        per_step: spikes of a neuron at every step; empty elsewhere.
    """

    name: str
    kind: str
    part: str
    inputs: int = 0
    nonzero: int = 0
    binary: bool = True
    connections: int = 0
    reached: int = 0
    from_nonzero: int = 0
    macs: int = 0
    per_step: list[int] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Share of the elements that are not 0; of a neuron, its firing rate: spikes / (neurons x steps x samples)."""
        return self.nonzero / self.inputs if self.inputs else 0.0

    @property
    def rates(self) -> list[float]:
        """Firing rate of a neuron at every step."""
        return [spikes * len(self.per_step) / self.inputs for spikes in self.per_step]

    @property
    def mac(self) -> int:
        """Multiply-accumulates, the usual estimate."""
        return self.macs if self.binary else self.macs + self.connections

    @property
    def ac(self) -> float:
        """Accumulates, the usual estimate: rate of the input x connections."""
        return self.rate * self.connections if self.binary else 0.0

    @property
    def mac_exact(self) -> int:
        """Multiply-accumulates without the connections to padding."""
        return self.macs if self.binary else self.macs + self.reached

    @property
    def ac_exact(self) -> int:
        """Accumulates one by one: spikes times the outputs that they reach."""
        return self.from_nonzero if self.binary else 0


class OperationCounter:
    """Counts in every forward pass of a network, inside a ``with`` block.

        with OperationCounter(net) as counter:
            for batch in batches:
                net(batch)
        for layer in counter.result(): ...

    Sums stay on the device, so the memory does not grow with the data. Rates are weighted by elements: spikes of all
    samples over all elements of all samples, not a mean of means over batches.

    Args:
        net: a network of spiking neurons (modules with a ``v_threshold`` that give ``[T, ...]``), convolutions, linear
            layers and SMA.
    """

    def __init__(self, net: nn.Module):
        self.net = net
        self.layers: dict[str, LayerCount] = {}
        self._sums: dict[str, Tensor] = {}  # nonzero, reached from nonzero, whether not binary; float64: exact
        self._steps: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> OperationCounter:
        inside: dict[nn.Module, str] = {}
        for name, module in self.net.named_modules():
            if isinstance(module, SMA):
                inside |= dict.fromkeys(module.S_Convs.modules(), "SMA branches")
                self._watch_sma(name, module)
        for name, module in self.net.named_modules():
            part = inside.get(module, "network")
            if isinstance(module, CONNECTIONS) and not _is_projection(name):
                kind = "linear" if isinstance(module, nn.Linear) else "conv"
                self._watch(module, LayerCount(name, kind, part), self._count_connections)
            elif hasattr(module, "v_threshold"):
                self._watch(module, LayerCount(name, "neuron", part), self._count_spikes)
        order = {name: position for position, (name, _) in enumerate(self.net.named_modules())}

        def position(key: str) -> int:  # the gating of an SMA stands behind its branches
            name, _, gating = key.partition(" ")
            return order[_below(name, "T_after_attention_convs") if gating else name]

        self.layers = {key: self.layers[key] for key in sorted(self.layers, key=position)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def result(self) -> list[LayerCount]:
        """What was counted over all processes, in the order of the network; places that never ran are left out."""
        own = []
        for key, layer in self.layers.items():
            nonzero, from_nonzero, not_binary = self._sums[key].tolist() if key in self._sums else (0, 0, 0)
            steps = self._steps[key].tolist() if key in self._steps else []
            own.append((layer, int(nonzero), int(from_nonzero), bool(not_binary), [int(spikes) for spikes in steps]))
        return [layer for layer in map(_merged, zip(*gather(own), strict=True)) if layer.inputs or layer.macs]

    def _watch(self, module: nn.Module, layer: LayerCount, count: Callable[..., None]) -> None:
        self.layers[layer.name] = layer
        self._handles.append(module.register_forward_hook(partial(count, layer.name)))

    def _add(self, key: str, x: Tensor, from_nonzero: Tensor | None = None) -> None:
        """Count the elements of ``x`` that are not 0, and whether there are others than 0 and 1."""
        nonzero = x != 0
        total = nonzero.sum(dtype=torch.float64)
        new = torch.stack(
            [total, total if from_nonzero is None else from_nonzero, (nonzero & (x != 1)).any().to(total)]
        )
        self._sums[key] = self._sums[key] + new if key in self._sums else new
        self.layers[key].inputs += x.numel()

    def _count_connections(self, key: str, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, layer = inputs[0].detach(), self.layers[key]
        if isinstance(module, nn.Linear):
            layer.connections += output.numel() * module.in_features
            layer.reached += output.numel() * module.in_features
            reached = (x != 0).sum(dtype=torch.float64) * module.out_features
        else:
            outputs = fan_out(module, x.shape[-2:]).to(x.device)
            layer.connections += output.numel() * module.weight[0].numel()
            layer.reached += int(outputs.sum()) * (x.numel() // outputs.numel())
            per_pixel = (x != 0).flatten(0, -3).sum(0, dtype=torch.float64)
            reached = (per_pixel * outputs).sum()
        self._add(key, x, reached)

    def _count_spikes(self, key: str, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        spikes = output.detach()
        self._add(key, spikes)
        per_step = (spikes != 0).flatten(1).sum(1, dtype=torch.float64)
        self._steps[key] = self._steps[key] + per_step if key in self._steps else per_step

    def _watch_sma(self, name: str, sma: SMA) -> None:
        squeeze, projections, weighting = (f"{name} {kind}" for kind in GATING)
        for key in (squeeze, projections, weighting):
            self.layers[key] = LayerCount(key, key.rpartition(" ")[2], "SMA gating")

        def count_features(_module: nn.Module, _inputs: tuple[Tensor, ...], features: Tensor) -> None:
            features = features.detach()
            self._add(weighting, features)
            self.layers[weighting].connections += features.numel()
            self.layers[weighting].reached += features.numel()
            # Additions whatever is added: never multiplications.
            ones = (features != 0).to(features.dtype)
            self._add(squeeze, ones)
            self.layers[squeeze].connections += features.numel()
            self.layers[squeeze].reached += features.numel()

        branches: Any = sma.S_Convs
        for branch in branches:
            activation = branch.lif if hasattr(branch, "lif") else branch.act
            self._handles.append(activation.register_forward_hook(count_features))

        def count_weights(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            T, B, C = inputs[0].shape[:3]
            self.layers[projections].macs += B * _projection_macs(sma)
            self.layers[weighting].macs += len(sma.S_Convs) * T * B * C  # the products of the two weights

        self._handles.append(sma.register_forward_hook(count_weights))


def _projection_macs(sma: SMA) -> int:
    """Multiply-accumulates of the channel and the time projections of SMA for one sample."""
    hidden_c = sma.C_before_attention_conv.weight.shape[0]
    hidden_t = sma.T_before_attention_conv.weight.shape[0]
    scales = len(sma.S_Convs)
    times = 1 if isinstance(sma, SMA_L) else sma.time  # SMA-L: one channel weight for all steps
    return (1 + scales) * (times * sma.channel * hidden_c + sma.time * hidden_t)


def fan_out(conv: nn.Conv2d, size: torch.Size | tuple[int, int]) -> Tensor:
    """How many outputs every pixel of an ``[H, W]`` input channel reaches, double; outputs that do not exist and taps
    in the padding are not among them.
    """
    lines = []
    for axis, length in enumerate(size):
        kernel, stride, padding, dilation = (
            getattr(conv, name)[axis] for name in ("kernel_size", "stride", "padding", "dilation")
        )
        outputs = (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        positions = torch.arange(outputs)[:, None] * stride - padding + torch.arange(kernel) * dilation
        inside = positions[(positions >= 0) & (positions < length)]
        lines.append(torch.bincount(inside, minlength=length).double())
    return torch.outer(*lines) * (conv.out_channels // conv.groups)


def _below(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _is_projection(name: str) -> bool:
    """Whether a module is a projection of SMA, which counts them itself: they run as linear layers."""
    return "_attention_conv" in name


def _merged(of_processes: tuple[tuple[LayerCount, int, int, bool, list[int]], ...]) -> LayerCount:
    """One place, counted by every process, as one."""
    first = of_processes[0][0]
    total = LayerCount(first.name, first.kind, first.part)
    for layer, nonzero, from_nonzero, not_binary, steps in of_processes:
        for name in ("inputs", "connections", "reached", "macs"):
            setattr(total, name, getattr(total, name) + getattr(layer, name))
        total.nonzero += nonzero
        total.from_nonzero += from_nonzero
        total.binary = total.binary and not not_binary
        if steps:
            total.per_step = [a + b for a, b in zip(total.per_step or [0] * len(steps), steps, strict=True)]
    return total

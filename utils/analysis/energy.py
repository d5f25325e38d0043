"""Operations and energy of a sample, by layer, and by the conventions of the field."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.neurons import reset_net
from utils.analysis.operations import LayerCount

__all__ = ["CONSTANTS", "conventions", "count_by_spikingjelly", "energy", "operations", "summary"]

PARTS = ("network", "SMA branches", "SMA gating")
CONSTANTS = "Horowitz, ISSCC 2014, 45 nm: 32-bit floating point, 3.7 pJ a product and 0.9 pJ an addition"


def operations(layer: LayerCount, count: str) -> tuple[float, float]:
    """MAC and AC of a layer, over all samples; ``count`` is ``"usual"`` or ``"exact"`` (utils.analysis.operations)."""
    if layer.kind == "neuron":
        return 0, 0
    return (layer.mac, layer.ac) if count == "usual" else (layer.mac_exact, layer.ac_exact)


def energy(mac: float, ac: float, mac_pj: float, ac_pj: float) -> float:
    """Energy in microjoules: ``mac * mac_pj + ac * ac_pj``."""
    return (mac * mac_pj + ac * ac_pj) * 1e-6


def summary(layers: Sequence[LayerCount], samples: int, count: str, mac_pj: float, ac_pj: float) -> dict[str, Any]:
    """Totals and one row a layer; operations and energy are those of one sample, on average.

    Args:
        layers: over all samples.
        samples: how many there were.
        count: ``"usual"`` or ``"exact"``.
        mac_pj, ac_pj: picojoules of one multiply-accumulate and of one accumulate.
    """
    rows = [_row(layer, samples, count, mac_pj, ac_pj) for layer in layers]
    by_part = {part: _total([row for row in rows if row["part"] == part]) for part in PARTS}
    total = _total(rows)
    for part in by_part.values():
        part["share"] = part["energy_uj"] / total["energy_uj"] if total["energy_uj"] else 0.0
    neurons = [layer for layer in layers if layer.kind == "neuron"]
    elements = sum(layer.inputs for layer in neurons)
    return {
        "firing_rate": sum(layer.nonzero for layer in neurons) / elements if elements else 0.0,
        "spikes": sum(layer.nonzero for layer in neurons) / samples,
        "total": total,
        "parts": by_part,
        "layers": rows,
    }


def _row(layer: LayerCount, samples: int, count: str, mac_pj: float, ac_pj: float) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": layer.name, "kind": layer.kind, "part": layer.part}
    if layer.kind == "neuron":
        neurons = layer.inputs // samples // len(layer.per_step)
        return {**row, "neurons": neurons, "firing_rate": layer.rate, "firing_rate_of_step": layer.rates}
    mac, ac = (number / samples for number in operations(layer, count))
    exact = (layer.mac_exact + layer.ac_exact) / samples
    if layer.inputs:
        row |= {"input": "spikes" if layer.binary else "real", "input_rate": layer.rate}
    return {**row, "mac": mac, "ac": ac, "synaptic_operations": exact, "energy_uj": energy(mac, ac, mac_pj, ac_pj)}


def _total(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {name: sum(row.get(name, 0) for row in rows) for name in ("mac", "ac", "synaptic_operations", "energy_uj")}


def conventions(
    layers: Sequence[LayerCount],
    samples: int,
    mac_pj: float,
    ac_pj: float,
    by_spikingjelly: tuple[float, float, int] | None = None,
) -> list[dict[str, Any]]:
    """The energy of one sample as different papers count it: one row each, with its formula and source.

    Args:
        layers, samples, mac_pj, ac_pj: as for :func:`summary`.
        by_spikingjelly: what :func:`count_by_spikingjelly` gives; None where it has no counters.
    """
    work = [layer for layer in layers if layer.kind != "neuron"]
    first, *others = [layer for layer in work if layer.kind in ("conv", "linear")]
    gating = [layer for layer in work if layer.kind not in ("conv", "linear")]
    of_papers = (
        first.connections + sum(layer.mac for layer in gating),
        sum(layer.rate * layer.connections for layer in others) + sum(layer.ac for layer in gating),
    )
    ours = "this project (utils/analysis/operations.py)"
    rows = [
        (
            "by input", *_sum(layers, "usual"),
            "a layer that reads only 0 and 1: AC = rate x connections; every other layer: MAC = connections",
            ours, samples,
        ),
        (
            "by input, exact", *_sum(layers, "exact"),
            "the same, operations counted one by one, without those on zero padding", ours, samples,
        ),
        (
            "first layer MAC, all others AC", *of_papers,
            "first layer: MAC = connections; every later layer: AC = rate x connections, even where it reads real "
            "values (rate: share of its inputs that are not 0); gating of SMA: MAC",
            "Attention SNN (Yao et al., TPAMI 2023, arXiv 2209.13929), MS-ResNet (Hu et al., TNNLS 2024, "
            "arXiv 2112.08954)", samples,
        ),
    ]  # fmt: skip
    if by_spikingjelly is not None:
        rows.append(
            (
                "SpikingJelly 2 counters", *by_spikingjelly[:2],
                "MACCounter and ACCounter: operations of torch by whether a tensor is binary, BatchNorm and pooling "
                "among them; without memory", "spikingjelly.activation_based.op_counter", by_spikingjelly[2],
            )
        )  # fmt: skip
    return [
        {
            "name": name, "mac": mac / n, "ac": ac / n, "energy_uj": energy(mac, ac, mac_pj, ac_pj) / n,
            "samples": n, "formula": formula, "source": source,
        }
        for name, mac, ac, formula, source, n in rows
    ]  # fmt: skip


def _sum(layers: Sequence[LayerCount], count: str) -> tuple[float, float]:
    mac, ac = zip(*(operations(layer, count) for layer in layers), strict=True)
    return sum(mac), sum(ac)


def count_by_spikingjelly(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], prepare: Callable, device: torch.device, most: int = 64
) -> tuple[float, float, int] | None:
    """MAC and AC by the counters of SpikingJelly 2 over the first samples; None where it is not installed.

    Args:
        net: in evaluation mode.
        batches: pairs of samples and labels.
        prepare: samples and labels on the device to the inputs of the network.
        most: stop after so many samples: the counters look at every operation of torch and are slow.

    Returns:
        MAC, AC (of all samples) and the number of samples.
    """
    try:
        from spikingjelly.activation_based import op_counter
    except ImportError:
        return None
    counters, count = [op_counter.MACCounter(), op_counter.ACCounter()], 0
    for samples, labels in batches:
        inputs, _ = prepare(samples.to(device), labels)
        with torch.no_grad(), op_counter.DispatchCounterMode(counters):
            net(inputs)
        reset_net(net)
        count += len(labels)
        if count >= most:
            break
    mac, ac = (counter.get_total() for counter in counters)
    return mac, ac, count

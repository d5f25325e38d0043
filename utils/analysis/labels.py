"""Names of layers for readers: ``block2.1.S_Convs.1.lif`` is "block 2, SMA 3 x 3 LIF"."""

from __future__ import annotations

import re
from collections import Counter

from torch import nn

from models.sma import SMA
from utils.analysis.azo_record import kernel_sizes
from utils.analysis.operations import GATING

__all__ = ["layer_labels", "sma_label"]


def layer_labels(net: nn.Module) -> dict[str, str]:
    """The convolutions, linear layers, neurons and SMA of a VGG8 or an MSResNet: name of the module to its label.

    The gating of an SMA has the keys of :class:`utils.analysis.operations.OperationCounter`.
    """
    labels: dict[str, str] = {}
    places: list[tuple[str, str, str]] = []  # of a layer: its name, where it is, what it is
    branches: dict[str, str] = {}  # the names of the branches of SMA begin so
    for name, module in net.named_modules():
        place = next((label for prefix, label in branches.items() if name.startswith(prefix)), _place(name))
        if isinstance(module, SMA):
            labels[name] = sma_label(name)
            labels |= {f"{name} {part}": f"{place}, SMA {part}" for part in GATING}
            branches |= {f"{name}.S_Convs.{s}.": f"{place}, SMA {k} x {k}" for s, k in enumerate(kernel_sizes(module))}
        elif isinstance(module, nn.Conv2d) and "_attention_conv" not in name:
            places.append((name, place, "conv"))
        elif isinstance(module, nn.Linear):
            places.append((name, place, "linear"))
        elif hasattr(module, "v_threshold"):
            places.append((name, place, "LIF"))
    of_kind = Counter((place, kind) for _, place, kind in places)
    seen: Counter[tuple[str, str]] = Counter()
    for name, place, kind in places:
        seen[place, kind] += 1
        number = f" {seen[place, kind]}" if of_kind[place, kind] > 1 else ""
        labels[name] = f"{place} {kind}{number}"
    return labels


def sma_label(name: str) -> str:
    """The label of the SMA of that name."""
    return f"{_place(name)}, SMA"


def _place(name: str) -> str:
    if block := re.match(r"block(\d+)", name):
        return f"block {block[1]}"
    if stage := re.match(r"conv(\d)_x\.(\d+)", name):
        shortcut = " shortcut" if ".shortcut" in name else ""
        return f"stage {int(stage[1]) - 1} block {int(stage[2]) + 1}{shortcut}"
    return "stem" if name.startswith("conv1") else "head"

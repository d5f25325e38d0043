"""The network that a weights file belongs to: the one place that infers its settings from names and shapes, and builds
it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models import VGG8, sma_ms_resnet18, sma_ms_resnet34, sma_ms_resnet104
from utils.errors import UserError, user_input

__all__ = ["RESNETS", "TITLES", "build_network", "describe_network", "settings_of_weights"]

RESNETS = {"resnet18": sma_ms_resnet18, "resnet34": sma_ms_resnet34, "resnet104": sma_ms_resnet104}

TITLES = {"VGG8": "SMA-VGG8"} | {f"sma_ms_{name}": f"SMA-MS-{name.replace('resnet', 'ResNet-')}" for name in RESNETS}

_KINDS = {"vgg8": "an SMA-VGG8", "ms_resnet": "an SMA-MS-ResNet-18, 34 or 104"}


def settings_of_weights(weights: Mapping[str, Tensor], family: str | None = None) -> dict[str, Any]:
    """Infer a network's settings from the names and shapes of its weights.

    Args:
        weights: as :func:`utils.checkpoint.read_weights` gives them.
        family: ``"vgg8"`` or ``"ms_resnet"``; None for either.

    Returns:
        ``num_classes``, ``width`` and, where the weights show them, ``timesteps``, ``sma_blocks``, ``branch_groups``,
        ``branch_activation`` (VGG8) and ``net`` (MS-ResNet: ``"resnet18"``, ...).

    Raises:
        UserError: these are not the weights of a network of that family.
    """
    readers = {"vgg8": _of_vgg8, "ms_resnet": _of_ms_resnet}
    wanted = [family] if family else list(readers)
    for one in wanted:
        if found := readers[one](weights):
            return found
    raise UserError(
        f"these are not the weights of {' or '.join(_KINDS[one] for one in wanted)}; the names begin with "
        f"{', '.join(list(weights)[:3])}"
    )


def describe_network(weights: Mapping[str, Tensor], known: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The network of a weights file, as a name and keywords.

    Args:
        weights, known: as :func:`utils.checkpoint.read_weights` gives them. A network without SMA does not show its T:
            it is taken from the stored recipe.

    Returns:
        The name in ``models`` and the keywords (plain values) that make the network,
        ``getattr(models, name)(**keywords)``.

    Raises:
        UserError: the weights are not of a network of this project.
    """
    found = settings_of_weights(weights)
    recipe = known.get("recipe")
    if "timesteps" not in found and isinstance(recipe, Mapping) and type(recipe.get("timesteps")) is int:
        found["timesteps"] = recipe["timesteps"]
    name = f"sma_ms_{found.pop('net')}" if "net" in found else "VGG8"
    return name, {"T" if key == "timesteps" else key: value for key, value in found.items()}


def build_network(weights: Mapping[str, Tensor], known: Mapping[str, Any], **changes: Any) -> nn.Module:
    """The network of a weights file, in evaluation mode, without its weights.

    Args:
        weights, known: as for :func:`describe_network`.
        changes: keywords of the network that the caller sets.

    Raises:
        UserError: the weights are not of a network of this project, or nothing says T.
    """
    name, keywords = describe_network(weights, known)
    keywords |= changes
    if "T" not in keywords:
        raise UserError("T is unknown: the network has no SMA, and the file has no recipe; give T as -T")
    make = VGG8 if name == "VGG8" else RESNETS[name.removeprefix("sma_ms_")]
    with user_input():
        return make(**keywords).eval()


def _of_vgg8(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of an SMA-VGG8; empty where these are not the weights of one."""
    first, last = weights.get("block1.0.0.weight"), weights.get("others.8.weight")
    if first is None or last is None:
        return {}
    blocks = [n for n in range(1, 6) if f"block{n}.1.T_before_attention_conv.weight" in weights]
    found = {"num_classes": last.shape[0], "width": first.shape[0] / 64, "sma_blocks": blocks}
    if blocks:
        sma = f"block{blocks[0]}.1."
        found["timesteps"] = weights[sma + "T_before_attention_conv.weight"].shape[1]
        found["branch_activation"] = "relu" if sma + "S_Convs.0.bn.bn.weight" in weights else "lif"
        found["branch_groups"] = _groups(weights[sma + "S_Convs.0.conv.weight"])
    return found


def _of_ms_resnet(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of an SMA-MS-ResNet; empty where these are not the weights of one."""
    first, last = weights.get("conv1.0.weight"), weights.get("fc.weight")
    stages = [len({name.split(".")[1] for name in weights if name.startswith(f"conv{n}_x.")}) for n in range(2, 6)]
    nets: dict[tuple[int, ...], str] = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34", (3, 8, 32, 8): "resnet104"}
    if first is None or last is None or tuple(stages) not in nets:
        return {}
    suffix = ".residual_function.2.T_before_attention_conv.weight"
    with_sma = [name for name in weights if name.endswith(suffix)]
    found = {"num_classes": last.shape[0], "width": first.shape[0] / 64, "net": nets[tuple(stages)]}
    places = {"none": 0, "first-two": 8, "all": sum(stages)}
    fitting = [place for place, count in places.items() if count == len(with_sma)]
    if len(fitting) == 1:  # in ResNet-18 the first two blocks of a stage are all of them
        found["sma_blocks"] = fitting[0]
    if with_sma:
        found["timesteps"] = weights[with_sma[0]].shape[1]
        found["branch_groups"] = _groups(weights[with_sma[0].replace("T_before_attention_conv", "S_Convs.0.conv")])
    return found


def _groups(branch_weight: Tensor) -> int | str:
    """``groups`` of SMA from the weight of a branch convolution, ``[C, C / groups, k, k]``."""
    return "channel" if branch_weight.shape[1] < branch_weight.shape[0] else 1

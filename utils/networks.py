"""The network that a weights file belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

import models
from utils.checkpoint import describe_ms_resnet, describe_vgg8
from utils.errors import UserError, user_input

__all__ = ["build_network", "describe_network"]


def describe_network(weights: Mapping[str, Tensor], beside: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Tell the network from the names and shapes of its weights, and its T, where there is no SMA, from the recipe.

    Args:
        weights, beside: as :func:`utils.checkpoint.read_weights` gives them.

    Returns:
        The name in ``models`` and the keywords (plain values) that make the network,
        ``getattr(models, name)(**keywords)``; an empty name where it is none of this project's.
    """
    told = describe_vgg8(weights)
    name = "VGG8"
    if not told:
        told = describe_ms_resnet(weights)
        name = f"sma_ms_{told.pop('net')}" if told else ""
    recipe = beside.get("recipe")
    if told and "timesteps" not in told and isinstance(recipe, Mapping) and "timesteps" in recipe:
        told["timesteps"] = recipe["timesteps"]
    return name, {"T" if key == "timesteps" else key: value for key, value in told.items()}


def build_network(weights: Mapping[str, Tensor], beside: Mapping[str, Any]) -> nn.Module:
    """The network of a weights file, for evaluation, without its weights.

    Raises:
        UserError: the names are not those of a network of this project, or nothing tells T.
    """
    name, keywords = describe_network(weights, beside)
    if not name:
        raise UserError("these are not the weights of an SMA-VGG8 or an SMA-MS-ResNet-18, 34 or 104")
    if "T" not in keywords:
        raise UserError("nothing in the file tells T: it has no SMA and no recipe; give a checkpoint of this project")
    with user_input():
        return getattr(models, name)(**keywords).eval()

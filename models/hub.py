"""Networks from a folder in the layout of the Hugging Face hub: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from models.ms_resnet import sma_ms_resnet18, sma_ms_resnet34, sma_ms_resnet104
from models.vgg import VGG8

__all__ = ["load"]

_NETWORKS: dict[str, Any] = {make.__name__: make for make in (VGG8, sma_ms_resnet18, sma_ms_resnet34, sma_ms_resnet104)}


def load(directory: str | os.PathLike, **keywords: Any) -> nn.Module:
    """The network of a folder that ``tools/export.py hub`` wrote, with its weights, in evaluation mode.

    Args:
        directory: holds ``config.json`` and ``model.safetensors``.
        keywords: of the network, in place of those in ``config.json``, for instance ``AZO=True`` to train it further.

    Raises:
        ValueError: the folder is not in this layout.
    """
    try:
        config = json.loads((Path(directory) / "config.json").read_text("utf-8"))
        make, stored = _NETWORKS[config["network"]], dict(config["keywords"])
        weights = load_file(Path(directory) / "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{directory} is no folder of tools/export.py hub ({type(error).__name__}: {error}); it needs config.json "
            f"with network (one of {', '.join(_NETWORKS)}) and keywords, and model.safetensors"
        ) from error
    net = make(**{**stored, **keywords})
    net.load_state_dict(weights)
    return net.eval()

"""Versions of the libraries that a result depends on."""

from __future__ import annotations

import platform

import einops
import numpy
import torch

from models.neurons import spikingjelly_version

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Versions of what a result depends on, name to version."""
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # its own class is not a plain value
        "spikingjelly": spikingjelly_version(),
        "numpy": numpy.__version__,
        "einops": einops.__version__,
    }
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found

"""What a result was made with: the libraries and the machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import einops
import numpy
import torch

from models.neurons import spikingjelly_version

__all__ = ["machine", "versions"]


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


def machine(device: torch.device) -> str:
    """The machine that a time was measured on: the GPU, or the processor with its cores and torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"

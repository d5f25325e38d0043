"""What a result was made with: the libraries, this code and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import einops
import numpy
import torch

from models.neurons import spikingjelly_version

__all__ = ["code", "machine", "versions"]

_ROOT = Path(__file__).resolve().parent.parent


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


def code() -> dict[str, Any]:
    """The ``commit`` of this checkout, and whether a Python file was ``changed`` since; both None without git."""
    found = _git("rev-parse", "--show-toplevel", "HEAD").splitlines()
    if len(found) != 2 or Path(found[0]).resolve() != _ROOT:  # unpacked inside another repository
        return {"commit": None, "changed": None}
    return {"commit": found[1], "changed": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "*.py"))}


def _git(*words: str) -> str:
    """What git says; nothing where it fails or is not there."""
    command = ["git", "--no-optional-locks", "-C", str(_ROOT), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine(device: torch.device) -> str:
    """The machine that a time was measured on: the GPU, or the processor with its cores and torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"

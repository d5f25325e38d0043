"""What is used of SpikingJelly's data sets, in both generations: integration to frames, and the published MD5 sums."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["integrate", "load_npz_frames", "published_md5"]

_importing = threading.RLock()  # sys.modules belongs to all threads, and several prepare at once


def integrate(events: dict[str, np.ndarray], T: int, sensor: tuple[int, int]) -> np.ndarray:
    """SpikingJelly's frames ``[T, 2, H, W]`` of equally many events each: counts, in double precision."""
    return _function("integrate_events_by_fixed_frames_number")(events, "number", T, *sensor)


def load_npz_frames(path: str | Path) -> np.ndarray:
    """SpikingJelly's own reading of a file of frames: ``[T, 2, H, W]`` float32."""
    return _function("load_npz_frames")(path)


def published_md5(reader: str) -> dict[str, str]:
    """File name to MD5 of the archives of a data set; ``reader`` is the module and class of SpikingJelly."""
    module, _, name = reader.rpartition(".")
    with _torchaudio_or_placeholder():
        cls = getattr(importlib.import_module(module), name)
    return {file: md5 for file, _, md5 in cls.resource_url_md5()}


@cache
def _function(name: str) -> Any:
    with _torchaudio_or_placeholder():
        module = importlib.import_module("spikingjelly.datasets")
        if not hasattr(module, name):  # 2.x
            module = importlib.import_module("spikingjelly.datasets.utils")
    return getattr(module, name)


@contextlib.contextmanager
def _torchaudio_or_placeholder() -> Iterator[None]:
    """SpikingJelly 2.x imports torchaudio with every data set, for speech; its newest release refuses a newer torch."""
    with _importing:
        try:
            importlib.import_module("torchaudio")
        except Exception:  # RuntimeError for another CUDA, OSError for another torch, ImportError where it is absent
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
                del sys.modules[name]
            sys.modules["torchaudio"] = types.ModuleType("torchaudio")
            try:
                yield
            finally:
                del sys.modules["torchaudio"]
        else:
            yield

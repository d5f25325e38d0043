"""Events as arrays: checked for type, range and order before anything is made of them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from utils.prepare.arrays import read_array
from utils.prepare.recordings import Events, RecordingError

__all__ = ["checked_events", "extent", "read_events"]

_NAMES = ("t", "x", "y", "p")
# Cameras and their readers give a few events a little late; SpikingJelly keeps them where they are.
_LATE_EVENTS, _LATE_BY = 0.01, 1000  # share of the events, microseconds


def read_events(path: Path, sensor: tuple[int, int] | None = None) -> Events:
    """The events of an ``.npz`` file as SpikingJelly writes it.

    Args:
        sensor: (H, W); None where it is not known.

    Raises:
        RecordingError: it is damaged, or see :func:`checked_events`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            events = {}
            for name in _NAMES:
                with archive.open(f"{name}.npy") as file:
                    events[name] = read_array(file)
    except Exception as error:  # numpy and zipfile raise many types on a damaged file
        what = f"cannot be read, it is damaged or cut off ({type(error).__name__}: {error})"
        raise RecordingError(path, what) from error
    return checked_events(path, events, sensor)


def checked_events(path: Path, events: Mapping[str, np.ndarray], sensor: tuple[int, int] | None = None) -> Events:
    """Events that can become frames; polarities -1 and 1 become 0 and 1.

    Args:
        path: where they are from.
        sensor: (H, W); None where it is not known.

    Raises:
        RecordingError: there are none, the arrays do not belong together, or one has another type, values out of range
            or times that are not in order.
    """
    t, x, y, p = (events[name] for name in _NAMES)
    if len({values.shape for values in (t, x, y, p)}) != 1 or t.ndim != 1:
        raise RecordingError(path, "has t, x, y and p of different lengths")
    if not len(t):
        raise RecordingError(path, "has no events")
    if not all(values.dtype.kind in "iub" for values in (x, y, p)):
        raise RecordingError(path, "has x, y or p that are no whole numbers")
    if min(x.min(), y.min()) < 0:
        raise RecordingError(path, f"has events at x {x.min()}, y {y.min()}; pixels are counted from 0")
    height, width = extent(events)
    if sensor is not None and (height > sensor[0] or width > sensor[1]):
        raise RecordingError(
            path,
            f"has events up to x {width - 1}, y {height - 1}, and the sensor has {sensor[0]}x{sensor[1]} pixels; "
            "--sensor-size HxW tells another size",
        )
    if p.dtype.kind != "b" and (p.min() < 0 or p.max() > 1):
        if not np.isin(p, (-1, 1)).all():
            raise RecordingError(path, f"has polarities from {p.min()} to {p.max()}; they must be 0 and 1, or -1 and 1")
        p = (p > 0).astype(p.dtype)
    _check_times(path, t)
    return {"t": t, "x": x, "y": y, "p": p}


def _check_times(path: Path, t: np.ndarray) -> None:
    if t.dtype.kind not in "iuf" or not np.isfinite(t).all():
        raise RecordingError(path, "has times that are no finite numbers")
    late = np.flatnonzero(t[1:] < t[:-1])
    if late.size:
        by = float((t[late].astype(np.float64) - t[late + 1].astype(np.float64)).max())
        if late.size > _LATE_EVENTS * len(t) or by > _LATE_BY:
            raise RecordingError(
                path, f"has times that are not in order ({late.size} events are late, by up to {by:g})"
            )


def extent(events: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """(H, W) of the smallest sensor that could have given these events; there is at least one."""
    height, width = (int(events[axis].max()) + 1 for axis in "yx")
    return height, width

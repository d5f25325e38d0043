"""A simulated event camera in front of photographs: the third data set of the study. These events are generated.

Each photograph, in grey and at 41x41 pixels, moves before a camera of 32x32 along a triangle, in three straight lines
of 100 ms, as the camera moved before the pictures of N-Caltech101 (Orchard et al., Front. Neurosci. 9, 2015). Every
millisecond a pixel compares ``log(0.05 + intensity)`` with its value at its last event. It sends one event for
each full 0.2 of difference, and remembers the value that it reached. There is no noise, no dead time, and no mismatch
of pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from utils.files import replacing

__all__ = ["record", "record_folder"]

SIDE = 32  # pixels of the camera
CORNERS = np.array([(0, 8), (4, 0), (8, 8), (0, 8)], float)  # of its view in the photograph, (x, y)
STEPS = 100  # of a line, 1 ms each
THRESHOLD = 0.2
FLOOR = 0.05  # what a black pixel still gives


def record(photograph: Image.Image) -> dict[str, np.ndarray]:
    """The events of one photograph in the order of time: ``t`` (microseconds), ``x``, ``y`` and ``p`` (1: brighter)."""
    side = SIDE + int(CORNERS.max()) + 1
    grey = np.asarray(photograph.convert("L").resize((side, side), Image.Resampling.BILINEAR), float) / 255
    steps = np.arange(3 * STEPS + 1)
    path = np.stack([np.interp(steps, steps[::STEPS], CORNERS[:, axis]) for axis in (0, 1)], 1)
    remembered = _view(grey, *path[0])
    found = []
    for step, position in enumerate(path[1:]):
        change = np.trunc((_view(grey, *position) - remembered) / THRESHOLD).astype(int)
        remembered = remembered + change * THRESHOLD
        y, x = np.nonzero(change)
        count = np.abs(change[y, x])
        number = np.concatenate([np.arange(n) for n in count]) if len(count) else count
        y, x, p = (np.repeat(one, count) for one in (y, x, change[y, x] > 0))
        t = 1000 * step + (1000 * (number + 1) / np.repeat(count, count)).astype(int)
        found.append(np.stack([t, y, x, p]))
    t, y, x, p = np.concatenate(found, 1)
    order = np.lexsort((x, y, t))
    return {name: one[order] for name, one in {"t": t, "x": x, "y": y, "p": p}.items()}


def _view(grey: np.ndarray, x: float, y: float) -> np.ndarray:
    """What the camera sees at a position in the photograph, bilinear, as logarithm."""
    left, top = int(x), int(y)
    a, b = x - left, y - top
    rows = (1 - b) * grey[top : top + SIDE] + b * grey[top + 1 : top + 1 + SIDE]
    return np.log(FLOOR + (1 - a) * rows[:, left : left + SIDE] + a * rows[:, left + 1 : left + 1 + SIDE])


def record_folder(photographs: Path, events: Path) -> None:
    """Of photographs in ``train/<class>/`` and ``val/<class>/`` make recordings in ``train`` and ``test``."""
    for source, target in (("train", "train"), ("val", "test")):
        for path in sorted((photographs / source).glob("*/*")):
            to = events / target / path.parent.name / f"{path.stem}.npz"
            if not to.exists():
                to.parent.mkdir(parents=True, exist_ok=True)
                with Image.open(path) as photograph, replacing(to) as file:
                    np.savez_compressed(file, **record(photograph))

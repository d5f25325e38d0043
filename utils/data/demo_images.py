"""Built-in demo pictures: six kinds of two-coloured patterns, in the folders of ImageNet.

Nothing is downloaded, and every picture is a pure function of (pattern, number, seed). Colours, periods, phases, places
and the covered area are drawn alike for all patterns: what tells the classes apart is the form, which a linear
classifier on pixels cannot see.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from utils.data.demo import made_once

__all__ = ["PATTERNS", "render_picture", "write_demo_images"]

# In alphabetical order: a label is the rank of its folder's name.
PATTERNS: tuple[str, ...] = ("checks", "diamonds", "horizontal", "rays", "rings", "vertical")
SIDE = 64  # pixels
TRAIN, TEST = 120, 30  # pictures of each pattern
SEED = 2025
VERSION = 1  # part of the directory's name: raise it with every change of the generator, so that old sets are not used


def _wave(pattern: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A field over the pixels whose sign makes the pattern: positive on about half of them."""
    period = rng.uniform(9, 18)  # pixels
    u, v = (2 * np.pi * (axis / period + rng.random()) for axis in (x, y))
    if pattern == "horizontal":
        return np.sin(v)
    if pattern == "vertical":
        return np.sin(u)
    if pattern == "checks":
        return np.sin(u) * np.sin(v)
    if pattern == "diamonds":
        return np.sin(u) + np.sin(v) - 0.1
    middle = SIDE * rng.uniform(0.3, 0.7, 2)
    if pattern == "rings":
        return np.sin(2 * np.pi * (np.hypot(x - middle[0], y - middle[1]) / period + rng.random()))
    spokes = rng.integers(4, 8)
    return np.sin(spokes * np.arctan2(y - middle[1], x - middle[0]) + 2 * np.pi * rng.random())


def render_picture(pattern: int, number: int, seed: int = SEED) -> np.ndarray:
    """One picture ``[SIDE, SIDE, 3]``, uint8.

    Args:
        pattern: index into ``PATTERNS``.
        number: which of the pictures of this pattern, from 0.

    Raises:
        ValueError: there is no such picture.
    """
    if not 0 <= pattern < len(PATTERNS) or number < 0:
        raise ValueError(
            f"pattern {pattern}, number {number}: there are {len(PATTERNS)} patterns, and numbers are from 0"
        )
    rng = np.random.default_rng([seed, pattern, number])
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(float)
    tilt = rng.normal(0, 0.1)
    x, y = np.cos(tilt) * x + np.sin(tilt) * y, np.cos(tilt) * y - np.sin(tilt) * x
    share = 1 / (1 + np.exp(-6 * _wave(PATTERNS[pattern], x, y, rng)))[..., None]  # of the first colour, soft edges
    first, second = _two_colours(rng)
    picture = share * first + (1 - share) * second + rng.normal(0, 8, (SIDE, SIDE, 3))
    return np.clip(picture, 0, 255).astype(np.uint8)


def _two_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two random colours that can be told apart."""
    while True:
        first, second = rng.integers(0, 256, (2, 3))
        if np.abs(first - second).sum() > 200:
            return first, second


def write_demo_images(root: Path) -> Path:
    """Write the demo pictures below ``root``, unless they are there already, and return the folder to load them from.

    ``train/<pattern>/<number>.png`` and ``test/<pattern>/<number>.png``. The set appears in one step when it is whole,
    as that of ``utils/data/demo.py``.
    """

    def fill(directory: Path) -> None:
        for label, name in enumerate(PATTERNS):
            for number in range(TRAIN + TEST):
                folder = directory / ("train" if number < TRAIN else "test") / name
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(render_picture(label, number)).save(folder / f"{number:04}.png")
        (directory / "demo.json").write_text(json.dumps({"version": VERSION, "seed": SEED}) + "\n", encoding="utf-8")

    return made_once(Path(root) / f"demo_images_v{VERSION}", fill)

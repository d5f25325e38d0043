"""Event frames as pictures: PNG files of one sample or of a whole data set, and animated GIFs.

    save_as_pic(frames, "pictures", "clap")          # frames [T, 2, H, W] -> pictures/clap_0.png, clap_1.png, ...
    save_every_frame_of_an_entire_DVS_dataset("DVS128Gesture", "data/dvs128", time_steps=16, save_pic_to="pictures")

Polarity 0 is green and polarity 1 blue, on black.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from utils.data.events import EventFrames, load_event_data
from utils.errors import UserError
from utils.files import read_json, replacing, write_text, writing
from utils.logger import progress_bar

__all__ = ["Kind", "colours", "save_as_gif", "save_as_pic", "save_every_frame_of_an_entire_DVS_dataset"]

NAMES = {"dvs128gesture": "dvs128", "cifar10dvs": "cifar10dvs", "ncaltech101": "ncaltech101", "dvs128": "dvs128"}


def colours(x: Tensor | np.ndarray, scale: int = 1, full: float = 1.0) -> np.ndarray:
    """Event frames as RGB pictures.

    Args:
        x: frames ``[T, 2, H, W]``, counts of events (or spikes), not negative.
        scale: side of a sensor pixel in pixels of the picture.
        full: the count at full brightness; below it is darker in proportion. 1 shows every event at full brightness.

    Returns:
        ``[T, H * scale, W * scale, 3]``, uint8.

    Raises:
        ValueError: the shape or an argument is another.
    """
    frames = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    if frames.ndim != 4 or frames.shape[1] != 2:
        raise ValueError(f"x has the shape {list(frames.shape)} and must be event frames [T, 2, H, W]")
    if scale < 1 or scale != int(scale):
        raise ValueError(f"scale={scale!r} must be a whole number of at least 1")
    if not full > 0:
        raise ValueError(f"full={full!r} must be above 0")
    bright = (np.clip(frames.astype(np.float64) / full, 0, 1) * 255).astype(np.uint8)
    picture = np.stack([np.zeros_like(bright[:, 0]), bright[:, 0], bright[:, 1]], axis=-1)
    return picture.repeat(int(scale), axis=1).repeat(int(scale), axis=2)


def save_as_pic(
    x: Tensor | np.ndarray, save_pic_to: str | Path = "./", pic_first_name: str = "pic", scale: int = 1,
    full: float = 1.0,
) -> list[Path]:  # fmt: skip
    """Save every frame of one sample as a PNG file, ``{pic_first_name}_{t}.png``.

    Args:
        x: frames ``[T, 2, H, W]``; polarity 0 becomes green, polarity 1 blue.
        save_pic_to: the folder; it is made where it is not there.
        pic_first_name: how the file names begin.
        scale, full: see :func:`colours`; one pixel of the picture for each pixel of the sensor by default.

    Returns:
        The files, in the order of time. Each appears whole or not at all.
    """
    pictures = colours(x, scale, full)
    paths = _paths(Path(save_pic_to), pic_first_name, len(pictures))
    with writing(f"folder {save_pic_to}"):
        Path(save_pic_to).mkdir(parents=True, exist_ok=True)
        for picture, path in zip(pictures, paths, strict=True):
            with replacing(path, flush=False) as file:
                Image.fromarray(picture).save(file, format="PNG")
    return paths


@dataclass(frozen=True)
class Kind:
    """What all pictures in a folder have in common; ``pictures.json`` there tells it."""

    T: int
    scale: int
    full: float

    def check(self, folder: Path) -> None:
        """Check that the folder holds no pictures of another kind: they would count as made, or lie among the new.

        Raises:
            UserError: it does, or tells something else.
        """
        path = folder / "pictures.json"
        if not path.exists():
            return
        found = read_json(path, {}, "another folder")
        if found != asdict(self):
            raise UserError(
                f"folder {folder} holds pictures of another kind: {_told(found)} there, {_told(asdict(self))} "
                "here; choose another folder"
            )

    def write(self, folder: Path) -> None:
        """Tell it in the folder."""
        with writing(f"folder {folder}"):
            write_text(folder / "pictures.json", json.dumps(asdict(self)) + "\n")


def _told(kind: object) -> str:
    return ", ".join(f"{name} {value}" for name, value in kind.items()) if isinstance(kind, dict) else str(kind)


def save_every_frame_of_an_entire_DVS_dataset(  # noqa: N802 - the published name
    dataset: str,
    dataset_path: str | Path,
    time_steps: int,
    save_pic_to: str | Path = "./",
    number_of_threads: int = 4,
    *,
    sensor_size: Sequence[int] | None = None,
    scale: int = 1,
    full: float = 1.0,
) -> int:
    """Save every frame of every sample of a data set as a PNG file, in parallel.

    The files are ``<save_pic_to>/<class>/<sample>_<t>.png``, below ``train/`` and ``test/`` where the data set has its
    own split. Called again it makes what is missing. ``pictures.json`` beside them tells T, scale and full: a folder
    holds pictures of one kind.

    Args:
        dataset: ``"DVS128Gesture"``, ``"CIFAR10DVS"`` or ``"NCaltech101"``.
        dataset_path: its folder, as for training; frames are made there once where they are not there yet.
        time_steps: T.
        save_pic_to: the folder for the pictures.
        number_of_threads: samples that are worked on at a time.
        sensor_size: (H, W) of another camera.
        scale, full: see :func:`colours`.

    Returns:
        The number of pictures made; those that were there are not counted.

    Raises:
        UserError: the data set is unknown, not there or damaged, a number is below 1, or the folder holds pictures of
            another T, scale or full.
    """
    name = NAMES.get(dataset.lower().replace("-", "").replace("_", "").replace(" ", ""))
    if name is None:
        raise UserError(f"dataset {dataset!r} is unknown; use DVS128Gesture, CIFAR10DVS or NCaltech101")
    for what, value in {"time_steps": time_steps, "number_of_threads": number_of_threads, "scale": scale}.items():
        if value < 1 or value != int(value):
            raise UserError(f"{what}={value} must be a whole number of at least 1")
    if not full > 0:
        raise UserError(f"full={full} must be above 0")
    kind = Kind(time_steps, scale, full)
    kind.check(Path(save_pic_to))
    data = load_event_data(name, Path(dataset_path), time_steps, sensor_size=sensor_size, frames="npz")
    parts: dict[str, Any] = {"train": data.train, "test": data.test}
    kind.write(Path(save_pic_to))
    made = 0
    with ThreadPoolExecutor(number_of_threads) as pool:
        jobs = []
        for part, samples in parts.items():
            folder = Path(save_pic_to) / part if data.info.rule == "own" else Path(save_pic_to)
            jobs += [
                pool.submit(_save_sample, samples, index, folder, data.classes, time_steps, scale, full)
                for index in range(len(samples))
            ]
        try:
            for job in progress_bar(as_completed(jobs), "pictures", unit="sample", total=len(jobs)):
                made += job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return made


def _save_sample(
    samples: EventFrames, index: int, folder: Path, classes: Sequence[str], T: int, scale: int, full: float
) -> int:
    """Make the pictures of one sample unless all are there; how many were made."""
    path, label = samples.files[index]
    folder = folder / classes[label]
    if all(picture.exists() for picture in _paths(folder, path.stem, T)):
        return 0
    return len(save_as_pic(samples[index][0], folder, path.stem, scale, full))


def save_as_gif(x: Tensor | np.ndarray, path: Path, scale: int = 1, full: float = 1.0, seconds: float = 0.1) -> None:
    """Save the frames ``[T, 2, H, W]`` as an animated GIF that repeats, ``seconds`` a frame."""
    first, *others = [Image.fromarray(picture) for picture in colours(x, scale, full)]
    with writing(f"picture {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            first.save(file, format="GIF", save_all=True, append_images=others, duration=round(1000 * seconds), loop=0)


def _paths(folder: Path, name: str, T: int) -> list[Path]:
    return [folder / f"{name}_{t}.png" for t in range(T)]

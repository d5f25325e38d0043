"""Event data: reading frames, splitting them into train and test, augmentation."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from utils.demo import write_demo
from utils.errors import DataError, UserError
from utils.frames import DATA_SETS, frames_folder, sample_name
from utils.loaders import sample_seed

__all__ = ["EventData", "EventFrames", "flip_and_shift", "load_event_data"]

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


@dataclass
class EventFrames(Dataset):
    """Samples of frames.

    A sample is ``(frames [T, 2, H, W] float32, label)``. The augmentation draws from a generator keyed by (seed,
    epoch, sample), so that a result does not depend on the number of workers or processes.

    Args:
        files: the ``.npz`` file and the label of every sample.
        T: the number of frames that every file must have.
        sensor: (H, W) that every file must have.
        frame_size: (H, W) to resize the event counts to (bilinear, antialiased).
        augment: ``(frames, generator) -> frames``, the same for all frames of a sample.
        seed: of the augmentation.
    """

    files: Sequence[tuple[Path, int]]
    T: int
    sensor: tuple[int, int]
    frame_size: tuple[int, int]
    augment: Augmentation | None = None
    seed: int = 0
    epoch: int = 0
    _kept: list[Tensor] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        frames = self._kept[index] if self._kept else self._read(index)
        if self.augment is not None:
            generator = torch.Generator().manual_seed(sample_seed(self.seed, self.epoch, index))
            frames = self.augment(frames, generator)
        return frames, self.files[index][1]

    def keep_in_memory(self) -> None:
        """Read all frames now and serve them from memory from here on (before augmentation)."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self._kept = list(pool.map(self._read, range(len(self))))

    def _read(self, index: int) -> Tensor:
        path, _ = self.files[index]
        try:
            with np.load(path) as file:
                frames = torch.from_numpy(file["frames"].astype(np.float32))
        except Exception as error:  # numpy and zipfile raise many types on a damaged file
            raise DataError(
                f"frame file {path} cannot be read ({error}); delete its frames_number folder to "
                "have all frames made again"
            ) from error
        needed = (self.T, 2, *self.sensor)
        if frames.shape != needed:
            raise DataError(
                f"frame file {path} has shape {list(frames.shape)} and [T, 2, H, W] = {list(needed)} is needed; "
                "give its T and size as -T and --sensor-size, or delete its frames_number folder to have it made again"
            )
        if self.frame_size != self.sensor:
            frames = transforms.resize(frames, list(self.frame_size), antialias=True)
        return frames


@dataclass(frozen=True)
class EventData:
    """A data set ready for training: what is in it, and in words where it comes from."""

    train: EventFrames
    test: EventFrames
    classes: list[str]
    title: str
    split: str
    frame_size: tuple[int, int]


def load_event_data(
    name: str,
    data_dir: Path,
    T: int,
    *,
    split: str = "random",
    split_seed: int = 0,
    sensor_size: Sequence[int] | None = None,
    frame_size: Sequence[int] | None = None,
    augment: Augmentation | None = None,
    seed: int = 0,
    demo: bool = False,
    keep_in_memory: bool = False,
) -> EventData:
    """Find (or make, once) the frames of a data set and split them into train and test.

    Args:
        name: a key of ``DATA_SETS``.
        data_dir: its folder; what must lie there is told at the top of ``utils/frames.py``.
        T: frames per sample.
        split: ``"random"`` (90 / 10 inside each class over the sorted names, ``int(0.9 n)`` to train) or a file with
            lines ``train,<class>/<sample>`` and ``test,<class>/<sample>``. A data set with its own train and test
            folders ignores it.
        split_seed: of the random split.
        sensor_size: (H, W) of the camera, where the recordings are of another one (N-MNIST: 34, 34).
        frame_size: (H, W) to resize to; None keeps the sensor's.
        augment, seed: of the training samples.
        demo: write the built-in demo data to ``data_dir`` first, and use them with their own split.
        keep_in_memory: read all frames now.

    Raises:
        UserError: nothing usable is there; the message says what to put where.
    """
    about = DATA_SETS[name]
    title = about.title
    if demo:
        title = f"demo gestures laid out as {about.title}"
        layout = "gesture" if about.has_split else "folders"
        data_dir = write_demo(data_dir, layout, about.sensor, about.demo_classes)
        split = str(data_dir / "split.csv")
    if sensor_size is not None:
        about = replace(about, sensor=tuple(sensor_size))
    frames_dir = frames_folder(about, Path(data_dir), T)
    if about.has_split:
        train, classes = _list_samples(frames_dir / "train")
        test, test_classes = _list_samples(frames_dir / "test")
        if classes != test_classes:
            unpaired = sorted(set(classes) ^ set(test_classes))
            raise UserError(f"{frames_dir} has the classes {unpaired} in only one of train and test; complete it")
        described = "the data set's own"
    else:
        samples, classes = _list_samples(frames_dir)
        if split == "random":
            train, test = _split_at_random(samples, classes, split_seed)
            described = f"random 90/10 in each class, seed {split_seed}"
        else:
            train, test = _split_by_file(samples, classes, Path(split))
            described = f"file {split}"
    for part, files in {"training": train, "test": test}.items():
        if not files:
            raise UserError(f"{frames_dir} has no {part} samples; check the contents of {data_dir}")
    names = [f"train,{sample_name(path)}" for path, _ in train] + [f"test,{sample_name(path)}" for path, _ in test]
    described += f", fingerprint {hashlib.sha256(chr(10).join(sorted(names)).encode()).hexdigest()[:8]}"
    if not demo and (sensor_size is not None or len({label for _, label in train}) != about.num_classes):
        # Other recordings in its layout: a result on them must not go under its name.
        title = f"{Path(data_dir).resolve().name}, laid out as {about.title}"
    frame_size = tuple(frame_size or about.sensor)
    train_set = EventFrames(train, T, about.sensor, frame_size, augment, seed)
    test_set = EventFrames(test, T, about.sensor, frame_size)
    _ = test_set[0]  # frames of another T or size are found before the training starts
    if keep_in_memory:
        train_set.keep_in_memory()
        test_set.keep_in_memory()
    return EventData(train_set, test_set, classes, title, described, frame_size)


def flip_and_shift(frames: Tensor, generator: torch.Generator, flip: bool = True, most: int = 5) -> Tensor:
    """Mirror left and right with probability 0.5, then move by up to ``most`` pixels in x and y, filled with 0.

    The same for all frames of a sample, ``[T, 2, H, W]``. Source: the published CIFAR10-DVS recipe.
    """
    mirrored, (dx, dy) = torch.rand(1, generator=generator), torch.randint(-most, most + 1, (2,), generator=generator)
    if flip and mirrored < 0.5:
        frames = transforms.horizontal_flip(frames)
    return transforms.affine(frames, angle=0.0, translate=[int(dx), int(dy)], scale=1.0, shear=[0.0])


def _list_samples(folder: Path) -> tuple[list[tuple[Path, int]], list[str]]:
    """Files with their labels, and the class names; both in sorted order, hidden folders left out."""
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist; check the contents of {folder.parent}")
    # Sorted as text ("10" before "2"), as torchvision's DatasetFolder does: the labels of the released weights.
    classes = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    files = [(path, label) for label, name in enumerate(classes) for path in sorted((folder / name).glob("*.npz"))]
    return files, classes


def _split_at_random(
    samples: Sequence[tuple[Path, int]], classes: Sequence[str], seed: int
) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    train, test = [], []
    for label, name in enumerate(classes):
        of_class = [sample for sample in samples if sample[1] == label]
        random.Random(f"{seed}/{name}").shuffle(of_class)
        cut = int(0.9 * len(of_class))
        train += sorted(of_class[:cut])
        test += sorted(of_class[cut:])
    return train, test


def _split_by_file(
    samples: Sequence[tuple[Path, int]], classes: Sequence[str], path: Path
) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--split {path} is neither 'random' nor a readable file ({error})") from error
    by_name = {sample_name(sample[0]): sample for sample in samples}
    parts: dict[str, list] = {"train": [], "test": []}
    for number, line in enumerate(lines, 1):
        part, _, name = line.partition(",")
        if part not in parts or name not in by_name:
            raise UserError(
                f"--split {path}, line {number}: {line!r} is not 'train,<class>/<sample>' or 'test,<class>/<sample>' "
                "of a sample that exists"
            )
        parts[part].append(by_name.pop(name, None))
    return sorted(parts["train"]), sorted(parts["test"])

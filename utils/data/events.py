"""Event data: frames ready for training, split into train and test, and the augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.transforms.v2 import functional as transforms

from utils.data.demo import write_demo
from utils.data.folders import BadFile
from utils.data.loaders import sample_seed
from utils.data.splits import RULES, SplitInfo
from utils.data.store import Store
from utils.errors import DataError, UserError
from utils.prepare.archives import find_archives
from utils.prepare.checks import CHECKS
from utils.prepare.datasets import DATA_SETS, SPLIT_FOLDERS, DataSet
from utils.prepare.frames import read_frames, resized
from utils.prepare.job import Job
from utils.prepare.lock import one_process_at_a_time
from utils.prepare.own import own_data_set
from utils.prepare.stages import STAGES

__all__ = ["EventData", "EventFrames", "check_event_data", "flip_and_shift", "load_event_data"]

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


@dataclass
class EventFrames(Dataset):
    """Samples of frames.

    A sample is ``(frames [T, 2, H, W] float32, label)``. A loader gets batches of the counts as they are stored, in
    small integers where they are not resized, and the engine makes them float32 on the device: the same values. The
    augmentation draws from a generator keyed by (seed, epoch, sample), so that a result does not depend on the number
    of workers or processes.

    Args:
        files: the ``.npz`` file and the label of every sample.
        T: the number of frames that every file must have.
        sensor: (H, W) that every file must have.
        frame_size: (H, W) to resize the event counts to (bilinear, antialiased).
        augment: ``(frames, generator) -> frames``, the same for all frames of a sample.
        seed: of the augmentation.
        store: packed frames of the same samples, read instead of the files.
    """

    files: Sequence[tuple[Path, int]]
    T: int
    sensor: tuple[int, int]
    frame_size: tuple[int, int]
    augment: Augmentation | None = None
    seed: int = 0
    epoch: int = 0
    store: Store | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        frames, label = self._sample(index)
        return frames.float(), label

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """The samples of a batch, for torch's loader: counts in small integers."""
        return [self._sample(index) for index in indices]

    def _sample(self, index: int) -> tuple[Tensor, int]:
        frames = self._read(index)
        if self.augment is not None:
            generator = torch.Generator().manual_seed(sample_seed(self.seed, self.epoch, index))
            frames = self.augment(frames, generator)
        return frames, self.files[index][1]

    def _read(self, index: int) -> Tensor:
        if self.store is not None:
            return torch.from_numpy(self.store[index])
        path, _ = self.files[index]
        try:
            counts = read_frames(path, self.T, self.sensor)
        except DataError as error:
            raise DataError(
                f"frame file {path} {error}; give its T and size as -T and --sensor-size, or delete it to have it made "
                "again"
            ) from error
        if self.frame_size != self.sensor:
            return resized(counts, self.frame_size)
        return torch.from_numpy(counts).float()  # one type in a batch


@dataclass(frozen=True)
class EventData:
    """A data set ready for training: what is in it, and where it comes from."""

    train: EventFrames | Subset
    val: Subset | None  # training samples that are held out, not augmented
    test: EventFrames
    classes: list[str]
    title: str
    info: SplitInfo
    frame_size: tuple[int, int]
    manifest: str  # the text of the split's file, with the checksums of the frames
    left_out: tuple[BadFile, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Of the split: of the names of the samples and their part."""
        return self.info.fingerprint


def load_event_data(
    name: str,
    data_dir: Path,
    T: int,
    *,
    split: str = "random",
    split_seed: int = 0,
    val: float = 0.0,
    sensor_size: Sequence[int] | None = None,
    frame_size: Sequence[int] | None = None,
    augment: Augmentation | None = None,
    seed: int = 0,
    demo: bool = False,
    frames: str = "packed",
    on_bad_sample: str = "stop",
    workers: int | None = None,
    any_archive: bool = False,
    num_classes: int | None = None,
) -> EventData:
    """Find (or make, once) the frames of a data set, check them, and split them into train and test.

    Args:
        name: a key of ``DATA_SETS``; recordings of the user (``utils/prepare/own.py``) are recognised by their folder.
        data_dir: its folder; what must lie there stands at the top of ``utils/prepare/stages.py``.
        T: frames per sample.
        split: one of ``utils.data.splits.RULES`` or a split file; ignored by data with train and test folders, and by
            frames in ``train_dataset/`` and ``test_dataset/``, as the published splitters leave them.
        split_seed: of the random split.
        val: the part of the training samples that is held out, see :func:`utils.data.splits.held_out`.
        sensor_size: (H, W) of the camera, where the recordings are of another one (N-MNIST: 34, 34).
        frame_size: (H, W) to resize to; None keeps the sensor's.
        augment, seed: of the training samples.
        demo: write the built-in demo data to ``data_dir`` first, and use them with their own split.
        frames: read them from ``"packed"`` stores, made here once where the folder can be written to, or from the
            ``"npz"`` files.
        on_bad_sample: ``"stop"`` or ``"skip"``.
        workers: threads that prepare; the cores where it is None.
        any_archive: accept archives without the published checksum. As with ``sensor_size`` the recordings are others,
            which may have fewer classes.
        num_classes: that the network has; another number is found before anything is made.

    Raises:
        UserError: nothing usable is there, the message says what to put where; or files are bad, it lists them all.
    """
    own = None if demo else own_data_set(Path(data_dir))
    about = own or DATA_SETS[name]
    title = about.title
    if demo:
        title = f"demo gestures laid out as {about.title}"
        data_dir = write_demo(data_dir, "gesture" if about.has_split else "folders", about.sensor, about.demo_classes)
        split = str(data_dir / "split.csv")
    elif all((Path(data_dir) / folder).is_dir() for folder in SPLIT_FOLDERS):
        about = replace(about, parts=SPLIT_FOLDERS, is_split_by_folder=True)
    official = not (any_archive or demo or own or sensor_size is not None)
    if sensor_size is not None:
        about = replace(about, sensor=_pair(sensor_size))
    size = _pair(frame_size or about.sensor)
    job = Job(
        about, Path(data_dir), T, size, split, split_seed, val, num_classes, official, any_archive,
        skip_bad=on_bad_sample == "skip", packed=frames == "packed",
    )  # fmt: skip
    job.workers = workers or job.workers
    _check_rule(job)
    try:
        if not job.data_dir.is_dir():
            if not find_archives(job.data_dir, about.archives):
                raise UserError(about.missing(job.data_dir))
            job.data_dir.mkdir(exist_ok=True)  # they lie beside it
        with one_process_at_a_time(job.data_dir):
            for stage in STAGES:
                stage(job)
    except OSError as error:
        raise UserError(
            f"frames cannot be made in --data-dir {job.data_dir} ({error}); give a folder that is complete, can be "
            "written and has room; what is whole stays, and the same command goes on"
        ) from error
    return _event_data(job, title, augment, seed, demo, others=sensor_size is not None)


def _event_data(job: Job, title: str, augment: Augmentation | None, seed: int, demo: bool, others: bool) -> EventData:
    """What training needs of a job that went through all stages."""
    count, about, split = len(job.facts), job.about, job.split
    used = len({job.labels[name] for name in split.train})
    official = not (demo or others) and used == about.num_classes and count == (about.samples or count)
    if not (demo or official):
        # Other recordings in its layout, or a part of them: a result on them must not go under its name.
        title = about.title if about.is_own else f"{job.data_dir.resolve().name}, laid out as {about.title}"
    sets: dict[str, Any] = {"val": None}
    for part, names in {"train": split.train, "test": split.test}.items():
        files = [(Path(job.frames.files[name].path), job.labels[name]) for name in names]
        sets[part] = EventFrames(files, job.T, about.sensor, job.frame_size, store=job.stores.get(part))
    plain, sets["train"] = sets["train"], replace(sets["train"], augment=augment, seed=seed)
    if split.val:
        places = {name: index for index, name in enumerate(split.train)}
        sets["train"], sets["val"] = (
            Subset(samples, [places[name] for name in split.parts[part]])
            for samples, part in ((sets["train"], "train"), (plain, "val"))
        )
    frames = {name: facts.frames for name, facts in job.facts.items()}
    info = SplitInfo(
        split.rule, split.seed, split.file, split.fingerprint, split.contents(frames, job.labels),
        len(split.parts["train"]), len(split.val), len(split.test), len(job.classes), len(job.bad), official, demo,
    )  # fmt: skip
    manifest = split.manifest(
        about.title, {name: f"{facts.content}:{facts.frames}" for name, facts in job.facts.items()}
    )
    return EventData(**sets, classes=job.classes, title=title, info=info, frame_size=job.frame_size, manifest=manifest,
                     left_out=tuple(job.bad))  # fmt: skip


def check_event_data(
    about: DataSet,
    data_dir: Path,
    T: int,
    *,
    split: str = "random",
    split_seed: int = 0,
    workers: int | None = None,
    any_archive: bool = False,
) -> tuple[list[BadFile], dict[str, int]]:
    """Read every archive, recording, event file, file of T frames and packed store of them; nothing is changed.

    Args:
        about: the data set, with the sensor of the recordings.
        data_dir, T, split, split_seed, workers, any_archive: see :func:`load_event_data`.

    Returns:
        What is bad or missing, also for this split, and how many files of each kind were read.

    Raises:
        UserError: there is nothing, or the split cannot be made.
    """
    job = Job(about, data_dir, T, about.sensor, split, split_seed, any_archive=any_archive, change=False)
    job.workers = workers or job.workers
    _check_rule(job)
    for stage in CHECKS:
        stage(job)
    return job.bad, job.counts


def _pair(size: Sequence[int]) -> tuple[int, int]:
    height, width = size
    return height, width


def _check_rule(job: Job) -> None:
    if job.rule in RULES and job.rule not in job.about.rules and not job.about.has_split:
        raise UserError(
            f"--split {job.rule} is no split of {job.about.title}; give one of {', '.join(job.about.rules)}, or a "
            "split file"
        )


def flip_and_shift(frames: Tensor, generator: torch.Generator, flip: bool = True, most: int = 5) -> Tensor:
    """Mirror left and right with probability 0.5, then move in x and y by ``round(u)`` pixels, filled with 0.

    ``u`` is uniform in ``[-most, most]``, so the two largest moves have half the probability of each other one. The
    same for all frames of a sample, ``[T, 2, H, W]``, of any type. Source: the published CIFAR10-DVS recipe.
    """
    mirrored = torch.rand(1, generator=generator)
    dx, dy = torch.empty(2).uniform_(-most, most, generator=generator).round().tolist()
    if flip and mirrored < 0.5:
        frames = transforms.horizontal_flip(frames)
    (to_y, from_y), (to_x, from_x) = _moved(int(dy)), _moved(int(dx))
    moved = torch.zeros_like(frames)
    moved[..., to_y, to_x] = frames[..., from_y, from_x]
    return moved


def _moved(by: int) -> tuple[slice, slice]:
    """Where pixels of an axis go to, and where they come from."""
    return slice(max(by, 0), min(by, 0) or None), slice(max(-by, 0), min(-by, 0) or None)

"""Event data: from the files that SpikingJelly lays out to batches of frames.

SpikingJelly reads the raw recordings and integrates them to frames (``data_type='frame', split_by='number'``). This
file runs that once, whole or not at all and in one process, then reads the frames back:

    <data-dir>/download/   the official archives           (put there by hand)
    <data-dir>/extract/    the recordings                  (unpacked from the archives)
    <data-dir>/events_np/  one .npz of events a sample     (made by SpikingJelly)
    <data-dir>/frames_number_<T>_split_by_number/          (made by SpikingJelly, one folder for each T)

Any of these is a good start: what is there is used, what is missing is made from what comes before it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import io
import os
import random
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision.transforms.v2 import functional as transforms

from utils.demo import write_demo
from utils.distributed import Process
from utils.errors import DataError, UserError

__all__ = ["DATA_SETS", "EventData", "EventFrames", "event_loaders", "flip_and_shift", "load_event_data"]

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class DataSet:
    """What differs between the data sets on disk."""

    title: str
    reader: str  # module and class of SpikingJelly
    sensor: tuple[int, int]  # H, W
    has_split: bool  # its own train and test folders
    num_classes: int
    demo_classes: int  # how many of the eleven demo gestures stand in for its classes
    recordings: str  # what must lie in extract/
    archives: tuple[str, ...]
    page: str  # where to download it

    def missing(self, data_dir: Path) -> str:
        """The sentence for a user who has not got it yet."""
        return (
            f"{self.title} is not in --data-dir {data_dir}; download {self._archives_in_words()} from {self.page} into "
            f"{data_dir / 'download'}, or put events_np/ as SpikingJelly makes it there, or try the software without "
            "any data by --demo"
        )

    def _archives_in_words(self) -> str:
        return self.archives[0] if len(self.archives) == 1 else f"{self.archives[0]} ... {self.archives[-1]}"


DATA_SETS = {
    "dvs128": DataSet(
        title="DVS128 Gesture",
        reader="spikingjelly.datasets.dvs128_gesture.DVS128Gesture",
        sensor=(128, 128),
        has_split=True,
        num_classes=11,
        demo_classes=11,
        recordings="DvsGesture",
        archives=("DvsGesture.tar.gz",),
        page="https://ibm.ent.box.com/s/3hiq58ww1pbbjrinh367ykfdf60xsfm8/folder/50167556794",
    ),
    "cifar10dvs": DataSet(
        title="CIFAR10-DVS",
        reader="spikingjelly.datasets.cifar10_dvs.CIFAR10DVS",
        sensor=(128, 128),
        has_split=False,
        num_classes=10,
        demo_classes=10,
        recordings="",
        archives=tuple(
            f"{name}.zip"
            for name in ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
        ),
        page="https://figshare.com/articles/dataset/CIFAR10-DVS_New/4724671",
    ),
    "ncaltech101": DataSet(
        title="N-Caltech101",
        reader="spikingjelly.datasets.n_caltech101.NCaltech101",
        sensor=(180, 240),
        has_split=False,
        num_classes=101,
        demo_classes=11,
        recordings="Caltech101",
        archives=("Caltech101.zip",),
        page="https://www.garrickorchard.com/datasets/n-caltech101",
    ),
}


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
            key = hashlib.sha256(f"{self.seed}/{self.epoch}/{index}".encode()).digest()
            frames = self.augment(frames, torch.Generator().manual_seed(int.from_bytes(key[:7], "little")))
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
        data_dir: its folder, see the top of this file.
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
    frames_dir = _frames_dir(about, Path(data_dir), T)
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
    names = [f"train,{_sample_name(path)}" for path, _ in train] + [f"test,{_sample_name(path)}" for path, _ in test]
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


class _Shard(Sampler[int]):
    """Every ``world_size``-th sample, without padding: together the processes see every sample once."""

    def __init__(self, count: int, process: Process):
        self.indices = range(process.rank, count, process.world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def event_loaders(
    data: EventData, batch_size: int, num_workers: int, seed: int, process: Process
) -> tuple[DataLoader, DataLoader]:
    """Loaders of training (shuffled by seed and epoch, incomplete batches dropped) and test batches of this process.

    A batch is frames ``[B, T, 2, H, W]`` and labels ``[B]``. Call ``set_epoch`` before every training epoch.

    Raises:
        UserError: there is no complete training batch for every process.
    """
    if len(data.train) < batch_size * process.world_size:
        raise UserError(
            f"--batch-size {batch_size} for {process.world_size} process(es) needs {batch_size * process.world_size} "
            f"training samples and there are {len(data.train)}; use a smaller --batch-size"
        )
    sampler = DistributedSampler(data.train, process.world_size, process.rank, seed=seed, drop_last=True)
    common = {"batch_size": batch_size, "num_workers": num_workers, "pin_memory": process.device.type == "cuda"}
    train = DataLoader(data.train, sampler=sampler, drop_last=True, **common)
    test = DataLoader(data.test, sampler=_Shard(len(data.test), process), **common)
    return train, test


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Give the epoch to everything in a training loader that draws: the order and the augmentation."""
    loader.sampler.set_epoch(epoch)
    loader.dataset.epoch = epoch


def _sample_name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


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
    by_name = {_sample_name(sample[0]): sample for sample in samples}
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


# Making frames ------------------------------------------------------------------------------------------------------


def _frames_dir(about: DataSet, data_dir: Path, T: int) -> Path:
    """The folder of frames for T; made first where it is not there yet."""
    if not data_dir.is_dir():
        raise UserError(about.missing(data_dir))
    frames_dir = data_dir / f"frames_number_{T}_split_by_number"
    try:
        with _one_process_at_a_time(data_dir):
            _set_aside_if_partial(frames_dir, data_dir / "events_np")
            if not frames_dir.is_dir():
                _build(about, data_dir, frames_dir, T)
    except OSError as error:
        raise UserError(
            f"frames cannot be made in --data-dir {data_dir} ({error}); give a folder that is complete, can be written "
            "and has room"
        ) from error
    return frames_dir


@contextlib.contextmanager
def _one_process_at_a_time(data_dir: Path) -> Iterator[None]:
    """Processes of one run, and unrelated runs, build in turn: two at once corrupt a SpikingJelly data set."""
    try:
        lock = (data_dir / ".lock").open("w")
    except OSError:  # a read-only folder: nothing can be built there, so there is nothing to wait for
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _set_aside_if_partial(frames_dir: Path, events_dir: Path) -> None:
    """A build by SpikingJelly itself that was killed leaves a folder that looks whole; count its files."""
    if not (frames_dir.is_dir() and events_dir.is_dir()):
        return
    frames, events = _count_samples(frames_dir), _count_samples(events_dir)
    if frames < events:
        aside = frames_dir.with_name(f"{frames_dir.name}.incomplete-{time.strftime('%Y%m%d-%H%M%S')}")
        print(f"{frames_dir} has {frames} of {events} samples and is made again; the old one is now {aside}")
        frames_dir.rename(aside)
        with contextlib.suppress(FileNotFoundError):
            frames_dir.with_name(f"{frames_dir.name}.building").unlink()  # SpikingJelly 2.x would stop on it


def _count_samples(folder: Path) -> int:
    return len(_sample_paths(folder))


def _build(about: DataSet, data_dir: Path, frames_dir: Path, T: int) -> None:
    """Let SpikingJelly make what is missing in a temporary folder beside, then rename it into place."""
    have_events = _has_files(data_dir / "events_np")
    have_recordings = _has_files(data_dir / "extract" / about.recordings)
    if not have_events and not have_recordings:
        _check_archives(about, data_dir)
    for leftover in data_dir.glob(".building-*"):  # of a killed build: this process has the lock
        shutil.rmtree(leftover)
    temporary = data_dir / f".building-{os.getpid()}"
    try:
        (temporary / "download").mkdir(parents=True)
        if have_events:
            (temporary / "events_np").symlink_to((data_dir / "events_np").resolve())
        elif have_recordings:
            (temporary / "extract").symlink_to((data_dir / "extract").resolve())
        else:
            for archive in about.archives:
                (temporary / "download" / archive).symlink_to((data_dir / "download" / archive).resolve())
        print(f"making {T} frames per sample of {about.title} in {data_dir}, once ...", flush=True)
        began = time.monotonic()
        _run_spikingjelly(about, temporary, frames_dir.name, T)
        for part in ("extract", "events_np", frames_dir.name):
            if (temporary / part).is_dir() and not (temporary / part).is_symlink():
                (temporary / part).rename(data_dir / part)
        print(
            f"made the frames of {_count_samples(frames_dir)} samples in {time.monotonic() - began:.1f} s", flush=True
        )
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_file() for path in folder.rglob("*"))


def _check_archives(about: DataSet, data_dir: Path) -> None:
    absent = [name for name in about.archives if not (data_dir / "download" / name).is_file()]
    if len(absent) == len(about.archives):
        raise UserError(about.missing(data_dir))
    if absent:
        raise UserError(f"{data_dir / 'download'} lacks {', '.join(absent)}; download from {about.page}")
    published = {name: md5 for name, _, md5 in _spikingjelly_class(about).resource_url_md5()}
    for name in about.archives:
        path = data_dir / "download" / name
        with path.open("rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        if md5 != published[name]:
            raise UserError(f"archive {path} has the MD5 {md5} and {published[name]} is published; download it again")


def _spikingjelly_class(about: DataSet) -> type:
    module, _, name = about.reader.rpartition(".")
    with _torchaudio_or_placeholder():
        return getattr(importlib.import_module(module), name)


@contextlib.contextmanager
def _torchaudio_or_placeholder() -> Iterator[None]:
    """SpikingJelly 2.x imports torchaudio with every data set, for speech; its newest release refuses a newer torch."""
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


def _run_spikingjelly(about: DataSet, root: Path, frames_name: str, T: int) -> None:
    """Construct SpikingJelly's data set on ``root``: it makes events and frames as a side effect.

    A sample that it cannot make is dropped silently by 0.0.0.0.14, and stops 2.x with an error that does not name it:
    the files themselves tell.
    """
    cls = _spikingjelly_class(about)
    _mend_fromstring(sys.modules[cls.__module__])
    # The archives were checked above. SpikingJelly would delete one whose checksum differs, or start to download.
    unchecked = type(
        cls.__name__, (cls,), {"resource_url_md5": staticmethod(list), "get_H_W": staticmethod(lambda: about.sensor)}
    )
    keywords = {"train": True} if about.has_split else {}
    failure = None
    with contextlib.redirect_stdout(io.StringIO()):  # a line for every file
        try:
            unchecked(str(root), data_type="frame", frames_number=T, split_by="number", **keywords)
        except Exception as error:
            failure = error
    if not (root / "events_np").is_symlink():
        _refuse_lost(_unconverted(about, root), "recordings that cannot be read")
    if (root / frames_name).is_dir():
        lost = _sample_paths(root / "events_np") - _sample_paths(root / frames_name)
        _refuse_lost(sorted(lost), f"event files of {root.parent / 'events_np'} that cannot be read")
    elif failure is not None:
        raise UserError(
            f"SpikingJelly cannot make frames of {about.title}: {type(failure).__name__}: {failure}; see the data "
            "layout in README.md"
        ) from failure
    # What remains is DatasetFolder's refusal of a class without samples, after everything has been made.


def _mend_fromstring(module: types.ModuleType) -> None:
    """Give SpikingJelly 0.0.0.0.14's CIFAR10-DVS reader the binary ``np.fromstring`` that numpy removed.

    The name ``np`` of that one module is replaced by a view of numpy that has it.
    """
    if module.__name__.endswith("cifar10_dvs") and hasattr(module, "np"):
        module.np = types.SimpleNamespace(**{**vars(np), "fromstring": np.frombuffer})


def _unconverted(about: DataSet, root: Path) -> list[str]:
    """Recordings without an event file."""
    recordings = root / "extract" / about.recordings
    events = root / "events_np"
    if not about.has_split:
        wanted = {_sample_name(path) for path in recordings.glob("*/*") if path.is_file()}
        return sorted(wanted - {_sample_name(path) for path in events.glob("*/*.npz")})
    # One recording of DVS128 Gesture holds many samples, which carry its name and a number.
    lists = [recordings / f"trials_to_{part}.txt" for part in ("train", "test")]
    wanted = {Path(line.strip()).stem for path in lists for line in path.read_text().splitlines() if line.strip()}
    return sorted(wanted - {path.stem.rpartition("_")[0] for path in events.rglob("*.npz")})


def _sample_paths(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.npz")}


def _refuse_lost(lost: Sequence[str], what: str) -> None:
    if lost:
        shown = ", ".join(lost[:10]) + (f" and {len(lost) - 10} more" if len(lost) > 10 else "")
        raise UserError(f"{len(lost)} {what}: {shown}; replace or remove them")

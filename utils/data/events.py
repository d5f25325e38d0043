"""Event data: frames ready for training, split into train and test, and the augmentation."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transforms

from utils.data.demo import write_demo
from utils.data.loaders import sample_seed
from utils.data.splits import RULES, Split, make_split, read_split
from utils.data.store import Contents, Store, damage, open_store, pack, write_store
from utils.errors import DataError, UserError
from utils.files import write_text
from utils.prepare.archives import find_archives
from utils.prepare.check import BadFile, Checksums, check_frames, listing, read_frames
from utils.prepare.frames import (
    DATA_SETS,
    DataSet,
    check_recordings,
    frames_name,
    make_frames,
    one_process_at_a_time,
)
from utils.prepare.parallel import in_threads

__all__ = ["EventData", "EventFrames", "check_event_data", "flip_and_shift", "load_event_data", "packed_path"]

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
Files = list[tuple[Path, int]]


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
    _kept: list[Tensor] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        frames, label = self._sample(index)
        return frames.float(), label

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """The samples of a batch, for torch's loader: counts in small integers."""
        return [self._sample(index) for index in indices]

    def keep_in_memory(self) -> None:
        """Read all frames now and serve them from memory from here on (before augmentation)."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self._kept = list(pool.map(self._read, range(len(self))))

    def _sample(self, index: int) -> tuple[Tensor, int]:
        frames = self._kept[index] if self._kept else self._read(index)
        if self.augment is not None:
            generator = torch.Generator().manual_seed(sample_seed(self.seed, self.epoch, index))
            frames = self.augment(frames, generator)
        return frames, self.files[index][1]

    def _read(self, index: int) -> Tensor:
        if self.store is not None:
            frames = torch.from_numpy(self.store[index])
        else:
            path, _ = self.files[index]
            try:
                counts = read_frames(path, self.T, self.sensor)
            except DataError as error:
                raise DataError(
                    f"frame file {path} {error}; give its T and size as -T and --sensor-size, or delete it to have it "
                    "made again"
                ) from error
            frames = torch.from_numpy(counts).float()  # one type in a batch
        if self.frame_size != self.sensor:
            frames = transforms.resize(frames.float(), list(self.frame_size), antialias=True)
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
    fingerprint: str  # of the split
    manifest: str  # the text of the split's file
    left_out: tuple[BadFile, ...] = ()


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
    frames: str = "packed",
    on_bad_sample: str = "stop",
    workers: int | None = None,
    any_archive: bool = False,
) -> EventData:
    """Find (or make, once) the frames of a data set, check them, and split them into train and test.

    Args:
        name: a key of ``DATA_SETS``.
        data_dir: its folder; what must lie there is told at the top of ``utils/prepare/frames.py``.
        T: frames per sample.
        split: one of ``utils.data.splits.RULES`` or a split file; ignored by data with train and test folders.
        split_seed: of the random split.
        sensor_size: (H, W) of the camera, where the recordings are of another one (N-MNIST: 34, 34).
        frame_size: (H, W) to resize to; None keeps the sensor's.
        augment, seed: of the training samples.
        demo: write the built-in demo data to ``data_dir`` first, and use them with their own split.
        keep_in_memory: read all frames now.
        frames: read them from ``"packed"`` stores, made here once where the folder can be written to, or from the
            ``"npz"`` files.
        on_bad_sample: ``"stop"`` or ``"skip"``.
        workers: threads that prepare; the cores where it is None.
        any_archive: accept archives without the published checksum. As with ``sensor_size`` the recordings are others,
            which may have fewer classes.

    Raises:
        UserError: nothing usable is there, the message says what to put where; or files are bad, it lists them all.
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
    _check_rule(about, split)
    data_dir, workers = Path(data_dir), workers or _cores()
    others = any_archive or sensor_size is not None  # not the official recordings: fewer classes are no fault
    try:
        if not data_dir.is_dir():
            if not find_archives(data_dir, about.archives):
                raise UserError(about.missing(data_dir))
            data_dir.mkdir(exist_ok=True)  # they lie beside it
        with one_process_at_a_time(data_dir):
            skip = on_bad_sample == "skip"
            prepared = _prepare(about, data_dir, T, split, split_seed, skip, workers, any_archive, others)
            stores = _stores(about, data_dir, T, prepared, workers) if frames == "packed" else {}
    except OSError as error:
        raise UserError(
            f"frames cannot be made in --data-dir {data_dir} ({error}); give a folder that is complete, can be written "
            "and has room; what is whole stays, and the same command goes on"
        ) from error
    count, classes = len(prepared.inspected), len({label for _, label in prepared.train})
    complete = classes == about.num_classes and count == (about.samples or count)
    if not demo and (sensor_size is not None or not complete):
        # Other recordings in its layout, or a part of them: a result on them must not go under its name.
        title = f"{data_dir.resolve().name}, laid out as {about.title}"
    size = tuple(frame_size or about.sensor)
    train_set = EventFrames(prepared.train, T, about.sensor, size, augment, seed, store=stores.get("train"))
    test_set = EventFrames(prepared.test, T, about.sensor, size, store=stores.get("test"))
    if keep_in_memory:
        train_set.keep_in_memory()
        test_set.keep_in_memory()
    return EventData(
        train_set, test_set, prepared.classes, title, prepared.split.described, size,
        prepared.split.fingerprint, prepared.manifest, tuple(prepared.bad),
    )  # fmt: skip


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

    Returns:
        What is bad or missing, also for this split, and how many files of each kind were read.

    Raises:
        UserError: there is nothing, or the split cannot be made.
    """
    _check_rule(about, split)
    workers = workers or _cores()
    bad, counts = check_recordings(about, data_dir, workers, any_archive)
    folder = data_dir / frames_name(T)
    if folder.is_dir():
        files, _, empty = _list_samples(folder, _parts(about))
        paths = {_key(folder, path): path for of_part in files.values() for path, _ in of_part}
        inspected, bad_frames = check_frames(paths, T, about.sensor, None, workers)
        bad += empty + bad_frames
        divided = _split(about, split, split_seed, paths, bad)
        bad += about.lacking_classes(folder, paths, empty) + _contradictions(divided, paths, inspected)
        counts[f"files of {T} frames"] = len(paths)
    stores = sorted(data_dir.glob(f"{packed_folder(T, about.sensor)}/*.frames"))
    bad += [BadFile(path, what) for path in stores if (what := damage(path))]
    counts["packed stores"] = len(stores)
    if not any(counts.values()):
        raise UserError(about.missing(data_dir))
    return bad, {what: count for what, count in counts.items() if count}


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


def packed_folder(T: int, sensor: tuple[int, int]) -> str:
    """The name of the folder of packed frames."""
    return f"packed_T{T}_{sensor[0]}x{sensor[1]}"


def packed_path(data_dir: Path, T: int, sensor: tuple[int, int], split: Split, part: str) -> Path:
    """Where the packed frames of one part of a split lie."""
    return data_dir / packed_folder(T, sensor) / f"{split.file_name}_{part}.frames"


@dataclass
class _Prepared:
    """The whole frames of a data set, split."""

    split: Split
    classes: list[str]
    train: Files
    test: Files
    inspected: Mapping[str, Checksums]
    manifest: str
    bad: list[BadFile]
    keys: dict[str, list[tuple[str, int]]]  # of train and test, with labels


def _prepare(
    about: DataSet,
    data_dir: Path,
    T: int,
    rule: str,
    seed: int,
    skip_bad: bool,
    workers: int,
    any_archive: bool,
    others: bool,
) -> _Prepared:
    folder, bad = make_frames(about, data_dir, T, workers, any_archive, skip_bad)
    parts = _parts(about)
    if bad and not all((folder / part).is_dir() for part in parts):
        raise _refusal(bad, data_dir)
    files, classes, empty = _list_samples(folder, parts)
    bad += empty
    paths = {_key(folder, path): path for of_part in files.values() for path, _ in of_part}
    record = data_dir / f".checked_T{T}_{about.sensor[0]}x{about.sensor[1]}"
    inspected, bad_frames = check_frames(paths, T, about.sensor, record, workers)
    bad += bad_frames
    split = _split(about, rule, seed, paths, bad)
    if not others:
        bad += about.lacking_classes(folder, {*paths, *_samples(bad)}, empty)
    bad += _contradictions(split, paths, inspected)
    if bad and not skip_bad:
        raise _refusal(bad, data_dir)
    if bad:
        print(f"left out: {len(bad)} bad files{listing(bad)}", flush=True)
    split = split.without(_samples(bad))
    labels = {_key(folder, path): label for of_part in files.values() for path, label in of_part}
    train, test = ([(paths[name], labels[name]) for name in part] for part in (split.train, split.test))
    for part, samples in {"training": train, "test": test}.items():
        if not samples:
            raise UserError(f"{folder} has no {part} samples; check the contents of {data_dir}")
    manifest = split.manifest(about.title, {name: found.content for name, found in inspected.items()})
    if os.access(data_dir, os.W_OK):
        write_text(data_dir / "splits" / f"{split.file_name}.txt", manifest)
    keys = {"train": [(key, labels[key]) for key in split.train], "test": [(key, labels[key]) for key in split.test]}
    return _Prepared(split, classes, train, test, inspected, manifest, bad, keys)


def _refusal(bad: Sequence[BadFile], data_dir: Path) -> UserError:
    return UserError(
        f"{len(bad)} bad files in --data-dir {data_dir}; replace them, delete those that can be made again, "
        f"or leave them out by --on-bad-sample skip:{listing(bad)}"
    )


def _check_rule(about: DataSet, rule: str) -> None:
    if rule in RULES and rule not in about.rules and not about.has_split:
        raise UserError(
            f"--split {rule} is no split of {about.title}; give one of {', '.join(about.rules)}, or a split file"
        )


def _split(about: DataSet, rule: str, seed: int, paths: Iterable[str], bad: Sequence[BadFile]) -> Split:
    """The split of all samples, the bad ones included: leaving one out does not move the others."""
    if about.has_split:
        train, test = (tuple(name for name in paths if name.startswith(f"{part}/")) for part in _parts(about))
        return Split("the data set's own", "own", train, test)
    names = sorted({*paths, *_samples(bad)})
    return make_split(rule, names, seed) if rule in RULES else read_split(Path(rule), names)


def _samples(bad: Sequence[BadFile]) -> set[str]:
    return {file.sample for file in bad if file.sample}


def _parts(about: DataSet) -> tuple[str, ...]:
    return ("train", "test") if about.has_split else (".",)


def _key(folder: Path, path: Path) -> str:
    """``<class>/<sample>``; of a data set with its own split ``<part>/<class>/<sample>``: names may be in both."""
    return str(path.relative_to(folder).with_suffix(""))


def _list_samples(folder: Path, parts: Sequence[str]) -> tuple[dict[str, Files], list[str], list[BadFile]]:
    """Files with their labels, and the class names, both in sorted order; and classes without samples.

    Hidden folders are left out.
    """
    found: dict[str, dict[str, list[Path]]] = {}
    for part in parts:
        if not (folder / part).is_dir():
            raise UserError(f"folder {folder / part} does not exist; check the contents of {folder.parent}")
        folders = [f for f in (folder / part).iterdir() if f.is_dir() and not f.name.startswith(".")]
        found[part] = {f.name: sorted(p for p in f.glob("*.npz") if not p.name.startswith(".")) for f in folders}
    # Sorted as text ("10" before "2"), as torchvision's DatasetFolder does: the labels of the released weights.
    classes = sorted({name for of_part in found.values() for name, paths in of_part.items() if paths})
    empty = []
    for part, of_part in found.items():
        lacking = [name for name in classes if not of_part.get(name)]
        lacking += [name for name, paths in of_part.items() if not paths and name not in classes]
        empty += [BadFile(folder / part / name, "is a class without samples") for name in lacking]
    files = {
        part: [(path, label) for label, name in enumerate(classes) for path in of_part.get(name, ())]
        for part, of_part in found.items()
    }
    return files, classes, empty


def _contradictions(split: Split, paths: Mapping[str, Path], inspected: Mapping[str, Checksums]) -> list[BadFile]:
    """Samples that are another than the split file says, and training samples that are in the test set, too."""
    bad = [
        BadFile(paths[name], f"has the checksum {inspected[name].content} and {wanted} is in the split file", name)
        for name, wanted in split.checksums.items()
        if name in inspected and inspected[name].content != wanted
    ]
    test = {inspected[name].content: name for name in split.test if name in inspected}
    bad += [
        BadFile(paths[name], f"has the same events as the test sample {test[inspected[name].content]}", name)
        for name in split.train
        if name in inspected and inspected[name].content in test
    ]
    return bad


def _stores(about: DataSet, data_dir: Path, T: int, prepared: _Prepared, workers: int) -> dict[str, Store]:
    """The packed frames of both parts, made where they are not there; none where the folder cannot be written to."""
    stores = {}
    for part, files in {"train": prepared.train, "test": prepared.test}.items():
        path = packed_path(data_dir, T, about.sensor, prepared.split, part)
        lines = [f"{key} {label} {prepared.inspected[key].frames}" for key, label in prepared.keys[part]]
        checksum = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        contents = Contents(T, *about.sensor, part, prepared.split.fingerprint, len(files), checksum)
        store = open_store(path, contents)
        if store is None:
            if not os.access(data_dir, os.W_OK):
                print(f"{data_dir} cannot be written to: frames are read from the .npz files", flush=True)
                return {}
            print(f"packing the {part} frames into {path} ...", flush=True)
            for leftover in path.parent.glob(".*.partial"):  # of a killed process: this one has the lock
                leftover.unlink()
            packed = in_threads(
                lambda path: pack(read_frames(path, T, about.sensor)), [p for p, _ in files], workers, f"packing {part}"
            )
            write_store(path, contents, packed)
            store = open_store(path, contents)
        stores[part] = store
    return stores


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Making frames: from the archives or recordings of a data set to frames, a file a sample, once.

    <data-dir>/download/   the official archives           (put there by hand)
    <data-dir>/extract/    the recordings                  (unpacked from the archives)
    <data-dir>/events_np/  one .npz of events a sample     (as SpikingJelly makes them)
    <data-dir>/frames_number_<T>_split_by_number/          (as SpikingJelly makes them, one folder for each T)

Any of these is a good start: what is there is used, what is missing is made from what comes before it, by one process
while the others wait. A file grows under the name ``.<name>.partial`` and a folder under ``.building-<name>``, so that
what this program gives its name is whole; the same call goes on where a killed one stopped. A folder that has its name
and files already, as SpikingJelly may leave it, is completed where it is, from what comes before it.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import UserError
from utils.files import partial_of, write_text
from utils.prepare.archives import archive_fault, contents_fault, find_archives, unpack
from utils.prepare.check import BadFile
from utils.prepare.parallel import in_threads
from utils.prepare.recordings import Events, RecordingError, Span, read_aedat2, read_aedat3, read_bin, read_spans
from utils.prepare.spikingjelly_data import integrate, published_md5

__all__ = [
    "DATA_SETS",
    "DataSet",
    "check_recordings",
    "frames_name",
    "make_frames",
    "one_process_at_a_time",
    "sample_name",
    "sample_paths",
]


@dataclass(frozen=True)
class DataSet:
    """What differs between the data sets on disk."""

    title: str
    reader: str  # module and class of SpikingJelly
    sensor: tuple[int, int]  # H, W
    timesteps: int  # T of its recipe
    split_seed: int  # of its recipe
    has_split: bool  # its own train and test folders
    num_classes: int
    samples: int | None  # in the official data, where that is certain
    demo_classes: int  # how many of the eleven demo gestures stand in for its classes
    recordings: str  # the folder in extract/ that holds them
    suffix: str  # of a recording
    archives: tuple[str, ...]
    page: str  # where to download it
    sample_names: str  # a pattern: those of its official samples
    class_names: tuple[str, ...] = ()  # where they are known
    rules: tuple[str, ...] = ("random", "first90")  # of its splits

    def missing(self, data_dir: Path) -> str:
        """The sentence for a user who has not got it yet."""
        return (
            f"{self.title} is not in --data-dir {data_dir}; download {self._archives_in_words()} from {self.page} into "
            f"{data_dir / 'download'}, or put events_np/ as SpikingJelly makes it there, or try the software without "
            "any data by --demo"
        )

    def lacking_classes(self, folder: Path, samples: Iterable[str], told: Iterable[BadFile] = ()) -> list[BadFile]:
        """The classes that samples ``<class>/<sample>`` lack if they are most of the official ones; else none.

        They are official by their names: other recordings may have fewer classes.

        Args:
            folder: holds them.
            told: what is known to be bad: an empty class is not told twice.
        """
        names = [name.split("/")[-2:] for name in samples]
        classes = {label for label, _ in names}
        most = self.num_classes / 2 < len(classes) < self.num_classes and classes <= set(self.class_names or classes)
        if not most or not all(re.fullmatch(self.sample_names, name) for _, name in names):
            return []
        others = "--sensor-size HxW says that these are other recordings"
        if not self.class_names:
            return [BadFile(folder, f"has {len(classes)} of the {self.num_classes} classes of {self.title}; {others}")]
        lacking = {folder / name for name in self.class_names if name not in classes} - {file.path for file in told}
        return [BadFile(path, f"is missing: a class of {self.title}; {others}") for path in sorted(lacking)]

    def _archives_in_words(self) -> str:
        return self.archives[0] if len(self.archives) == 1 else f"{self.archives[0]} ... {self.archives[-1]}"


_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

DATA_SETS = {
    "dvs128": DataSet(
        title="DVS128 Gesture",
        reader="spikingjelly.datasets.dvs128_gesture.DVS128Gesture",
        sensor=(128, 128),
        timesteps=16,
        split_seed=0,
        has_split=True,
        num_classes=11,
        samples=1464,
        demo_classes=11,
        recordings="DvsGesture",
        suffix=".aedat",
        archives=("DvsGesture.tar.gz",),
        sample_names=r"user\d\d_[a-z_]+_\d+",
        class_names=tuple(map(str, range(11))),
        page="https://ibm.ent.box.com/s/3hiq58ww1pbbjrinh367ykfdf60xsfm8/folder/50167556794",
    ),
    "cifar10dvs": DataSet(
        title="CIFAR10-DVS",
        reader="spikingjelly.datasets.cifar10_dvs.CIFAR10DVS",
        sensor=(128, 128),
        timesteps=10,
        split_seed=3404,
        has_split=False,
        num_classes=10,
        samples=10_000,
        demo_classes=10,
        recordings="",
        suffix=".aedat",
        archives=tuple(f"{name}.zip" for name in _CIFAR10),
        sample_names=r"cifar10_[a-z]+_\d+",
        class_names=_CIFAR10,
        rules=("random", "first90", "tebn"),
        page="https://figshare.com/articles/dataset/CIFAR10-DVS_New/4724671",
    ),
    "ncaltech101": DataSet(
        title="N-Caltech101",
        reader="spikingjelly.datasets.n_caltech101.NCaltech101",
        sensor=(180, 240),
        timesteps=14,
        split_seed=3402,
        has_split=False,
        num_classes=101,
        samples=None,
        demo_classes=11,
        recordings="Caltech101",
        suffix=".bin",
        archives=("Caltech101.zip",),
        sample_names=r"image_\d{4}",
        page="https://www.garrickorchard.com/datasets/n-caltech101",
    ),
}


def sample_name(path: Path) -> str:
    """``<class>/<sample>``, as split files have it."""
    return f"{path.parent.name}/{path.stem}"


def frames_name(T: int) -> str:
    """The name of the folder of frames for T."""
    return f"frames_number_{T}_split_by_number"


def sample_paths(folder: Path, suffix: str = ".npz") -> dict[str, Path]:
    """The files of a folder by their path in it without suffix, sorted; hidden ones left out."""
    paths = sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file())
    inside = ((path.relative_to(folder).with_suffix(""), path) for path in paths)
    return {str(name): path for name, path in inside if not any(part.startswith(".") for part in name.parts)}


@contextlib.contextmanager
def one_process_at_a_time(data_dir: Path) -> Iterator[None]:
    """Processes of one run, and unrelated runs, prepare a folder in turn; a kill ends the lock, too."""
    path = data_dir / ".lock"
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(path.open("w"))
        except OSError:  # it is another user's, who may be at work, or the folder cannot be written to
            # Where there is none to open, nothing can be built, and there is nothing to wait for.
            with contextlib.suppress(OSError):
                fcntl.flock(stack.enter_context(path.open("r")), fcntl.LOCK_EX)
        else:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_frames(
    about: DataSet, data_dir: Path, T: int, workers: int = 1, any_archive: bool = False, skip_bad: bool = False
) -> tuple[Path, list[BadFile]]:
    """Make what is missing; call it inside :func:`one_process_at_a_time`.

    Args:
        workers: threads.
        any_archive: accept archives without the published checksum: other recordings in the same layout.
        skip_bad: give the folders their names although files are bad.

    Returns:
        The folder of frames (under its building name as long as files are bad, unless ``skip_bad``), and the recordings
        and event files that cannot be used.

    Raises:
        UserError: nothing usable is there; the message says what to put where.
        OSError: no room, or the folder cannot be written to.
    """
    frames_dir, events_dir = data_dir / frames_name(T), data_dir / "events_np"
    recordings = data_dir / "extract" / about.recordings
    frames = sample_paths(frames_dir)
    if not _has_files(events_dir, ".npz"):
        # Frames alone are a good start; recordings beside them tell whether one is missing.
        if frames and frames.keys() >= {name for found in _recordings(about, recordings)[0] for name in found.samples}:
            return frames_dir, []
        if not _has_files(recordings, about.suffix):
            _unpack_archives(about, data_dir, T, any_archive)
    bad: list[BadFile] = []
    if _has_files(recordings, about.suffix):
        events_dir, bad = _make_events(about, recordings, events_dir, workers, skip_bad)
    events = sample_paths(events_dir)
    if frames and frames.keys() >= events.keys():
        return frames_dir, bad
    # What SpikingJelly 2.x would stop on, where it was killed.
    frames_dir.with_name(f"{frames_dir.name}.building").unlink(missing_ok=True)
    with _growing(frames_dir) as folder:
        left = {name: path for name, path in events.items() if not zipfile.is_zipfile(folder / f"{name}.npz")}
        print(f"making {T} frames of {len(left)} samples in {data_dir} ...", flush=True)

        def make(name: str) -> BadFile | None:
            try:
                made = integrate(_read_events(left[name], about.sensor), T, about.sensor)
            except RecordingError as error:
                return BadFile(error.path, error.what, name)
            _save(folder / f"{name}.npz", {"frames": made})
            return None

        bad += filter(None, in_threads(make, list(left), workers, "frames"))
        return _name_if(not bad or skip_bad, folder, frames_dir), bad


def check_recordings(
    about: DataSet, data_dir: Path, workers: int, any_archive: bool
) -> tuple[list[BadFile], dict[str, int]]:
    """Read every archive, recording and event file that is there; the bad ones, and how many there are of each kind."""
    recordings = data_dir / "extract" / about.recordings
    found, bad = _recordings(about, recordings)
    events = sample_paths(data_dir / "events_np")
    archives, md5 = find_archives(data_dir, about.archives), published_md5(about.reader)
    if archives and not (any_archive or found or events or any(data_dir.glob(frames_name("*")))):
        absent = [name for name in about.archives if name not in archives]
        bad += [BadFile(data_dir / "download" / name, f"is missing; download it from {about.page}") for name in absent]
    for name, path in archives.items():
        try:
            fault = archive_fault(path, md5[name], any_archive, None) or (contents_fault(path) if any_archive else "")
        except OSError as error:
            fault = f"cannot be read ({error.strerror or error})"
        bad += [BadFile(path, fault)] if fault else []

    def check(recording: _Recording) -> BadFile | None:
        try:
            for of_sample in _samples_of(about, recording):
                _check_events(recording.path, of_sample, about.sensor)
        except RecordingError as error:
            return BadFile(error.path, error.what, recording.samples[0])
        return None

    def check_events(name: str) -> BadFile | None:
        try:
            _read_events(events[name], about.sensor)
        except RecordingError as error:
            return BadFile(error.path, error.what, name)
        return None

    bad += filter(None, in_threads(check, found, workers, "checking recordings"))
    bad += filter(None, in_threads(check_events, list(events), workers, "checking events"))
    bad += about.lacking_classes(recordings, (name for recording in found for name in recording.samples), bad)
    bad += about.lacking_classes(data_dir / "events_np", events)
    return bad, {"archives": len(archives), "recordings": len(found), "event files": len(events)}


def _has_files(folder: Path, suffix: str) -> bool:
    return folder.is_dir() and any(path.is_file() for path in folder.rglob(f"[!.]*{suffix}"))


# Folders and files that are whole when they have their name -----------------------------------------------------------


@contextlib.contextmanager
def _growing(final: Path) -> Iterator[Path]:
    """The folder to put files into: the final one where it has files, else one beside that :func:`_name_if` renames."""
    target = _target(final)
    folder = final if _any_file(final) else target.with_name(f".building-{target.name}")
    folder.mkdir(exist_ok=True)
    yield folder


def _name_if(whole: bool, folder: Path, final: Path) -> Path:
    if not whole or folder == final:
        return folder
    target = _target(final)
    if target.is_dir():  # empty folders: a file that was put there meanwhile stays, and is an error
        for path in sorted((target, *target.rglob("*")), reverse=True):
            path.rmdir()
    folder.rename(target)
    return final


def _any_file(folder: Path) -> bool:
    return any(path.is_file() for path in folder.rglob("*"))


def _target(final: Path) -> Path:
    """Where a link leads: the user chose that disk."""
    return final.resolve() if final.is_symlink() else final


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a compressed ``.npz``, beside first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = partial_of(path)
    with beside.open("wb") as file:
        np.savez_compressed(file, **arrays)
    beside.rename(path)


# Archives to recordings -----------------------------------------------------------------------------------------------


def _unpack_archives(about: DataSet, data_dir: Path, T: int, any_archive: bool) -> None:
    found = find_archives(data_dir, about.archives)
    absent = [name for name in about.archives if name not in found]
    if not found:
        folders = (path.name.split("_")[2] for path in data_dir.glob(frames_name("*")) if _has_files(path, ".npz"))
        others = sorted(int(number) for number in folders if number.isdecimal())
        if others:
            raise UserError(
                f"--data-dir {data_dir} has frames for T = {', '.join(map(str, others))} and {T} are asked for; give "
                "one of these as -T, or put events_np/ there, from which the others are made"
            )
        raise UserError(about.missing(data_dir))
    if absent and not any_archive:
        raise UserError(f"{data_dir / 'download'} lacks {', '.join(absent)}; download from {about.page}")
    extract = data_dir / "extract"
    if _any_file(extract):  # unpacking into it could be cut short, and be taken for whole
        raise UserError(
            f"folder {extract} has files and no {about.suffix} files in {about.recordings or 'class folders'}; move it "
            "away to have the archives unpacked"
        )
    md5 = published_md5(about.reader)
    for name, path in found.items():
        fault = archive_fault(path, md5[name], any_archive, data_dir / ".checked_archives")
        if fault:
            raise UserError(
                f"archive {path} {fault}; download it again, or take other recordings in the same layout by "
                "tools/prepare_data.py --any-archive"
            )
    # What a killed process unpacked is gone on with only if it came from the very same archives.
    stamps = "".join(f"{p.stat().st_size} {p.stat().st_mtime_ns} {p.name}\n" for p in found.values())
    begun = data_dir / ".unpacking"
    with _growing(extract) as folder:
        if not (begun.is_file() and begun.read_text(encoding="utf-8") == stamps):
            shutil.rmtree(folder)
            write_text(begun, stamps)
            folder.mkdir()
        for path in found.values():
            print(f"unpacking {path} ...", flush=True)
            unpack(path, folder)
        if not any((folder / about.recordings).rglob(f"*{about.suffix}")):
            raise UserError(
                f"{', '.join(map(str, found.values()))} hold no {about.suffix} files in "
                f"{about.recordings or 'class folders'}; use the official ones"
            )
        begun.unlink(missing_ok=True)
        _name_if(True, folder, extract)


# Recordings to events -------------------------------------------------------------------------------------------------


class _Recording(NamedTuple):
    """A recording and the samples, below the folder of events, that it gives."""

    path: Path
    samples: list[str]
    spans: list[Span]  # of DVS128 Gesture


def _make_events(
    about: DataSet, recordings: Path, events_dir: Path, workers: int, skip_bad: bool
) -> tuple[Path, list[BadFile]]:
    found, bad = _recordings(about, recordings)
    with _growing(events_dir) as folder:
        there = sample_paths(folder).keys()
        left = [recording for recording in found if not there >= set(recording.samples)]
        if left:
            print(f"converting {len(left)} recordings in {recordings} ...", flush=True)

        def convert(recording: _Recording) -> list[BadFile]:
            try:
                samples = _samples_of(about, recording)
            except RecordingError as error:
                return [BadFile(error.path, error.what, name) for name in recording.samples]
            for name, events in zip(recording.samples, samples, strict=True):
                _save(folder / f"{name}.npz", events)
            return []

        for of_one in in_threads(convert, left, workers, "events"):
            bad += of_one
        return _name_if(not bad or skip_bad, folder, events_dir), bad


def _recordings(about: DataSet, folder: Path) -> tuple[list[_Recording], list[BadFile]]:
    """What there is to convert; and lists, labels and classes that are not as they should be."""
    if not folder.is_dir():
        return [], []
    if about.has_split:
        return _gesture_recordings(folder)
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    found, bad = [], []
    for path in classes:
        files = sorted(file for file in path.glob(f"*{about.suffix}") if not file.name.startswith("."))
        if not files:
            bad.append(BadFile(path, f"is a class without {about.suffix} files"))
        found += [_Recording(file, [sample_name(file)], []) for file in files]
    return found, bad


def _gesture_recordings(folder: Path) -> tuple[list[_Recording], list[BadFile]]:
    """The recordings that the two lists of DVS128 Gesture name."""
    found, bad = [], []
    for part in ("train", "test"):
        listed = folder / f"trials_to_{part}.txt"
        try:
            lines = listed.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            bad.append(BadFile(listed, f"cannot be read ({error})"))
            continue
        for path in (folder / Path(line.strip()).name for line in lines if line.strip()):
            try:
                spans = read_spans(path.with_name(f"{path.stem}_labels.csv"))
            except RecordingError as error:
                bad.append(BadFile(error.path, error.what))
                continue
            counts = dict.fromkeys((span.label for span in spans), 0)
            samples = []
            for span in spans:
                samples.append(f"{part}/{span.label}/{path.stem}_{counts[span.label]}")
                counts[span.label] += 1
            found.append(_Recording(path, samples, spans))
    return found, bad


def _samples_of(about: DataSet, recording: _Recording) -> list[Events]:
    """The events of every sample of a recording.

    Raises:
        RecordingError
    """
    path = recording.path
    if not about.has_split:
        return [(read_aedat2 if about.suffix == ".aedat" else read_bin)(path)]
    events, cut = read_aedat3(path)
    last = int(events["t"].max(initial=0))
    beyond = [span for span in recording.spans if span.end > last]
    if cut and beyond:
        raise RecordingError(path, f"is cut off at {last} us, before the end of {len(beyond)} of its labelled spans")
    inside = (np.flatnonzero((events["t"] >= span.start) & (events["t"] < span.end)) for span in recording.spans)
    return [{name: values[chosen] for name, values in events.items()} for chosen in inside]


# Events to frames -----------------------------------------------------------------------------------------------------


def _read_events(path: Path, sensor: tuple[int, int]) -> Events:
    """The events of a file as SpikingJelly writes it.

    Raises:
        RecordingError: it is damaged, or has events outside the sensor.
    """
    try:
        with np.load(path) as file:
            events = {name: file[name] for name in ("t", "x", "y", "p")}
    except Exception as error:  # numpy and zipfile raise many types on a damaged file
        what = f"cannot be read, it is damaged or cut off ({type(error).__name__}: {error})"
        raise RecordingError(path, what) from error
    _check_events(path, events, sensor)
    return events


def _check_events(path: Path, events: Events, sensor: tuple[int, int]) -> None:
    if len({values.shape for values in events.values()}) != 1 or events["t"].ndim != 1:
        raise RecordingError(path, "has t, x, y and p of different lengths")
    if not all(values.dtype.kind in "iub" for values in (events["x"], events["y"], events["p"])):
        raise RecordingError(path, "has x, y or p that are no whole numbers")
    height, width = sensor
    largest = {axis: int(events[axis].max(initial=0)) for axis in "xy"}
    if largest["x"] >= width or largest["y"] >= height or min(events[axis].min(initial=0) for axis in "xy") < 0:
        raise RecordingError(
            path,
            f"has events up to x {largest['x']}, y {largest['y']}, and the sensor has {height}x{width} pixels; "
            "--sensor-size HxW tells another size",
        )

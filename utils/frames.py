"""Making frames: from the archives or recordings of a data set to the frames that SpikingJelly integrates, once.

    <data-dir>/download/   the official archives           (put there by hand)
    <data-dir>/extract/    the recordings                  (unpacked from the archives)
    <data-dir>/events_np/  one .npz of events a sample     (made by SpikingJelly)
    <data-dir>/frames_number_<T>_split_by_number/          (made by SpikingJelly, one folder for each T)

Any of these is a good start: what is there is used, what is missing is made from what comes before it, whole or not at
all and by one process while the others wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import io
import os
import shutil
import sys
import time
import types
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import UserError

__all__ = ["DATA_SETS", "DataSet", "frames_folder", "one_process_at_a_time", "sample_name"]


# Of SpikingJelly: one file of events to one file of frames.
_INTEGRATE = "integrate_events_file_to_frames_file_by_fixed_frames_number"


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


def sample_name(path: Path) -> str:
    """``<class>/<sample>``, as split files have it."""
    return f"{path.parent.name}/{path.stem}"


def frames_folder(about: DataSet, data_dir: Path, T: int) -> Path:
    """The folder of frames for T; made first where it is not there yet."""
    if not data_dir.is_dir():
        raise UserError(about.missing(data_dir))
    frames_dir = data_dir / f"frames_number_{T}_split_by_number"
    try:
        with one_process_at_a_time(data_dir):
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
def one_process_at_a_time(data_dir: Path) -> Iterator[None]:
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
        _check_archives(about, data_dir, T)
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
        print(f"making {T} frames per sample in {data_dir}, once ...", flush=True)
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


def _check_archives(about: DataSet, data_dir: Path, T: int) -> None:
    absent = [name for name in about.archives if not (data_dir / "download" / name).is_file()]
    if len(absent) == len(about.archives):
        folders = (path.name.split("_")[2] for path in data_dir.glob("frames_number_*_split_by_number"))
        others = sorted(int(number) for number in folders if number.isdecimal())
        if others:
            raise UserError(
                f"--data-dir {data_dir} has frames for T = {', '.join(map(str, others))} and {T} are asked for; give "
                "one of these as -T, or put events_np/ there, from which the others are made"
            )
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
        # A full disk or a kill leaves the beginning of a file: a zip archive without its end.
        whole = {name for name in _sample_paths(root / frames_name) if zipfile.is_zipfile(root / frames_name / name)}
        lost = _sample_paths(root / "events_np") - whole
        lost = {
            name for name in lost if not _made_again(about, root / "events_np" / name, root / frames_name / name, T)
        }
        _refuse_lost(sorted(lost), f"event files of {root.parent / 'events_np'} that gave no whole frames")
    elif failure is not None:
        raise UserError(
            f"SpikingJelly cannot make frames of {about.title}: {type(failure).__name__}: {failure}; see the data "
            "layout in README.md"
        ) from failure
    # What remains is DatasetFolder's refusal of a class without samples, after everything has been made.


def _made_again(about: DataSet, events: Path, frames: Path, T: int) -> bool:
    """Integrate one sample once more, now alone; whether that worked.

    SpikingJelly works on many at a time, in threads; a whole file was seen to fail there, once, and never again.
    """
    with _torchaudio_or_placeholder():
        module = importlib.import_module("spikingjelly.datasets")
        module = module if hasattr(module, _INTEGRATE) else importlib.import_module("spikingjelly.datasets.utils")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            getattr(module, _INTEGRATE)(np.load, str(events), str(frames.parent), "number", T, *about.sensor)
    except Exception:  # a damaged file, in one of many ways
        return False
    return zipfile.is_zipfile(frames)


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
        wanted = {sample_name(path) for path in recordings.glob("*/*") if path.is_file()}
        return sorted(wanted - {sample_name(path) for path in events.glob("*/*.npz")})
    # One recording of DVS128 Gesture holds many samples, which carry its name and a number.
    lists = [recordings / f"trials_to_{part}.txt" for part in ("train", "test")]
    wanted = {Path(line.strip()).stem for path in lists for line in path.read_text().splitlines() if line.strip()}
    return sorted(wanted - {path.stem.rpartition("_")[0] for path in events.rglob("*.npz")})


def _sample_paths(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.npz")}


def _refuse_lost(lost: Sequence[str], what: str) -> None:
    if lost:
        shown = ", ".join(lost[:10]) + (f" and {len(lost) - 10} more" if len(lost) > 10 else "")
        raise UserError(f"{len(lost)} {what}: {shown}; replace or remove them, or make room")

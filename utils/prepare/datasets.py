"""The data sets that can be prepared: what differs between them on disk."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from utils.data.folders import BadFile

__all__ = ["DATA_SETS", "SPLIT_FOLDERS", "DataSet", "frames_name", "own_recordings", "sample_name"]

SPLIT_FOLDERS = ("train_dataset", "test_dataset")  # of the published splitters


@dataclass(frozen=True)
class DataSet:
    """What differs between the data sets on disk."""

    title: str
    reader: str  # module and class of SpikingJelly
    sensor: tuple[int, int]  # H, W
    timesteps: int  # T of its recipe
    split_seed: int  # of its recipe
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
    parts: tuple[str, ...] = ()  # the folders of training and test, where it has its own split
    is_split_by_folder: bool = False  # frames in SPLIT_FOLDERS, as the published splitters leave them
    is_own: bool = False  # recordings of the user, in folders of classes

    @property
    def has_split(self) -> bool:
        """Whether it has its own training and test samples."""
        return bool(self.parts)

    def missing(self, data_dir: Path) -> str:
        """The sentence for a user who has not got it yet."""
        if self.is_own:
            return (
                f"--data-dir {data_dir} has no recordings; put <class>/<recording> there, or train/ and test/ with them"
            )
        return (
            f"{self.title} is not in --data-dir {data_dir}; download {self._archives_in_words()} from {self.page} into "
            f"{data_dir / 'download'}, or put events_np/ as SpikingJelly makes it there, or try the software without "
            "any data by --demo"
        )

    def lacking_classes(self, folder: Path, samples: Iterable[str], known: Iterable[BadFile] = ()) -> list[BadFile]:
        """The classes that samples ``<class>/<sample>`` lack if they are most of the official ones; else none.

        They are official by their names: other recordings may have fewer classes.

        Args:
            folder: holds them.
            known: what is known to be bad: an empty class is not named twice.
        """
        names = [name.split("/")[-2:] for name in samples]
        classes = {label for label, _ in names}
        most = self.num_classes / 2 < len(classes) < self.num_classes and classes <= set(self.class_names or classes)
        if not most or not all(re.fullmatch(self.sample_names, name) for _, name in names):
            return []
        others = "--sensor-size HxW says that these are other recordings"
        if not self.class_names:
            return [BadFile(folder, f"has {len(classes)} of the {self.num_classes} classes of {self.title}; {others}")]
        lacking = {folder / name for name in self.class_names if name not in classes} - {file.path for file in known}
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
        parts=("train", "test"),
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


def own_recordings(title: str, sensor: tuple[int, int], parts: tuple[str, ...]) -> DataSet:
    """A folder of a user's recordings.

    Args:
        title: its name.
        sensor: (H, W) of the camera.
        parts: the folders of training and test above the classes, where there are such.
    """
    return DataSet(
        title, "", sensor, timesteps=16, split_seed=0, num_classes=0, samples=None, demo_classes=0, recordings="",
        suffix="", archives=(), page="", sample_names="", parts=parts, is_own=True,
    )  # fmt: skip


def sample_name(path: Path) -> str:
    """``<class>/<sample>``, as split files have it."""
    return f"{path.parent.name}/{path.stem}"


def frames_name(T: int) -> str:
    """The name of the folder of frames for T."""
    return f"frames_number_{T}_split_by_number"

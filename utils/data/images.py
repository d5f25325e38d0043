"""ImageNet and other photographs in class folders: reading, the published transforms, Mixup.

    <data-dir>/train/<wnid>/*.JPEG
    <data-dir>/test/<wnid>/*.JPEG      or val/; a test/ without class folders (the unlabelled official one) is ignored

Images travel as bytes; :func:`normalized` turns a batch into what the networks take, on the device.
"""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Subset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from utils.data.folders import BadFile, File, Special, listing, walk
from utils.data.loaders import sample_seed
from utils.data.splits import SplitInfo, held_out
from utils.errors import DataError, UserError

__all__ = [
    "DECODERS",
    "ImageData",
    "ImageSet",
    "Mixup",
    "load_image_data",
    "normalized",
    "readable",
    "to_channels_last",
]

DECODERS = ("pil", "torchcodec")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in the range 0 to 1
_IMAGENET_CLASSES, _IMAGENET_TEST = 1000, 50_000
_MOST_LINES = 100_000  # of a manifest
_HOW_TO_GET = "tools/prepare_imagenet.py makes it from the official archives, and --demo needs none"


class ImageSet(ImageFolder):
    """Photographs in class folders; a sample is ``(image [3, H, W] uint8, label)``.

    Labels are the ranks of the sorted folder names (for ImageNet: of the wnids). Hidden files and folders are left out.
    The transform draws from torch's generator, seeded by (seed, epoch, sample), so that a result does not depend on the
    number of workers or processes.

    Args:
        folder: holds one folder a class.
        transform: PIL image or uint8 tensor to ``[3, H, W]`` uint8.
        decoder: ``"pil"``, or ``"torchcodec"``, which gives tensors: decoding and transforms are faster.
        seed: of the transform.
        leave_out: leave an unreadable image out, and say so, instead of raising.

    Raises:
        UserError: there are no classes, or a class has no images, or torchcodec is wanted and cannot be imported.
        DataError: from a sample that cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        transform: Callable,
        decoder: str = "pil",
        seed: int = 0,
        leave_out: bool = False,
    ):
        self.folder, self.seed, self.leave_out = folder, seed, leave_out
        self.sizes: list[int] = []  # bytes of each image
        self._files = _list_images(folder)
        super().__init__(str(folder), transform, is_valid_file=lambda path: True)
        self.epoch = 0
        self._decode = _torchcodec_decoder() if decoder == "torchcodec" else None
        self.left_out = multiprocessing.Value("q", 0)  # one count for all workers

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Sorted folder names and their labels."""
        classes = sorted({inside.partition("/")[0] for inside, _ in self._files})
        if not classes:
            raise UserError(f"folder {directory} has no class folders; it must hold <class>/<image>")
        return classes, {name: label for label, name in enumerate(classes)}

    def make_dataset(self, directory: str, class_to_idx: dict[str, int], **_: Any) -> list[tuple[str, int]]:
        """Paths and labels of all images, class by class."""
        samples = []
        for inside, files in self._files:
            label = class_to_idx[inside.partition("/")[0]]
            samples += [(file.path, label) for file in files]
            self.sizes += [file.stamp.size for file in files]
        self._files = []
        empty = sorted(set(class_to_idx.values()) - {label for _, label in samples})
        if empty:
            raise UserError(
                f"class folder {self.folder / list(class_to_idx)[empty[0]]} has no images"
                f"{f', and {len(empty) - 1} others' if len(empty) > 1 else ''}; "
                "fill it, or remove it from training and test"
            )
        return samples

    def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
        path, label = self.samples[index]
        try:
            image = self._read(path)
        except Exception as error:  # PIL raises many types on a damaged file
            reason = " ".join(str(error).split()) or type(error).__name__
            if not self.leave_out:
                raise DataError(
                    f"image {path} cannot be read ({reason}); replace it, or leave unreadable training images out "
                    "with --on-bad-image skip"
                ) from error
            with self.left_out.get_lock():
                self.left_out.value += 1
                count = self.left_out.value
            print(f"image {path} cannot be read ({reason}); left out, {count} so far", file=sys.stderr, flush=True)
            return None
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(sample_seed(self.seed, self.epoch, index))
        try:
            return self.transform(image), label
        finally:
            generator.set_state(before)

    def _read(self, path: str) -> Image.Image | Tensor:
        if self._decode is not None:
            try:
                return self._decode(path, mode="RGB")
            except (RuntimeError, ValueError):
                pass  # a format that PIL reads, or a damaged file, of which PIL tells what is wrong
        with Image.open(path) as image:
            return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Eight bits a colour. PIL itself clips what has more.

    16-bit images have values up to 65535, floating-point ones up to 1, 255 or 65535, whichever holds theirs.

    Raises:
        ValueError: it has other values.
    """
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    values = np.asarray(image, np.float64)
    least, most = values.min(), values.max()
    full = next((full for full in ((1, 255, 65535) if image.mode == "F" else (65535,)) if most <= full), None)
    if full is None or not least >= 0:  # NaN, too
        raise ValueError(
            f"values from {least:g} to {most:g}; they must be 0 to 65535, or, not whole, 0 to 1 or 0 to 255"
        )
    return Image.fromarray(np.rint(values * (255 / full)).astype(np.uint8)).convert("RGB")


def _list_images(folder: Path) -> list[tuple[str, list[File]]]:
    """The images in the folders of classes, folder by folder; what is no file is named and left out.

    Raises:
        UserError: something cannot be read, or leads twice to the same images.
    """
    levels, bad = dict[str, list[File]](), []
    for entry in walk(folder, IMG_EXTENSIONS):
        if isinstance(entry, Special):
            print(f"image {entry}; left out", file=sys.stderr, flush=True)
        elif isinstance(entry, BadFile):
            bad.append(entry)
        elif entry[0]:
            levels.setdefault(entry[0], []).extend(entry[1])
        else:
            bad += [BadFile(Path(file.path), "does not lie in the folder of a class") for file in entry[1]]
    if bad:
        raise UserError(f"{len(bad)} bad files in {folder}:{listing(bad)}")
    # The order of torchvision's ImageFolder: it is part of the order of an epoch.
    order = sorted(levels, key=lambda inside: (inside.partition("/")[0], inside))
    return [(inside, sorted(levels[inside])) for inside in order]


def _torchcodec_decoder() -> Callable:
    try:
        from torchcodec.decoders import decode_image  # an option, and not installed by default
    except (ImportError, RuntimeError, OSError) as error:  # its library may be built for another torch
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--decoder torchcodec cannot be used ({reason}); install torchcodec, or use --decoder pil"
        ) from error
    return decode_image


@dataclass(frozen=True)
class ImageData:
    """Photographs ready for training: what is in them, and where they come from."""

    train: ImageSet | Subset | None
    val: Subset | None  # training images that are held out, not augmented
    test: ImageSet
    title: str
    official: bool  # ImageNet-1K, all of its test images
    frame_size: tuple[int, int]  # of the test crop

    @property
    def classes(self) -> list[str]:
        """Folder names in the order of the labels."""
        return self.test.classes

    @cached_property
    def manifest(self) -> str:
        """Lines ``part,class/image,bytes``; of very many images ``part,class,checksum`` of those of each class."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        lines = [f"{part},{name},{size}" for part, images in parts.items() for name, _, size in _listed(images)]
        if len(lines) <= _MOST_LINES:
            return "".join(f"{line}\n" for line in lines)
        classes = groupby(lines, lambda line: line.partition("/")[0])
        return "".join(f"{name},{_digest(of_class)[:16]}\n" for name, of_class in classes)

    @cached_property
    def info(self) -> SplitInfo:
        """The split in values: its fingerprint is of the names and classes, its contents also of the sizes."""
        parts = [_listed(images) for images in (self.train, self.val, self.test)]
        names = []
        for part in [parts[0], *filter(None, parts[1:])]:
            names += [f"{self.classes[label]}/{os.path.basename(name)}" for name, label, _ in part]
            names.append("")
        fingerprint, contents = _digest(names)[:8], _digest([self.manifest])[:16]
        train, val, test = map(len, parts)
        return SplitInfo("folders", None, None, fingerprint, contents, train, val, test, len(self.classes), 0,
                         self.official, demo=False)  # fmt: skip


def _listed(images: ImageSet | Subset | None) -> list[tuple[str, int, int]]:
    """Name inside its folder, label and bytes of every image."""
    if images is None:
        return []
    whole, chosen = (images.dataset, images.indices) if isinstance(images, Subset) else (images, range(len(images)))
    assert isinstance(whole, ImageSet)
    rows = zip(whole.samples, whole.sizes, strict=True)
    names = [(path.removeprefix(str(whole.folder)).strip(os.sep), label, size) for (path, label), size in rows]
    return [names[index] for index in chosen]


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{line}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def load_image_data(
    data_dir: Path,
    image_size: int = 224,
    test_crop: int | None = None,
    *,
    decoder: str = "pil",
    seed: int = 0,
    leave_out: bool = False,
    for_training: bool = True,
    val: float = 0.0,
) -> ImageData:
    """Find the class folders of training and test and check that they belong together.

    Args:
        data_dir: see the top of this file.
        image_size: side of the training crop, in pixels.
        test_crop: side of the central test crop, of an image whose shorter side is 256 / 224 of it; None: image_size.
        decoder, seed: see :class:`ImageSet`.
        leave_out: leave unreadable training images out. In the test set they are always an error.
        for_training: False reads the test set alone.
        val: the part of the training images that is held out, see :func:`utils.data.splits.held_out`; they are read as
            test images are.

    Raises:
        UserError: a folder or a class is missing or empty; the message names it.
    """
    test_dir = _test_folder(data_dir)
    test = ImageSet(test_dir, _test_transform(test_crop or image_size), decoder)
    train: ImageSet | Subset | None = None
    held: Subset | None = None
    if for_training:
        train_dir = data_dir / "train"
        if not train_dir.is_dir():
            raise UserError(f"--data-dir {data_dir} has no folder train/ with one folder a class; {_HOW_TO_GET}")
        train = ImageSet(train_dir, _train_transform(image_size), decoder, seed, leave_out)
        for one, other in ((train, test), (test, train)):
            unpaired = sorted(set(one.classes) - set(other.classes))
            if unpaired:
                others, verb = (f" and {len(unpaired) - 1} others", "are") if len(unpaired) > 1 else ("", "is")
                raise UserError(
                    f"class {unpaired[0]}{others} of {one.folder} {verb} not in {other.folder}; the labels are the "
                    "ranks of the sorted names, so both folders need the same classes"
                )
        if val:
            train, held = _divided(train, test.transform, val)
    official = len(test.classes) == _IMAGENET_CLASSES and len(test) == _IMAGENET_TEST
    crop = test_crop or image_size
    title = "ImageNet-1K" if official else f"{data_dir.resolve().name} (not all of ImageNet-1K)"
    return ImageData(train, held, test, title, official, (crop, crop))


def _divided(images: ImageSet, test_transform: Callable | None, fraction: float) -> tuple[Subset, Subset]:
    """Training images without those that are held out, and these under the transform of the test."""
    names = [name.replace(os.sep, "/") for name, _, _ in _listed(images)]
    held = held_out(names, fraction)
    if not held:
        raise UserError(f"--val {fraction:g} holds out none of {len(names)} training images; give a larger fraction")
    plain = copy.copy(images)  # shares the list of files and the count of what was left out
    plain.transform = test_transform
    indices: dict[bool, list[int]] = {False: [], True: []}
    for index, name in enumerate(names):
        indices[name in held].append(index)
    return Subset(images, indices[False]), Subset(plain, indices[True])


def _test_folder(data_dir: Path) -> Path:
    if not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} does not exist; {_HOW_TO_GET}")
    found = [data_dir / name for name in ("test", "val") if _class_folders(data_dir / name)]
    if len(found) > 1:
        raise UserError(
            f"--data-dir {data_dir} has class folders in both test/ and val/; rename the one not to be used"
        )
    if not found:
        raise UserError(f"--data-dir {data_dir} has no folder test/ or val/ with one folder a class; {_HOW_TO_GET}")
    return found[0]


def _class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _train_transform(size: int) -> Callable:
    """The published augmentation. The same draws for PIL images and tensors."""
    crop = v2.RandomResizedCrop(size, antialias=True)
    return v2.Compose([crop, v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET), v2.PILToTensor()])


def _test_transform(size: int) -> Callable:
    shorter = round(size * 256 / 224)
    return v2.Compose([v2.Resize(shorter, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])


def readable(samples: list[tuple[Tensor, int] | None]) -> tuple[Tensor, Tensor]:
    """Collate a batch without the images that were left out.

    Raises:
        DataError: not one image of the batch could be read.
    """
    kept = [sample for sample in samples if sample is not None]
    if not kept:
        raise DataError(f"not one of the {len(samples)} images of a batch could be read; check the data set")
    images, labels = default_collate(kept)
    return images, labels


def to_channels_last(net: nn.Module) -> None:
    """Lay out the convolutions of ``net`` as ``[out, H, W, in]`` in memory; the numbers stay the same."""
    for parameter in net.parameters():
        if parameter.ndim == 4:  # torch's own .to(memory_format=) stops at SMA's 5-D time projections
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def normalized(channels_last: bool = False) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Make the function from a batch of bytes ``[B, 3, H, W]`` and labels to normalised float images and labels."""
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def prepare(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (_MEAN, _STD))
        return ((images.float() / 255 - mean) / std).contiguous(memory_format=layout), labels

    return prepare


class Mixup:
    """Mixup and CutMix of the published script (switched off there), by timm, on normalised images.

    Alpha 0.8 and 1.0, one of the two in every batch with equal chance. The draws are keyed by (seed, epoch, process,
    batch), so that a continued run repeats them.

    Args:
        prepare: from a batch to normalised images.
        num_classes: K of the targets ``[B, K]``.
        seed, rank: of the draws.
    """

    def __init__(
        self, prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], num_classes: int, seed: int, rank: int
    ):
        from timm.data import Mixup as TimmMixup  # takes seconds to import: only where it is wanted

        self.prepare, self.key = prepare, (seed, rank)
        self.mixup = TimmMixup(0.8, 1.0, prob=1.0, switch_prob=0.5, label_smoothing=0.0, num_classes=num_classes)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, batch: int = 0) -> None:
        """Start the draws of an epoch, or go on with those of its batch number ``batch``."""
        self.epoch, self.batch = epoch, batch

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = self.prepare(images, labels)
        np.random.seed(sample_seed(*self.key, self.epoch, self.batch) % 2**32)  # timm draws from numpy's generator
        self.batch += 1
        # timm takes even batches only; the odd image (others may have been left out) goes unmixed.
        even = len(images) - len(images) % 2
        unmixed = images[even:], nn.functional.one_hot(labels[even:], self.mixup.num_classes).to(images)
        if even == 0:
            return unmixed
        mixed = self.mixup(images[:even], labels[:even])
        return torch.cat([mixed[0], unmixed[0]]), torch.cat([mixed[1], unmixed[1].to(mixed[1])])

"""Unpack the official archives of ImageNet-1K (ILSVRC2012) into DATA_DIR/{train,val}/<wnid>/*.JPEG.

A class of the training images, and the validation images as one, are written into a hidden folder beside their final
place and then renamed, so a kill leaves nothing half under a final name and the same command again goes on where it
stopped. ``DATA_DIR/.image_counts`` holds what has been put in place, a line ``folder bytes-of-its-tar images`` each:
with it a second run need not read the 1.3 million headers inside the training archive.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import os
import re
import shutil
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from errno import EEXIST
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file: the modules of the repository are one folder up
    sys.path.insert(0, str(ROOT))

from utils.errors import EXIT_INTERRUPTED, SentenceParser, UserError, exit_with_sentence  # noqa: E402
from utils.files import read_text, write_text  # noqa: E402
from utils.prepare.lock import one_process_at_a_time  # noqa: E402

PAGE = "https://image-net.org/download-images"
ARCHIVES = {
    "train_tar": "ILSVRC2012_img_train.tar",
    "val_tar": "ILSVRC2012_img_val.tar",
    "devkit": "ILSVRC2012_devkit_t12.tar.gz",
}
CLASSES = 1000
IMAGES = {"train": 1_281_167, "val": 50_000}
VAL_IMAGES_A_CLASS = 50

WNID = re.compile("n[0-9]{8}")
CLASS_TAR = re.compile(r"n[0-9]{8}\.tar")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_[0-9]{8}\.JPEG")
VAL_NAME = "ILSVRC2012_val_{:08}.JPEG"
LABEL_LINE = re.compile(r"(ILSVRC2012_val_[0-9]{8})(?:\.JPEG)?[\s,]+(n[0-9]{8})(?:[\s,].*)?")
RECORD_LINE = re.compile("(train/n[0-9]{8}|val) ([0-9]+) ([0-9]+)")

_CHUNK = 1 << 20
# What a damaged archive makes tarfile and gzip raise (the last three by absurd sizes); KeyError: a file it lacks.
_DAMAGE = (
    *(tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, KeyError),
    *(OverflowError, MemoryError, RecursionError),
)


class Labels(NamedTuple):
    """The class of each validation image."""

    source: Path
    wnids: dict[str, str]  # by the name of the image

    def path(self, image: str) -> str:
        """``wnid/image``; raises UserError where the image has no label."""
        if image not in self.wnids:
            raise UserError(f"{self.source} has no label for {image}; give the labels of all validation images")
        return f"{self.wnids[image]}/{image}"


def read_devkit(devkit: Path) -> Labels:
    """Labels from the development kit; raises UserError where it is damaged."""
    from scipy.io import loadmat  # half a second, and needed only here

    files = {}
    with _named_damage(f"--devkit {devkit}"), _open_tar(devkit, "r:gz") as tar:
        for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"):
            member = tar.getmember(f"ILSVRC2012_devkit_t12/data/{name}")
            files[name] = tar.extractfile(member).read() if member.isreg() else b""
        while tar.fileobj.read(_CHUNK):  # gzip compares its checksum at the end; loadmat can crash on damaged bytes
            pass
    meta, truth = files.values()
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        leaves = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if s["num_children"] == 0}
        if not all(map(WNID.fullmatch, leaves.values())):  # they become names of folders
            raise ValueError("a WNID that is not n and 8 digits")
        wnids = {VAL_NAME.format(number): leaves[int(line)] for number, line in enumerate(truth.split(), start=1)}
    except Exception as error:  # loadmat raises almost anything on a damaged file
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"--devkit {devkit} has no proper meta.mat and ground truth ({reason}); download it again from {PAGE}"
        ) from error
    return Labels(devkit, wnids)


def read_labels(path: Path) -> Labels:
    """Labels from a text file: lines ``image wnid ...`` (spaces, tab or comma), or a wnid a line in image order.

    A first line without digits is a header. Raises UserError for any other form.
    """
    forms = "give lines 'ILSVRC2012_val_00000001.JPEG n01751748', or one wnid a line in the order of the images"
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"--val-labels {path} is no text file ({error}); {forms}") from error
    header = bool(lines) and not re.search("[0-9]", lines[0])
    ordered = len(lines) > header and WNID.fullmatch(lines[header]) is not None
    wnids: dict[str, str] = {}
    for number, line in enumerate(lines[header:], start=1):
        match = (WNID if ordered else LABEL_LINE).fullmatch(line)
        if match is None:
            raise UserError(f"--val-labels {path} has {line[:80]!r} as line {number + header}; {forms}")
        image, wnid = (VAL_NAME.format(number), line) if ordered else (f"{match[1]}.JPEG", match[2])
        if wnids.setdefault(image, wnid) != wnid:
            raise UserError(f"--val-labels {path} has {wnids[image]} and {wnid} for {image}; give one wnid an image")
    return Labels(path, wnids)


@contextlib.contextmanager
def _named_damage(what: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{what} is damaged or cut off ({reason}); download it again from {PAGE}") from error


@contextlib.contextmanager
def _open_tar(path: Path, mode: str = "r:") -> Iterator[tarfile.TarFile]:
    with path.open("rb") as file:
        start = file.read(tarfile.BLOCKSIZE).lstrip()
        file.seek(0)
        if start[:1] == b"<":  # what a browser or wget saves without a login
            raise UserError(f"{path} is an HTML page and no archive; log in at {PAGE} and download it again")
        with tarfile.open(fileobj=file, mode=mode) as tar:
            yield tar


def _members(tar: tarfile.TarFile, pattern: re.Pattern[str], what: str) -> Iterator[tarfile.TarInfo]:
    """The members in their order. Each must be a plain file of a new name that matches ``pattern``, as it names a path.

    Raises UserError, and tarfile.TarError where the archive has no proper end.
    """
    names, end = set(), 0
    for member in tar:
        plain = member.isreg() and not member.issparse() and member.size >= 0
        if not plain or not pattern.fullmatch(member.name) or member.name in names:
            raise UserError(
                f"{what} has the member {member.name!r}, which is not one plain file of the form {pattern.pattern}; "
                f"use the official archive from {PAGE}"
            )
        names.add(member.name)
        end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        yield member
    # tarfile takes a damaged header, or nothing at all, for the end; the real end is a block of zeros.
    tar.fileobj.seek(end)
    if not names or tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it ends after {len(names)} members without the mark of an end")


def _images(folder: Path) -> list[str]:
    return [entry.name for entry in os.scandir(folder) if entry.name.endswith(".JPEG")] if folder.is_dir() else []


def _classes(part: Path) -> dict[str, list[str]]:
    """The images of each class folder; no hidden folders."""
    folders = sorted(part.iterdir()) if part.is_dir() else []
    return {folder.name: _images(folder) for folder in folders if folder.is_dir() and folder.name[0] != "."}


def _bar(archive: Path, what: str) -> tqdm:
    size = archive.stat().st_size
    return tqdm(total=size, desc=what, unit="B", unit_scale=True, dynamic_ncols=True, disable=None)  # in a terminal


class Record:
    """``.image_counts``: for each folder in place the bytes of its tar and the number of its images.

    It saves time only: a folder that it lacks is compared with the archive.
    """

    def __init__(self, data_dir: Path) -> None:
        self.path = data_dir / ".image_counts"
        matches = map(RECORD_LINE.fullmatch, (read_text(self.path) or "").splitlines())
        self.known = {m[1]: (int(m[2]), int(m[3])) for m in matches if m}

    def add(self, folder: str, tar_bytes: int, images: int) -> None:
        self.known[folder] = tar_bytes, images
        lines = (f"{name} {size} {count}\n" for name, (size, count) in self.known.items())
        with contextlib.suppress(OSError):
            write_text(self.path, "".join(lines))


def check_room(data_dir: Path, archives: dict[str, Path]) -> None:
    """Say how much the archives unpack to; raise UserError where the disk has no room for it.

    Args:
        archives: part to its archive. What is in place already is not counted.
    """
    known, needed = Record(data_dir).known, 0
    for part, archive in archives.items():
        there = [f"train/{wnid}" for wnid in _classes(data_dir / "train")] if part == "train" else [part]
        if part == "val" and not (data_dir / part).is_dir():
            there = []
        if all(folder in known for folder in there):  # others are compared with the archive first
            needed += archive.stat().st_size - sum(known[folder][0] for folder in there)
    free = shutil.disk_usage(data_dir).free
    print(f"{needed / 1e9:.3g} GB to unpack, {free / 1e9:.3g} GB are free in {data_dir}", flush=True)
    if needed > free:
        raise UserError(
            f"--data-dir {data_dir} has room for {free / 1e9:.3g} GB and the archives unpack to {needed / 1e9:.3g} GB; "
            "make room, or give a folder on another disk"
        )


def _put(
    tar: tarfile.TarFile,
    images: Iterable[tarfile.TarInfo],
    place: Callable[[str], str],
    final: Path,
    there: list[str],
    what: str,
    bar: tqdm,
) -> dict[str, int]:
    """Write the images into the folder ``final``, all or none; gives the bytes of each path below it.

    Where the folder has files already, it is only compared: UserError unless it holds these paths and sizes.
    """
    if final.is_dir() and any(final.iterdir()):
        sizes = {place(image.name): image.size for image in images}
        found = {name: (final / name).stat().st_size for name in there}
        different = sorted(name for name, _ in found.items() ^ sizes.items())
        if different:
            raise UserError(
                f"{final} was there before and holds {len(found)} images, {what} {len(sizes)}, and {different[0]} is "
                f"not the same in both (place or size); move {final} away and run this again"
            )
        return sizes
    sizes, partial = {}, final.with_name(f".{final.name}.partial")
    try:
        for image in images:
            path = partial / place(image.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                shutil.copyfileobj(tar.extractfile(image), file, _CHUNK)
            sizes[place(image.name)] = image.size
            bar.update(image.size)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sizes


def prepare_train(data_dir: Path, archive: Path) -> int:
    """Put every class that is not there yet into ``data_dir/train``; gives the bytes written.

    Raises UserError where the archive is damaged, or a class folder that is there differs from it.
    """
    record, source, written = Record(data_dir), f"--train-tar {archive}", 0
    with _named_damage(source), _open_tar(archive) as tar, _bar(archive, "train") as bar:
        for outer in _members(tar, CLASS_TAR, source):
            wnid, what = outer.name.removesuffix(".tar"), f"{outer.name} in {source}"
            folder = data_dir / "train" / wnid
            names = _images(folder)
            if record.known.get(f"train/{wnid}") != (outer.size, len(names)):
                with _named_damage(what), tarfile.open(fileobj=tar.extractfile(outer), mode="r:") as inner:
                    images = _members(inner, re.compile(rf"{wnid}_[0-9]+\.JPEG"), what)
                    sizes = _put(inner, images, str, folder, names, what, bar)
                record.add(f"train/{wnid}", outer.size, len(sizes))
                written += 0 if names else sum(sizes.values())
            bar.update(outer.offset_data + outer.size - bar.n)  # headers, and classes that were there
    return written


def prepare_val(data_dir: Path, archive: Path, labels: Labels) -> int:
    """Put all validation images, or none, into ``data_dir/val``; gives the bytes written.

    Raises UserError where the archive is damaged, an image has no label, or the folder that is there differs.
    """
    record, source, size = Record(data_dir), f"--val-tar {archive}", archive.stat().st_size
    classes = _classes(data_dir / "val")
    names = [f"{wnid}/{name}" for wnid, images in classes.items() for name in images]
    as_labelled = all(labels.wnids.get(name) == wnid for wnid, images in classes.items() for name in images)
    if as_labelled and record.known.get("val") == (size, len(names)):
        return 0
    with _named_damage(source), _open_tar(archive) as tar, _bar(archive, "val") as bar:
        images = _members(tar, VAL_IMAGE, source)
        sizes = _put(tar, images, labels.path, data_dir / "val", names, source, bar)
        bar.update(size - bar.n)  # headers
    record.add("val", size, len(sizes))
    return 0 if names else sum(sizes.values())


def check_md5(archive: Path, name: str) -> None:
    """Raise UserError unless the file has the published MD5 of the archive ``name``."""
    from torchvision.datasets.imagenet import ARCHIVE_META  # takes seconds, and needed only here

    md5 = hashlib.md5(usedforsecurity=False)
    with archive.open("rb") as file, _bar(archive, f"MD5 {name}") as bar:
        while chunk := file.read(_CHUNK):
            md5.update(chunk)
            bar.update(len(chunk))
    published = dict(ARCHIVE_META.values())[name]
    if md5.hexdigest() != published:
        raise UserError(
            f"{archive} has the MD5 {md5.hexdigest()} and {published} is published; download it again from {PAGE}, or "
            "leave --md5 out for a subset"
        )


def check_counts(data_dir: Path, any_count: bool) -> dict[str, dict[str, int]]:
    """Images of each class of each part that is there.

    Raises UserError for other numbers than the official ones, unless ``any_count``, and where ``train`` and ``val``
    have different classes.
    """
    parts = {part: {wnid: len(names) for wnid, names in _classes(data_dir / part).items()} for part in IMAGES}
    parts = {part: counts for part, counts in parts.items() if counts}
    subset = "unpack the complete official archive, or give --any-count for a subset"
    for part, counts in parts.items() if not any_count else ():
        images = sum(counts.values())
        if (len(counts), images) != (CLASSES, IMAGES[part]):
            raise UserError(
                f"{data_dir / part} holds {len(counts)} classes ({len(counts) - CLASSES:+}) and {images} images "
                f"({images - IMAGES[part]:+}), and ImageNet-1K has {CLASSES} and {IMAGES[part]}; {subset}"
            )
        uneven = [wnid for wnid, count in counts.items() if part == "val" and count != VAL_IMAGES_A_CLASS]
        if uneven:
            raise UserError(
                f"{data_dir / part / uneven[0]} holds {counts[uneven[0]]} images and each of the {CLASSES} validation "
                f"classes has {VAL_IMAGES_A_CLASS}; move {data_dir / part} away and run this with the right labels"
            )
    if len(parts) == 2 and parts["train"].keys() != parts["val"].keys():
        train, val = (sorted(parts[a].keys() - parts[b].keys()) for a, b in (("train", "val"), ("val", "train")))
        raise UserError(
            f"--data-dir {data_dir} has different classes in train and val: {len(train)} only in train "
            f"({', '.join(train[:3])}), {len(val)} only in val ({', '.join(val[:3])}); unpack archives that match"
        )
    return parts


def _find(args: argparse.Namespace, flag: str) -> Path | None:
    """The archive of ``flag``: the file given, or one under its official name."""
    given, name = getattr(args, flag), ARCHIVES.get(flag)
    option = "--" + flag.replace("_", "-")
    if given is not None and not given.is_file():
        raise UserError(f"{option} {given} is no file; give the path of {name or 'the labels'}")
    places = [args.data_dir / name, args.data_dir / "download" / name] if name else []
    return given or next((place for place in places if place.is_file()), None)


def prepare(args: argparse.Namespace) -> None:
    """Everything the command line asks for; one process at a time.

    Raises UserError, or OSError where the data folder cannot be written.
    """
    data_dir: Path = args.data_dir
    train_tar, val_tar, val_labels = (_find(args, flag) for flag in ("train_tar", "val_tar", "val_labels"))
    devkit = None if val_labels else _find(args, "devkit")
    missing = {"train": [] if train_tar else [ARCHIVES["train_tar"]], "val": [] if val_tar else [ARCHIVES["val_tar"]]}
    if not (devkit or val_labels):
        missing["val"].append(f"{ARCHIVES['devkit']} (or --val-labels)")
    if all(missing.values()) and not any(_classes(data_dir / part) for part in IMAGES):
        raise UserError(
            f"--data-dir {data_dir} has no images and not all archives for a part of them; put "
            f"{', '.join(missing['train'] + missing['val'])} there or into {data_dir / 'download'} (from {PAGE})"
        )
    used = {} if missing["train"] else {"train_tar": train_tar}
    if not missing["val"]:
        used |= {"val_tar": val_tar} | ({"devkit": devkit} if devkit else {})
    for flag, path in used.items() if args.md5 else ():
        check_md5(path, ARCHIVES[flag])
    if not missing["val"]:
        labels = read_labels(val_labels) if val_labels else read_devkit(devkit)
        if len(labels.wnids) < IMAGES["val"] and not args.any_count:
            raise UserError(
                f"{labels.source} has {len(labels.wnids)} labels and {IMAGES['val']} are needed; give the labels of "
                "all validation images, or --any-count for a subset"
            )
    check_room(data_dir, {part: path for part, path in (("train", train_tar), ("val", val_tar)) if not missing[part]})
    for leftover in [*data_dir.glob(".val.partial"), *data_dir.glob("train/.n*.partial")]:  # of a killed run
        if leftover.is_symlink() or not leftover.is_dir():
            raise OSError(EEXIST, "is no folder of this program, which needs the name; move it away", str(leftover))
        shutil.rmtree(leftover)
    written, seconds = dict.fromkeys(IMAGES, 0), dict.fromkeys(IMAGES, 0.0)
    for part in ("val", "train"):  # the short one first: its mistakes show early
        if not missing[part]:
            began = time.monotonic()
            print(f"{part}: unpacking what is missing ...", flush=True)
            written[part] = (
                prepare_val(data_dir, val_tar, labels) if part == "val" else prepare_train(data_dir, train_tar)
            )
            seconds[part] = time.monotonic() - began
    parts = check_counts(data_dir, args.any_count)
    if args.delete_archives:
        os.sync()  # the images are on the disk before their only other copy goes
        for path in used.values():
            path.unlink()
            print(f"deleted {path}")
    print(f"{'part':8}{'classes':>10}{'images':>12}{'bytes written':>18}{'seconds':>10}")
    for part, counts in parts.items():
        print(f"{part:8}{len(counts):10}{sum(counts.values()):12}{written[part]:18}{seconds[part]:10.1f}")
    for part in IMAGES.keys() - parts.keys():
        print(
            f"{part} is not there: put {' and '.join(missing[part])} into {data_dir} (from {PAGE}) and run this again"
        )


def make_parser() -> argparse.ArgumentParser:
    """The parser of this tool's command line."""
    parser = SentenceParser(
        description="Unpack the official archives of ImageNet-1K into DIR/{train,val}/<wnid>/*.JPEG.",
        epilog=f"Archives: {', '.join(ARCHIVES.values())}, from {PAGE}; they are looked for in DIR and DIR/download. "
        "After a kill the same command goes on. Example: python tools/prepare_imagenet.py --data-dir data/imagenet",
    )
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR", help="where train/ and val/ are made")
    parser.add_argument("--train-tar", type=Path, metavar="FILE", help="training images, where they lie elsewhere")
    parser.add_argument("--val-tar", type=Path, metavar="FILE", help="validation images, where they lie elsewhere")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--devkit", type=Path, metavar="FILE", help="development kit, where it lies elsewhere")
    labels.add_argument(
        "--val-labels", type=Path, metavar="FILE",
        help="labels instead of the devkit: lines 'ILSVRC2012_val_00000001.JPEG n01751748' (space, tab or comma; "
        "LOC_val_solution.csv of Kaggle will do), or one wnid a line in image order",
    )  # fmt: skip
    parser.add_argument("--md5", action="store_true", help="compare the archives with the published MD5 first")
    parser.add_argument(
        "--delete-archives", action="store_true", help="delete the archives used once all counts are right"
    )
    parser.add_argument("--any-count", action="store_true", help="for subsets: do not demand the official numbers")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = make_parser().parse_args(argv)
    print(f"preparing ImageNet-1K in {args.data_dir}; if another process does so already, this one waits", flush=True)
    try:
        if args.train_tar or args.val_tar:
            args.data_dir.mkdir(parents=True, exist_ok=True)
        with one_process_at_a_time(args.data_dir):
            prepare(args)
    except OSError as error:
        raise UserError(
            f"--data-dir {args.data_dir} cannot be prepared ({error}); give readable archives and a folder that can be "
            "written and has room (155 GB for all images), and run this again: whole classes stay"
        ) from error
    except KeyboardInterrupt:
        print(
            f"\n{os.path.basename(sys.argv[0])}: interrupted; whole classes stay, and the same command goes on",
            file=sys.stderr,
        )
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    exit_with_sentence(main)

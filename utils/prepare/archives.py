"""Archives: found where users put them, compared with their published MD5, read through, unpacked file by file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from utils.errors import UserError
from utils.files import create, is_plain_file, partial_of, read_text, write_text

__all__ = ["archive_fault", "contents_fault", "find_archives", "unpack_all"]

_CHUNK = 1 << 20
_Member = tuple[str, int, Callable[[], IO[bytes]], int]  # name, bytes, opens it, how far in the archive
# What a damaged archive makes zipfile, tarfile and the decompressors raise (RuntimeError: encryption).
_DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError),
    *(LookupError, NotImplementedError, RuntimeError, OverflowError, MemoryError, RecursionError),
)
# Of an OSError: gzip and bz2 give no number, a seek to before the file's beginning gives the other.
_DAMAGE_ERRNO = (None, errno.EINVAL)
_NOT_DATA = ("__MACOSX",)  # and hidden files
# What archives of recordings may unpack to: events are dense, so what grows more is no recording.
_MOST_GROWTH, _MOST_FILES = 20, 1_000_000
_LEAST_LIMIT = 64 << 20  # bytes


class ArchiveError(UserError):
    """An archive that cannot be unpacked. ``what`` is what is wrong, without the path."""

    def __init__(self, archive: Path, what: str):
        super().__init__(f"archive {archive} {what}")
        self.what = what


def find_archives(data_dir: Path, names: Sequence[str]) -> dict[str, Path]:
    """The archives that lie in ``download/`` below the folder of the data set, in it, or beside it."""
    places = (data_dir / "download", data_dir, data_dir.parent)
    found = {name: next((p / name for p in places if (p / name).is_file()), None) for name in names}
    return {name: path for name, path in found.items() if path is not None}


def archive_fault(path: Path, published: str, any_archive: bool, record: Path | None) -> str:
    """Compare an archive with its published MD5; what is wrong with it, empty where nothing is.

    With ``any_archive`` its contents are not read: unpacking does, and :func:`contents_fault`.

    Args:
        any_archive: accept another checksum, but still no web page.
        record: remembers archives by size and time of change, and they are not read again.
    """
    with path.open("rb") as file:
        page = file.read(512).lstrip()[:1] == b"<"
    if any_archive and not page:
        return ""
    status = path.stat()
    line = f"{published} {status.st_size} {status.st_mtime_ns} {path.name}"
    known = (read_text(record) or "").splitlines() if record is not None else []
    if line in known:
        return ""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file, _bar(status.st_size, f"MD5 {path.name}") as bar:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != published:
        kind = " (it is a web page: open the link in a browser and download the file itself)" if page else ""
        return f"has the MD5 {digest.hexdigest()} and {published} is published{kind}"
    if record is not None:
        write_text(record, "".join(f"{line}\n" for line in [*known, line]))
    return ""


def unpack_all(archives: Sequence[Path], folder: Path) -> None:
    """Unpack archives ``.zip`` or ``.tar.gz``; files that are there whole already are left as they are.

    A file gets its name when it is whole. Links, devices and paths that lead out of the folder are refused, and so is
    what is too much: 20 times the bytes of the archives (at least 64 MiB), a million files, or more than fits the disk.

    Raises:
        UserError: it is too much.
        ArchiveError: an archive is damaged, or has a member that may not be unpacked.
        OSError: no room, or the folder cannot be written to.
    """
    packed, free = sum(path.stat().st_size for path in archives), shutil.disk_usage(folder).free
    free += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())  # of a run that was killed
    room = _Room(folder, min(max(_MOST_GROWTH * packed, _LEAST_LIMIT), free), _MOST_FILES)
    print(f"unpacking {_giga(packed)} of archives into {folder}: at most {_giga(room.bytes)}, {_giga(free)} are free")
    announced = 0
    for path in archives:
        if path.suffix == ".zip":  # a compressed tar does not say how much it holds before its end
            announced += _announced(path)
            room.check(path, announced)
    for path in archives:
        print(f"unpacking {path} ...", flush=True)
        _unpack(path, folder, room)


@dataclass
class _Room:
    """How much may still be unpacked."""

    folder: Path
    bytes: int
    files: int

    def check(self, archive: Path, size: int) -> None:
        """Raise UserError where there is no room for so much."""
        if size > self.bytes or not self.files:
            raise UserError(
                f"archive {archive} unpacks to more than {_giga(self.bytes)} or {_MOST_FILES} files: more than "
                f"recordings hold, or than is free in {self.folder}; make room, or use the official archive"
            )


def _giga(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def _announced(archive: Path) -> int:
    """The bytes that a zip says it unpacks to; it never gives more."""
    with _named_damage(archive), zipfile.ZipFile(archive) as file:
        return sum(member.file_size for member in file.infolist())


def _unpack(archive: Path, folder: Path, room: _Room) -> None:
    with _named_damage(archive), _bar(archive.stat().st_size, f"unpacking {archive.name}") as bar:
        for name, size, source, position in _members(archive):
            target = _safe_path(archive, folder, name)
            bar.update(position - bar.n)
            room.check(archive, size)
            room.bytes, room.files = room.bytes - size, room.files - 1
            if target is None or (is_plain_file(target) and target.stat().st_size == size):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            growing = partial_of(target)
            with source() as member, create(growing) as file:
                shutil.copyfileobj(member, file, _CHUNK)
            if growing.stat().st_size != size:
                raise EOFError(f"{name} is shorter than the archive says")
            growing.rename(target)


def contents_fault(archive: Path) -> str:
    """Read every file in an archive; why it cannot be unpacked, empty where it can.

    Raises:
        OSError: the archive cannot be read.
    """
    try:
        with _named_damage(archive), _bar(archive.stat().st_size, f"reading {archive.name}") as bar:
            for name, size, source, position in _members(archive):
                _safe_path(archive, Path(), name)
                bar.update(position - bar.n)
                there = 0
                with source() as member:
                    while chunk := member.read(_CHUNK):
                        there += len(chunk)
                if there != size:
                    raise EOFError(f"{name} is shorter than the archive says")
    except ArchiveError as error:
        return error.what
    return ""


@contextlib.contextmanager
def _named_damage(archive: Path) -> Iterator[None]:
    try:
        yield
    except (*_DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _DAMAGE_ERRNO:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ArchiveError(archive, f"is damaged or cut off ({reason}); download it again") from error


def _safe_path(archive: Path, folder: Path, name: str) -> Path | None:
    """Where a member goes; None for what an operating system adds."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise ArchiveError(
            archive,
            f"has the member {name!r}, which leads out of its folder; nothing like that is unpacked: use the official "
            "archive",
        )
    if path.parts[0] in _NOT_DATA or any(part.startswith(".") for part in path.parts):
        return None
    return folder / path


def _refuse_special(archive: Path, name: str) -> None:
    raise ArchiveError(
        archive, f"has the member {name!r}, which is a link or a device and no plain file; use the official archive"
    )


def _members(archive: Path) -> Iterator[_Member]:
    return (_zip_members if archive.suffix == ".zip" else _tar_members)(archive)


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                _refuse_special(archive, member.filename)
            if not member.is_dir():
                yield member.filename, member.file_size, partial(file.open, member), member.header_offset


def _tar_members(archive: Path) -> Iterator[_Member]:
    with archive.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:gz") as file:
        for member in file:
            if not (member.isreg() or member.isdir()):
                _refuse_special(archive, member.name)
            if member.isreg():
                yield member.name, member.size, partial(_contents, file, member), raw.tell()
        while file.fileobj.read(_CHUNK):  # gzip compares its checksum at the end
            pass


def _contents(file: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    contents = file.extractfile(member)
    assert contents is not None  # it is a plain file
    return contents


def _bar(size: int, what: str) -> tqdm:
    return tqdm(total=size, desc=what, unit="B", unit_scale=True, dynamic_ncols=True, disable=None)

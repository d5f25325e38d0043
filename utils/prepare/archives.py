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
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from utils.errors import UserError
from utils.files import partial_of, write_text

__all__ = ["archive_fault", "contents_fault", "find_archives", "unpack"]

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
    known = record.read_text(encoding="utf-8").splitlines() if record is not None and record.is_file() else []
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


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a ``.zip`` or ``.tar.gz``; files that are there whole already are left as they are.

    A file gets its name when it is whole. Links, devices and paths that lead out of the folder are refused.

    Raises:
        ArchiveError: the archive is damaged, or has a member that may not be unpacked.
        OSError: no room, or the folder cannot be written to.
    """
    with _damage_told(archive), _bar(archive.stat().st_size, f"unpacking {archive.name}") as bar:
        for name, size, source, position in _members(archive):
            target = _safe_path(archive, folder, name)
            bar.update(position - bar.n)
            if target is None or (target.is_file() and target.stat().st_size == size):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = partial_of(target)
            with source() as member, beside.open("wb") as file:
                shutil.copyfileobj(member, file, _CHUNK)
            if beside.stat().st_size != size:
                raise EOFError(f"{name} is shorter than the archive says")
            beside.rename(target)


def contents_fault(archive: Path) -> str:
    """Read every file in an archive; why it cannot be unpacked, empty where it can.

    Raises:
        OSError: the archive cannot be read.
    """
    try:
        with _damage_told(archive), _bar(archive.stat().st_size, f"reading {archive.name}") as bar:
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
def _damage_told(archive: Path) -> Iterator[None]:
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
                yield member.filename, member.file_size, lambda m=member: file.open(m), member.header_offset


def _tar_members(archive: Path) -> Iterator[_Member]:
    with archive.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:gz") as file:
        for member in file:
            if not (member.isreg() or member.isdir()):
                _refuse_special(archive, member.name)
            if member.isreg():
                yield member.name, member.size, lambda m=member: file.extractfile(m), raw.tell()
        while file.fileobj.read(_CHUNK):  # gzip compares its checksum at the end
            pass


def _bar(size: int, what: str) -> tqdm:
    return tqdm(total=size, desc=what, unit="B", unit_scale=True, dynamic_ncols=True, disable=None)

"""Files written whole: text, and tensors and plain values with a checksum, read without running any code of theirs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils.errors import UserError

__all__ = [
    "DamagedFileError",
    "create",
    "is_plain_file",
    "partial_of",
    "read_checked",
    "read_text",
    "write_checked",
    "write_text",
    "writing",
]

_CHUNK = 1 << 20
# torch saves a zip archive. Its comment, the very end of the file, holds the checksum of everything before it: the file
# stays one that torch.load and any zip program open. A zip ends with a record of 22 bytes whose last two are the
# length of the comment.
_MARK = b"sha256:"
_COMMENT = len(_MARK) + 2 * hashlib.sha256().digest_size
_NO_COMMENT = struct.pack("<H", 0)


class DamagedFileError(UserError):
    """A file that is not what was once written, or cannot be read."""


def write_checked(content: Mapping[str, Any], path: Path) -> None:
    """Write beside, flush to the disk, rename: a kill at any moment leaves the old file or the new one.

    Raises:
        UserError: the disk is full or the folder cannot be written to; the old file is untouched.
    """
    beside = partial_of(path)
    try:
        with beside.open("w+b") as file:
            torch.save(content, file)
            length = file.tell() - len(_NO_COMMENT)
            comment = _MARK + _checksum(file, length).encode()
            file.seek(length)
            file.write(struct.pack("<H", len(comment)) + comment)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise UserError(
            f"checkpoint {path} cannot be written: {error.strerror or error}; the previous one is whole"
        ) from error


def partial_of(path: Path) -> Path:
    """Where a file is written before it gets its name; what a killed process leaves."""
    return path.with_name(f".{path.name}.partial")


def is_plain_file(path: Path) -> bool:
    """Whether there is a file of this very name: no link to one, no named pipe, no device."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def create(path: Path) -> BinaryIO:
    """Open a new file for writing, under a name that only this program uses.

    What a killed process left under it is removed. Nothing that is there is ever opened: a link, a named pipe or a
    device is an error.

    Raises:
        OSError: something else than a file has the name, or the file cannot be made.
    """
    if is_plain_file(path):
        path.unlink()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    except FileExistsError as error:
        raise OSError(
            error.errno, "is no file of this program, which needs the name; move it away", str(path)
        ) from error
    return os.fdopen(descriptor, "wb")


def read_text(path: Path) -> str | None:
    """The text of a file that this program wrote; None where there is no such file, or one that cannot be read."""
    with contextlib.suppress(OSError):
        return path.read_text("utf-8", "surrogateescape") if is_plain_file(path) else None
    return None


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
    """Report an OSError of the block in one sentence.

    Args:
        what: the argument and its value, for instance ``--output-dir DIR``.

    Raises:
        UserError: no room, or the place cannot be written to.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{what} cannot be written: {error.strerror or error}; make room or choose another folder"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write beside and rename, unless that is what the file holds already.

    Raises:
        OSError: no room, or the folder cannot be written to.
    """
    if read_text(path) == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = partial_of(path)
    with create(beside) as file:
        file.write(text.encode("utf-8", "surrogateescape"))  # names of files may be any bytes
    os.replace(beside, path)


def read_checked(path: str | Path) -> tuple[Mapping, str]:
    """Read what a file holds: tensors and plain values only; a checksum is verified where there is one.

    Returns:
        The content, and its checksum; that is empty where there is none (all files that this program writes have one).

    Raises:
        DamagedFileError: the file is cut off, changed, empty or unreadable, or no file of torch at all.
        UserError: it is missing, or holds something else than a dictionary of plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"file {path} does not exist; give the path of a .pt or .pth file")
    try:
        with path.open("rb") as file:
            head = file.read(512).lstrip()
            if not head:
                raise DamagedFileError(f"file {path} is empty; download or copy it again")
            if head[:1] == b"<":
                raise DamagedFileError(
                    f"file {path} is a web page, not weights; open the link in a browser and download the file itself"
                )
            checksum = _verify(file, path)
    except OSError as error:
        raise DamagedFileError(f"file {path} cannot be read: {error.strerror or error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types on a damaged file
        if "Unsupported global" in str(error):
            raise UserError(
                f"file {path} holds more than tensors and plain values and is not opened, because such a file can run "
                "code; save its state_dict() alone where it came from"
            ) from error
        raise DamagedFileError(f"file {path} is damaged or is no weights file; download or copy it again") from error
    if not isinstance(content, Mapping):
        raise UserError(f"file {path} holds a {type(content).__name__} and no state dict")
    return content, checksum


def _verify(file: BinaryIO, path: Path) -> str:
    """The checksum that the file has, or nothing; DamagedFileError where it is that of another content."""
    start = struct.pack("<H", _COMMENT) + _MARK
    length = file.seek(0, os.SEEK_END) - len(_NO_COMMENT) - _COMMENT
    file.seek(max(0, length))
    stored = file.read()
    if length < 0 or not stored.startswith(start):
        return ""
    checksum = _checksum(file, length)
    if stored.removeprefix(start) != checksum.encode():
        raise DamagedFileError(f"file {path} is damaged: its checksum is another; download or copy it again")
    return checksum


def _checksum(file: BinaryIO, length: int) -> str:
    """Of the first ``length`` bytes and the length of no comment: of the file as torch saved it."""
    digest = hashlib.sha256()
    file.seek(0)
    while length > 0 and (chunk := file.read(min(_CHUNK, length))):
        digest.update(chunk)
        length -= len(chunk)
    digest.update(_NO_COMMENT)
    return digest.hexdigest()

"""Files: written so that a kill leaves the old one or the new one, and read so that anything in them is a sentence.

Everything that this program writes goes through :func:`replacing` (or :func:`create`, below it): a new file that takes
its name when it is whole. Nothing that is there is opened for writing, so no link is followed and nothing is emptied.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from utils.errors import UserError

__all__ = [
    "DamagedFileError",
    "Fields",
    "check_fields",
    "create",
    "is_plain_file",
    "occupy",
    "partial_of",
    "read_json",
    "read_text",
    "reading",
    "replacing",
    "same_file_as",
    "write_text",
    "writing",
]

_LONGEST_NAME = 255  # bytes, of most file systems
_LARGEST_JSON = 1 << 26  # bytes
_CHUNK = 1 << 20
Fields = Mapping[str, type | tuple[type | None, ...]]

_LOCK, _HOLDS = "run.lock", b"SMA run: "


class DamagedFileError(UserError):
    """A file that is not what was once written, or cannot be read."""


@contextlib.contextmanager
def replacing(path: Path, flush: bool = True) -> Iterator[BinaryIO]:
    """A new file, open for writing and reading, that takes the name ``path`` when the block is through.

    Where the block fails, what stands there stays as it is.

    Args:
        flush: to the disk, before the file gets its name. Not for thousands of files that are easily made again.

    Raises:
        OSError: no room, or the folder cannot be written to.
    """
    partial = partial_of(path)
    try:
        with create(partial) as file:
            yield file
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            if is_plain_file(partial):
                partial.unlink()
        raise


def same_file_as(path: Path, name: Path) -> None:
    """Let the file ``path`` go by ``name`` as well, in one step; a copy where the disk cannot link.

    Raises:
        UserError: the disk is full or the folder cannot be written to.
    """
    partial = partial_of(name)
    try:
        if is_plain_file(partial):
            partial.unlink()
        try:
            os.link(path, partial, follow_symlinks=False)
        except (OSError, NotImplementedError):
            with path.open("rb") as source, replacing(name) as copy:
                shutil.copyfileobj(source, copy, _CHUNK)
        else:
            os.replace(partial, name)
    except OSError as error:
        raise UserError(f"checkpoint {name} cannot be written: {error.strerror or error}; {path} is whole") from error


def partial_of(path: Path) -> Path:
    """Where a file is written before it gets its name; what a killed process leaves."""
    name = f".{path.name}.partial"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}{path.suffix}.partial"
    return path.with_name(name)


def is_plain_file(path: Path) -> bool:
    """Whether there is a file of this very name: no link to one, no named pipe, no device."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def create(path: Path) -> BinaryIO:
    """Open a new file for writing and reading, under a name that only this program uses.

    What a killed process left under it is removed. Nothing that is there is ever opened: a link, a named pipe or a
    device is an error.

    Raises:
        OSError: something else than a file has the name, or the file cannot be made.
    """
    if is_plain_file(path):
        path.unlink()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    except FileExistsError as error:
        raise OSError(
            error.errno, "is no file of this program, which needs the name; move it away", str(path)
        ) from error
    return os.fdopen(descriptor, "w+b")


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
    """Write a text, unless that is what the file holds already.

    Raises:
        OSError: no room, or the folder cannot be written to.
    """
    if read_text(path) == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))  # names of files may be any bytes


@contextlib.contextmanager
def reading(path: Path, wanted: str) -> Iterator[BinaryIO]:
    """Open a file that the user names.

    Args:
        wanted: what to give instead, for the message.

    Raises:
        UserError: it does not exist.
        DamagedFileError: it cannot be read, or is no file (a folder, a named pipe, a device).
    """
    try:
        # Not to wait for the other end of a named pipe.
        with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DamagedFileError(f"{path} is a named pipe or a device and no file; give {wanted}")
            yield file
    except FileNotFoundError as error:
        raise UserError(f"file {path} does not exist; give {wanted}") from error
    except IsADirectoryError as error:
        raise DamagedFileError(f"{path} is a folder and no file; give {wanted}") from error
    except OSError as error:
        raise DamagedFileError(f"file {path} cannot be read: {error.strerror or error}") from error


def read_json(path: Path, fields: Fields, wanted: str) -> dict[str, Any]:
    """The JSON object in a file, of which nothing else is trusted: people edit such files.

    Args:
        fields: as for :func:`check_fields`.
        wanted: what to give instead, for the message.

    Raises:
        UserError: there is no such file, or it holds no JSON object with these fields, or NaN.
    """
    try:
        with reading(path, wanted) as file:
            text = file.read(_LARGEST_JSON + 1)
        if len(text) > _LARGEST_JSON:
            raise ValueError(f"it has more than {_LARGEST_JSON >> 20} MiB")
        content = json.loads(text.decode("utf-8"), parse_constant=_no_number, parse_float=_finite)
        json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogateescape")  # what reads it may write it, too
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise UserError(f"file {path} holds no valid JSON ({reason}); give {wanted}") from error
    if not isinstance(content, dict):
        raise UserError(f"file {path} holds no JSON object; give {wanted}")
    check_fields(content, fields, path, wanted)
    return content


def check_fields(content: Mapping[str, Any], fields: Fields, path: Path, wanted: str) -> None:
    """Check types of an object that was read from JSON.

    Args:
        fields: name to type, or types, of the fields that are used. One that may be missing or null has None among its
            types. A whole number is a float, too; true and false are no numbers.
        path, wanted: for the message, as for :func:`read_json`.

    Raises:
        UserError: a field is missing or of another type.
    """
    for name, types in fields.items():
        allowed = [type(None) if one is None else one for one in (types if isinstance(types, tuple) else (types,))]
        value = content.get(name)
        if not (type(value) in allowed or (type(value) is int and float in allowed)):
            found = f"is {json.dumps(value)[:40]}" if name in content else "is missing"
            kinds = " or ".join(_JSON_NAMES[one] for one in allowed)
            raise UserError(f'"{name}" in {path} {found} and must be {kinds}; give {wanted}')


_JSON_NAMES: dict[type, str] = {
    dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number", bool: "true or false",
    type(None): "null",
}  # fmt: skip


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large")
    return value


@contextlib.contextmanager
def occupy(directory: Path) -> Iterator[None]:
    """Keep an output directory for this process, by a lock in ``run.lock``; the end of the process ends it, too.

    On a network drive this needs one that has locks (NFS with lockd or version 4, not ``nolock`` or ``local_lock``);
    where locks are refused, a line on stderr says so and the block runs without one.

    Raises:
        UserError: another process has it; the message names that process. Or something else is called ``run.lock``.
        OSError: the folder cannot be made or written to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / _LOCK
    foreign = UserError(f"{path} is not the lock of this program; move it away, or choose another --output-dir")
    if sys.platform == "win32":  # no such locks
        yield
        return
    import fcntl

    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        lock = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise foreign from error
        raise
    with lock:
        if not stat.S_ISREG(os.fstat(lock.fileno()).st_mode) or (lock.read(len(_HOLDS)) or _HOLDS) != _HOLDS:
            raise foreign
        # Not flock (nor filelock, which uses it): loader processes inherit it and outlive a killed process by seconds.
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                holder = lock.read(200).decode(errors="replace").strip() or "another process"
                raise UserError(
                    f"--output-dir {directory} is in use by {holder}; wait for it, stop it, or choose another "
                    "--output-dir"
                ) from error
            print(
                f"--output-dir {directory} cannot be locked ({error.strerror}): start no second run there",
                file=sys.stderr,
            )
            yield
            return
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        lock.seek(0)
        lock.truncate()
        lock.write(_HOLDS + f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode())
        try:
            yield
        finally:
            lock.truncate(0)

"""Tensors and plain values with a checksum, read without running any code, and weights that a network can have."""

from __future__ import annotations

import argparse
import hashlib
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import DamagedFileError, reading, replacing

__all__ = ["check_weights", "read_checked", "write_checked"]

_MOST_NESTING = 50
_MOST_VALUES = 10_000_000
_CHUNK = 1 << 20
# torch saves a zip archive. Its comment, the very end of the file, holds the checksum of everything before it: the file
# stays one that torch.load and any zip program open. A zip ends with a record of 22 bytes whose last two are the
# length of the comment.
_MARK = b"sha256:"
_COMMENT = len(_MARK) + 2 * hashlib.sha256().digest_size
_NO_COMMENT = struct.pack("<H", 0)


def write_checked(content: Mapping[str, Any], path: Path) -> None:
    """Write tensors and plain values with a checksum.

    Raises:
        UserError: the disk is full or the folder cannot be written to; the old file is untouched.
    """
    try:
        with replacing(path) as file:
            torch.save(content, file)
            length = file.tell() - len(_NO_COMMENT)
            comment = _MARK + _checksum(file, length).encode()
            file.seek(length)
            file.write(struct.pack("<H", len(comment)) + comment)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch's writer reports an OSError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"checkpoint {path} cannot be written: {reason}; the previous one is whole") from error


def read_checked(path: str | Path) -> tuple[Mapping, str]:
    """Read what a file holds: tensors and plain values only; a checksum is verified where there is one.

    Returns:
        The content, and its checksum; that is empty where there is none (all files that this program writes have one).
        An ``argparse.Namespace``, which many programs save next to the weights, is left out.

    Raises:
        DamagedFileError: the file is cut off, changed, empty or unreadable, or no file of torch at all.
        UserError: it is missing, or holds something else than a dictionary of plain values.
    """
    path = Path(path)
    with reading(path, "the path of a .pt or .pth file") as file:
        head = file.read(512)
        if not head.strip():
            raise DamagedFileError(f"file {path} is empty; download or copy it again")
        if head.lstrip()[:1] == b"<":
            raise DamagedFileError(
                f"file {path} is a web page, not weights; open the link in a browser and download the file itself"
            )
        checksum = _verify(file, path)
        if not checksum and head.startswith(b"PK"):
            _verify_members(file, path)
        file.seek(0)
        try:
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a damaged file
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many types on a damaged file
            if "Unsupported global" in str(error):
                raise UserError(
                    f"file {path} holds more than tensors and plain values and is not opened, because such a file can "
                    "run code; save its state_dict() alone where it came from"
                ) from error
            raise DamagedFileError(
                f"file {path} is damaged or is no weights file; download or copy it again"
            ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"file {path} holds a {type(content).__name__} and no state dict")
    _check_nesting(content, path)
    return {name: value for name, value in content.items() if not isinstance(value, argparse.Namespace)}, checksum


def _verify_members(file: BinaryIO, path: Path) -> None:
    """Check the files in a zip archive against the checksums that every zip has; torch.load does not look at them."""
    damaged = f"file {path} is damaged"
    size = file.seek(0, os.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > size:  # torch does not compress
                raise DamagedFileError(f"{damaged}: it would unpack to more than its size; download or copy it again")
            wrong = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise DamagedFileError(f"{damaged} or is no weights file ({error}); download or copy it again") from error
    if wrong is not None:
        raise DamagedFileError(f"{damaged}: the checksum of {wrong} in it is another; download or copy it again")


def _check_nesting(content: Mapping, path: Path) -> None:
    """Refuse what contains itself, or the same things so often that walking through it would not end."""
    known: dict[int, tuple[int, int]] = {}  # of a container: depth, and values with all repetitions

    def measure(value: Any, above: int) -> tuple[int, int]:
        if not isinstance(value, Mapping | list | tuple | set | frozenset):
            return 0, 1
        if id(value) not in known:
            depth, count = 0, 1
            for child in value.values() if isinstance(value, Mapping) else value:
                below, values = measure(child, above + 1) if above < _MOST_NESTING else (_MOST_NESTING, 0)
                depth, count = max(depth, below + 1), count + values
                if depth > _MOST_NESTING or count > _MOST_VALUES:
                    raise DamagedFileError(
                        f"file {path} is damaged or is no weights file: it contains itself, or is nested too deep; "
                        "download or copy it again"
                    )
            known[id(value)] = depth, count
        return known[id(value)]

    measure(content, 0)


def check_weights(weights: Mapping[Any, Any], path: str | Path) -> None:
    """Check that the values of a state dict are such that a network can have them.

    Raises:
        UserError: a name is no text, or a value is no dense tensor of finite real numbers; the message names it.
    """
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"weights file {path} has an entry {name!r} that is no named tensor")
        if value.layout is not torch.strided or value.is_meta or value.dtype not in _DTYPES:
            raise UserError(f"weights file {path}: {name} is a tensor of {_kind(value)}; save it as dense float32")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"weights file {path}: {name} has shape {list(value.shape)} and not so many values")
    wrong = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"weights file {path} holds values that are not finite (NaN or infinite), in {', '.join(wrong[:3])}{more}; "
            "the training that made it diverged: take an earlier checkpoint"
        )


_DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
)


def _kind(value: Tensor) -> str:
    of = "no data (meta) and " if value.is_meta else ""
    return f"{of}{str(value.dtype).removeprefix('torch.')}, {str(value.layout).removeprefix('torch.')}"


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

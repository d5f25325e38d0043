"""Exported weights: a safetensors file with plain values beside them, and its SHA-256 in a file of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from utils.errors import UserError
from utils.files import DamagedFileError, reading, replacing, write_text, writing

__all__ = ["SUFFIX", "checksum_file", "read_exported", "sha256_of", "write_exported"]

SUFFIX = ".safetensors"


def write_exported(weights: Mapping[str, Tensor], beside: Mapping[str, Any], path: Path) -> None:
    """Write weights as a safetensors file, and its SHA-256 beside it in the form of ``sha256sum``.

    Args:
        weights: name to tensor.
        beside: plain values; each is stored as JSON under its name in the metadata of the file.
        path: ends with ``.safetensors``.

    Raises:
        UserError: the file exists already, or cannot be written.
    """
    if path.suffix != SUFFIX:
        raise UserError(f"output {path} must end with {SUFFIX}, by which the scripts know the format")
    if path.exists():
        raise UserError(f"output {path} exists already; delete it or choose another name")
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    metadata = {name: json.dumps(value) for name, value in beside.items()}
    checksum = checksum_file(path)
    with writing(f"output {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not save_file: its file is readable by nobody else, and its errors are no OSError.
        content = save(tensors, metadata)
        checksum.unlink(missing_ok=True)  # of a file that is gone
        with replacing(path) as file:
            file.write(content)
        write_text(checksum, f"{hashlib.sha256(content).hexdigest()}  {path.name}\n")


def read_exported(path: Path) -> dict[str, Any]:
    """Read an exported file: its tensors under ``model``, and the plain values beside them under their names.

    Raises:
        DamagedFileError: the file is not what its checksum was made of, or no whole safetensors file.
        UserError: it is missing or cannot be opened.
    """
    with reading(path, f"the path of a {SUFFIX} file") as content:
        _check_sum(path, hashlib.file_digest(content, "sha256").hexdigest())  # type: ignore[arg-type]
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
            metadata = file.metadata() or {}
    except OSError as error:
        raise UserError(f"file {path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise DamagedFileError(
            f"file {path} is damaged or is no safetensors file ({error}); download or copy it again"
        ) from error
    return {**{name: _plain(text) for name, text in metadata.items()}, "model": weights}


def checksum_file(path: Path) -> Path:
    """Where the SHA-256 of an exported file lies."""
    return path.with_name(f"{path.name}.sha256")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sum(path: Path, found: str) -> None:
    """Compare the SHA-256 of a file with the one in the file next to it, where there is one."""
    checksum = checksum_file(path)
    if not checksum.exists():
        return
    with reading(checksum, f"the file that was written with {path.name}") as file:
        stored = file.read(1000).decode(errors="replace").split()
    if not stored or stored[0].lower() != found:
        raise DamagedFileError(
            f"file {path} has the SHA-256 {found}, and {checksum} tells {stored[0] if stored else 'none'}; one of the "
            "two is damaged or of another file: download or copy both again"
        )


def _plain(text: str) -> Any:
    """A value of the metadata; those of other programs are text and no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text

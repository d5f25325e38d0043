"""Folders and files that are whole when they have their name, whenever the program that makes them is killed."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import create, partial_of

__all__ = ["any_file", "building_folder", "finish", "save_arrays"]


def building_folder(final: Path) -> Path:
    """The folder to put files into: the final one where it has files, else one beside it that :func:`finish` renames.

    Raises:
        OSError: it cannot be made, or something else than a folder has its name.
    """
    if any_file(final):
        return final
    target = _target(final)
    folder = target.with_name(f".building-{target.name}")
    if folder.is_symlink():
        raise OSError(
            errno.EEXIST, "is a link and no folder of this program, which needs the name; move it away", str(folder)
        )
    folder.mkdir(exist_ok=True)
    return folder


def finish(folder: Path, final: Path) -> None:
    """Give a folder its name."""
    target = _target(final)
    if folder in (final, target):
        return
    if target.is_dir():  # empty folders: a file that was put there meanwhile stays, and is an error
        for path in sorted((target, *target.rglob("*")), reverse=True):
            path.rmdir()
    folder.rename(target)


def any_file(folder: Path) -> bool:
    """Whether there is anything in a folder but folders."""
    return any(not path.is_dir() for path in folder.rglob("*"))


def _target(final: Path) -> Path:
    """Where a link leads: the user chose that disk."""
    return final.resolve() if final.is_symlink() else final


def save_arrays(path: Path, arrays: Mapping[str, Any], changed: int | None = None) -> None:
    """Write a compressed ``.npz``, beside first.

    Args:
        changed: its time of change, in nanoseconds, where it shall not be now.

    Raises:
        OSError: no room, or the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    with create(partial) as file:
        np.savez_compressed(file, **arrays)
    if changed is not None:
        os.utime(partial, ns=(changed, changed))
    os.replace(partial, path)

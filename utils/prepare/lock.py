"""Processes prepare a folder in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from utils.errors import UserError
from utils.files import is_plain_file

__all__ = ["one_process_at_a_time"]

_EVERY_USER = 0o666  # of an empty file: another user can wait for it


@contextlib.contextmanager
def one_process_at_a_time(data_dir: Path) -> Iterator[None]:
    """Processes of one run, and unrelated runs, prepare a folder in turn; a kill ends the lock, too.

    Where no lock can be made (the disk is read-only, or the folder does not exist), nothing can be prepared, and the
    block runs without one.

    Raises:
        UserError: something that this program did not make is in the place of its lock.
    """
    path = data_dir / ".lock"
    with contextlib.suppress(OSError):
        status = path.lstat()
        if not is_plain_file(path) or status.st_size:
            raise UserError(f"{path} is not the lock of this program (an empty file); move it away")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            if data_dir.is_dir():  # a lock would make it
                stack.enter_context(FileLock(path, mode=_EVERY_USER))
        yield

"""A user's mistake ends in one sentence and exit code 2, never in a traceback."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from utils.telling import is_first_to_tell

__all__ = [
    "DataError",
    "ProcessLost",
    "SentenceParser",
    "StopRequested",
    "UserError",
    "exit_with_sentence",
    "user_input",
]

_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)

EXIT_USER_ERROR = 2
EXIT_PROCESS_LOST = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class UserError(Exception):
    """Something the user can put right. The message names what was given, what is allowed and what to do.

    All processes of a run may meet it, or one alone: the first one that does prints it.

    Attributes:
        told: another process prints it, or why it ended before this one; None where that is not known yet.
    """

    told: bool | None = None


class DataError(UserError):
    """A file that cannot be used; the message names it."""


class StopRequested(Exception):  # noqa: N818 - nothing went wrong
    """A signal asked the run to stop, and everything up to the last step is saved.

    Args:
        number: of the signal. The exit code is 128 more, as shells have it: 143 for SIGTERM, 130 for ctrl-C.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class ProcessLost(Exception):  # noqa: N818 - as StopRequested
    """Another process of the run ended or does not answer.

    Args:
        told: another process says why, so this one stays silent.
        timeout: seconds that the processes wait for each other.
    """

    def __init__(self, told: bool, timeout: float):
        super().__init__(told, timeout)
        self.told, self.timeout = told, timeout


class SentenceParser(argparse.ArgumentParser):
    """A parser that reports a mistake in one sentence and knows no abbreviations."""

    def __init__(self, **keywords: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **keywords)

    def error(self, message: str) -> NoReturn:
        told = not is_first_to_tell()
        self.exit(EXIT_USER_ERROR, None if told else f"{self.prog}: error: {message} (all arguments: --help)\n")


@contextmanager
def user_input() -> Iterator[None]:
    """Report the ValueError of a checked constructor (its message says what would work) as a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


_CONTINUES = "every finished epoch is saved, and the same command continues (--resume auto)"


def exit_with_sentence(main: Callable[[], None], interrupted: str = _CONTINUES) -> None:
    """Run ``main``; turn a UserError into its sentence on stderr and exit code 2, ctrl-C into 130.

    Args:
        interrupted: what ctrl-C leaves, and what to do then.
    """
    program = os.path.basename(sys.argv[0])
    try:
        main()
    except UserError as error:
        if not _is_told(error):
            print(f"{program}: error: {_sentence(error)}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    except ProcessLost as lost:
        if not lost.told:
            print(
                f"{program}: error: another process of the run ended, or did not answer for {lost.timeout:g} s "
                "(--timeout); every finished epoch is saved, and the same command continues (--resume auto)",
                file=sys.stderr,
                flush=True,
            )
        sys.exit(EXIT_PROCESS_LOST)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        if not _is_told(error):
            print(f"{program}: error: {error}; make room or choose another folder", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    except StopRequested as stop:
        if os.environ.get("RANK", "0") == "0":
            name = signal.Signals(stop.number).name
            print(
                f"\n{program}: stopped by {name}; every step is saved, and the same command continues (--resume auto)",
                file=sys.stderr,
                flush=True,
            )
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{program}: interrupted; {interrupted}", file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)


def _is_told(error: Exception) -> bool:
    """Whether another process of the run says why it ends."""
    told = getattr(error, "told", None)  # known where the processes were joined
    return not is_first_to_tell() if told is None else told


def _sentence(error: UserError) -> str:
    # A DataLoader worker's error arrives as a new one whose message is the worker's traceback; its last line is ours.
    lines = str(error).strip().splitlines() or [""]
    if len(lines) > 1 and lines[0].startswith("Caught "):
        return lines[-1].partition(": ")[2]
    return str(error)

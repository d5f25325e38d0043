"""A user's mistake ends in one sentence and exit code 2, never in a traceback."""

from __future__ import annotations

import argparse
import errno
import io
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

__all__ = [
    "DataError",
    "ProcessLost",
    "SentenceParser",
    "StopRequested",
    "UserError",
    "exit_with_sentence",
    "user_input",
]

_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)
_NO_USABLE_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ESTALE, errno.EMFILE)

_LONGEST = 1000  # characters of a sentence about the command line

EXIT_USER_ERROR = 2
EXIT_PROCESS_LOST = 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class UserError(Exception):
    """Something the user can put right. The message names what was given, what is allowed and what to do."""


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
        timeout: seconds that the processes wait for each other.
    """

    def __init__(self, timeout: float):
        super().__init__(timeout)
        self.timeout = timeout


class SentenceParser(argparse.ArgumentParser):
    """A parser that knows no abbreviations; a mistake is a UserError."""

    def __init__(self, **keywords: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **keywords)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse has it, but that takes ``--seed=--`` for a seed of nothing."""
        args = list(sys.argv[1:] if args is None else args)
        for arg in args:
            if arg.startswith("-") and arg.endswith("--") and arg != "--":
                self.error(f"argument {arg}: '--' is no value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        shown = _printable(message if len(message) < _LONGEST else f"{message[: _LONGEST // 2]} ...")
        raise UserError(f"{shown} (all arguments: --help)")


@contextmanager
def user_input() -> Iterator[None]:
    """Report the ValueError of a checked constructor (its message says what would work) as a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


_CONTINUES = "every finished epoch is saved, and the same command continues (--resume auto)"


def exit_with_sentence(main: Callable[[], None], interrupted: str = _CONTINUES) -> None:
    """Run ``main``; an error that the user can put right becomes one sentence on stderr.

    Exit codes: 2 for such an error, 3 where another process of the run is lost, 130 after ctrl-C, 143 after SIGTERM.
    Where all processes of a run end with the same sentence the first one prints it; otherwise each prints its own, with
    its rank. Standard output may be closed, or its reader may go away: the run continues without it.

    Args:
        interrupted: what ctrl-C leaves, and what to do then.
    """
    _survive_closed_output()
    try:
        main()
    except UserError as error:
        _report_and_leave(f"error: {_sentence(error)}", EXIT_USER_ERROR)
    except ProcessLost as lost:
        _report_and_leave(
            f"error: another process of the run ended, or did not answer for {lost.timeout:g} s (--timeout); "
            "every finished epoch is saved, and the same command continues (--resume auto)",
            EXIT_PROCESS_LOST,
        )
    except StopRequested as stop:
        name = signal.Signals(stop.number).name
        _report_and_leave(
            f"stopped by {name}; every step is saved, and the same command continues (--resume auto)", 128 + stop.number
        )
    except KeyboardInterrupt:
        _report_and_leave(f"interrupted; {interrupted}", EXIT_INTERRUPTED)
    except Exception as error:
        if sentence := _of_the_machine(error):
            _report_and_leave(f"error: {sentence}", EXIT_USER_ERROR)
        if not _is_joined():
            raise
        traceback.print_exc()
        _leave(1)


def _report_and_leave(message: str, code: int) -> NoReturn:
    """Print the message, once where all processes of the run end with it, and end this process."""
    rank, speaks = "", True
    if os.environ.get("WORLD_SIZE", "1") != "1":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher sends it as soon as one of the processes ended
        from utils.distributed import all_processes_say  # torch takes seconds: not for a mistake in a run of one

        if code != EXIT_PROCESS_LOST and all_processes_say(message):
            speaks = os.environ.get("RANK") == "0"
        elif "RANK" in os.environ:
            rank = f"rank {os.environ['RANK']}: "
    if speaks and sys.stderr is not None:
        start = "\n" if code > 128 else ""  # after the ^C of the terminal and the progress bar
        lines = "\n".join(map(_printable, message.split("\n")))
        print(f"{start}{os.path.basename(sys.argv[0])}: {rank}{lines}", file=sys.stderr, flush=True)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End the process. One of several ends without its group, whose end would wait for the other processes."""
    if not _is_joined():
        sys.exit(code)
    for worker in multiprocessing.active_children():
        worker.terminate()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)


def _is_joined() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _of_the_machine(error: Exception) -> str:
    """What the machine lacks, in a sentence; empty where the error is a fault of the program."""
    if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
        return f"{error}; make room or choose another folder"
    if isinstance(error, OSError) and error.errno in _NO_USABLE_PATH:
        return f"{error}; give another path"
    # torch has a type of its own for a GPU and none for a CPU.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error):
        return "there is not enough memory; use a smaller --batch-size, image or frame size, T or network"
    # --compile: torch has many types of error for it, and wraps those of the compiler.
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0]
        return f"--compile does not work here ({reason[:300]}); leave it out"
    return ""


class _Output:
    """A text stream whose reader may go away: what is printed after that is dropped."""

    def __init__(self, stream: io.TextIOWrapper):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._drop_if_closed(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._drop_if_closed(self._stream.flush)

    def _drop_if_closed(self, do: Callable[[], object]) -> None:
        try:
            do()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: a terminal that is gone
                raise
            _to_nowhere(self._stream.fileno())  # what is still in its buffer must not fail again at the end


def _to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _survive_closed_output() -> None:
    """Let prints succeed where standard output or error is closed, or gets closed, or cannot hold a character."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # closed from the start
            try:
                os.fstat(descriptor)
            except OSError:  # the next file that is opened would get the number, and what libraries print to it
                _to_nowhere(descriptor)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the rest of the process
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Output(stream))


def _printable(text: str) -> str:
    """Names may hold line breaks, and what terminals obey."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _sentence(error: UserError) -> str:
    # A DataLoader worker's error arrives as a new one whose message is the worker's traceback; its last line is ours.
    lines = str(error).strip().splitlines() or [""]
    if len(lines) > 1 and lines[0].startswith("Caught "):
        return lines[-1].partition(": ")[2]
    return str(error)

"""Processes: one or many, on CPUs (gloo) or GPUs (nccl); plain python, torchrun or torch.distributed.launch.

Gradients and buffers travel on the device. Flags, sums and objects are CPU tensors and always go through gloo: they
never wait for a GPU, and a lost process is a Python exception there.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from utils.errors import ProcessLost, UserError

__all__ = [
    "Process",
    "all_processes_say",
    "any_process",
    "broadcast_buffers",
    "fail_together",
    "gather",
    "largest_over_processes",
    "processes_here",
    "start",
    "sum_over_processes",
]

_MOST_PROCESSES = 1 << 16
_PATIENCE = 3.0  # seconds that a process which ends with an error waits for the others to end with the same

_GLOO_SAYS = ("gloo/", "caused pair closure", "closed by peer")  # it names its source file in most cases

_last_words: dist.ProcessGroup | None = None  # a group of its own: the others may be inside an exchange of the main one


@dataclass(frozen=True)
class Process:
    """What one process of a run knows of itself."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """The one process that prints and writes."""
        return self.rank == 0


@contextmanager
def start(
    device: str | None, local_rank: int | None, timeout: float = 600.0, deterministic: bool = False
) -> Iterator[Process]:
    """Join the process group that the environment describes (none: a run of one process), and leave it at the end.

    After an exception the group stays as it is: taking it down would wait for the other processes.
    :func:`utils.errors.exit_with_sentence` ends the process then.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or None for a GPU where there is one.
        local_rank: ``--local-rank`` of older launchers; the environment's ``LOCAL_RANK`` where it is None or -1.
        timeout: seconds that a process waits for the others.
        deterministic: the same bits again on the same machine. An operation that cannot give them is an error on a CPU,
            and on a GPU a warning that names it.

    Raises:
        UserError: the device is unknown or absent, there are more processes than GPUs, the environment is not that of a
            launcher, or the processes do not find each other.
        ProcessLost: another process ended, or did not answer in time.
    """
    rank, world_size = _rank_and_world_size()
    if local_rank is None or local_rank < 0:
        local_size = processes_here() if "LOCAL_WORLD_SIZE" in os.environ else world_size
        local_rank = _environment_number("LOCAL_RANK", 0, 0, local_size - 1)
    chosen = _choose_device(device, local_rank, world_size)
    with _reproducible(chosen) if deterministic else nullcontext():
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        # Joined whenever a launcher set the environment, even for one process.
        joined = _has_launcher(world_size)
        if joined:
            _join(_backend(chosen.type), timeout)
        try:
            yield Process(rank, local_rank, world_size, chosen)
        except Exception as error:
            if joined and _is_loss(error):
                raise ProcessLost(timeout) from error
            raise
        if joined:
            dist.destroy_process_group()


@contextmanager
def fail_together() -> Iterator[None]:
    """Where the block raises a UserError in one process, all processes raise one. All of them must pass here."""
    own = None
    try:
        yield
    except UserError as error:
        own = error
    sentences = gather(own and str(own))
    if own is not None:
        raise own
    if sentence := next(filter(None, sentences), None):
        raise UserError(sentence)


def all_processes_say(sentence: str) -> bool:
    """Whether all processes of the run are about to end with this sentence; waits a few seconds for them at most.

    A process that fails before it joined the others joins them here, so that they notice when it ends.
    """
    try:
        if not dist.is_initialized():
            if not _has_launcher(_rank_and_world_size()[1]):
                return False
            _join(_backend("cuda" if torch.cuda.is_available() else "cpu"), _PATIENCE)
        own = torch.tensor(list(hashlib.sha256(sentence.encode(errors="replace")).digest()), dtype=torch.uint8)
        found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        work = dist.all_gather(found, own, group=_last_words, async_op=True)
        work.wait(timedelta(seconds=_PATIENCE))
    except (UserError, RuntimeError, ValueError):  # the others are elsewhere, or gone
        return False
    return all(torch.equal(one, own) for one in found)


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _backend(device_type: str) -> str:
    return "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"


def _join(backend: str, timeout: float) -> None:
    global _last_words
    wait = timedelta(seconds=timeout)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=wait))
        store.set_timeout(wait)
        store = dist.PrefixStore(_name_of_start(store, rank, world_size, timeout), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=wait)
        group = dist.new_group(backend="gloo", timeout=wait)
        _last_words = group if isinstance(group, dist.ProcessGroup) else None
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"the {os.environ['WORLD_SIZE']} processes do not find each other at {address} within {timeout:g} s "
            f"({reason}); start all of them, with a --master_port that is free"
        ) from error


def _name_of_start(store: dist.Store, rank: int, world_size: int, timeout: float) -> str:
    """A name that the first process makes up and only the living processes get.

    A launcher that starts processes anew keeps its store, with the addresses of the dead ones, and the launchers of two
    machines count their starts differently. So every process asks under a name that it never had before.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"asks/{rank}", own)
        name = store.get(f"answer/{own}").decode()
        store.set(f"{name}/has/{rank}", "")
        return name
    missing, end = set(range(1, world_size)), time.monotonic() + timeout
    while missing:
        for other in sorted(missing):
            if store.check([f"asks/{other}"]):  # of a dead process, as long as it is the only one
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", own)
            if store.check([f"{own}/has/{other}"]):
                missing.remove(other)
        if time.monotonic() > end:
            raise ValueError(f"missing: rank {', '.join(map(str, sorted(missing)))}")
        time.sleep(0.02)
    return own


def _is_loss(error: BaseException) -> bool:
    """Whether an exchange between the processes failed; gloo has no type of its own for it."""
    of_gloo = isinstance(error, RuntimeError) and any(words in str(error) for words in _GLOO_SAYS)
    return isinstance(error, dist.DistError) or of_gloo


def _rank_and_world_size() -> tuple[int, int]:
    world_size = _environment_number("WORLD_SIZE", 1, 1, _MOST_PROCESSES)
    return _environment_number("RANK", 0, 0, world_size - 1), world_size


def _has_launcher(world_size: int) -> bool:
    """Whether the environment says where the processes meet."""
    if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
        _environment_number("MASTER_PORT", -1, 1, 65535)
        return True
    if world_size > 1:
        raise UserError(f"WORLD_SIZE={world_size} without MASTER_ADDR; start several processes with torchrun")
    return False


def processes_here() -> int:
    """How many processes of the run are on this machine; 1 where no launcher says so.

    Raises:
        UserError: the environment holds something else than a launcher sets.
    """
    return _environment_number("LOCAL_WORLD_SIZE", 1, 1, _rank_and_world_size()[1])


def _environment_number(name: str, default: int, least: int, most: int) -> int:
    text = os.environ.get(name)
    try:
        value = default if text is None else int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        found = "which is not set" if text is None else f"which is {text[:40]!r}"
        allowed = f"a whole number from {least} to {most}" if least < most else str(least)
        raise UserError(
            f"environment variable {name}, {found}, must be {allowed}; start the run with torchrun, or unset RANK, "
            "WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE for a run of one process"
        )
    return value


def _choose_device(wanted: str | None, local_rank: int, world_size: int) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(wanted or ("cuda" if gpus else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {wanted!r} is unknown; use cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    if gpus == 0:
        raise UserError(f"--device {wanted} needs a GPU that torch can use and there is none here; use --device cpu")
    if world_size > 1:
        if device.index is not None:
            raise UserError(f"--device {wanted} names one GPU for {world_size} processes; use --device cuda")
        local_size = max(local_rank + 1, processes_here())
        if local_size > gpus:
            raise UserError(f"{local_size} processes on this machine need as many GPUs and it has {gpus}; start fewer")
        return torch.device("cuda", local_rank)
    index = device.index or 0
    if index >= gpus:
        raise UserError(f"--device {wanted} does not exist; this machine has cuda:0 to cuda:{gpus - 1}")
    return torch.device("cuda", index)


def sum_over_processes(values: Sequence[float]) -> list[float]:
    """Sums over all processes, in double precision, the same list everywhere."""
    return _reduced(values, dist.ReduceOp.SUM)


def largest_over_processes(values: Sequence[float]) -> list[float]:
    """Element by element the largest of all processes, the same list everywhere."""
    return _reduced(values, dist.ReduceOp.MAX)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return bool(largest_over_processes([flag])[0])


def _reduced(values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
    reduced = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(reduced, operation)
    return reduced.tolist()


def gather(value: object) -> list:
    """The value of every process, in rank order, on every process."""
    if not dist.is_initialized():
        return [value]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_buffers(net: nn.Module) -> None:
    """Give every process the buffers (BatchNorm statistics) of the first one: those that are saved and evaluated."""
    if dist.is_initialized():
        for buffer in net.buffers():
            dist.broadcast(buffer, src=0)

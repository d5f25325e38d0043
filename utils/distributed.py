"""Processes: one or many, on CPUs (gloo) or GPUs (nccl); plain python, torchrun or torch.distributed.launch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from utils.errors import ProcessLost, UserError
from utils.telling import is_first_to_tell, launcher_keeps_store, meeting_place, wait_until_told

__all__ = ["Process", "broadcast_buffers", "gather", "largest_over_processes", "start", "sum_over_processes"]


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

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or None for a GPU where there is one.
        local_rank: ``--local-rank`` of older launchers; the environment's ``LOCAL_RANK`` where it is None.
        timeout: seconds that a process waits for the others.
        deterministic: the same bits again on the same machine. An operation that cannot give them is an error on a CPU,
            and on a GPU a warning that names it.

    Raises:
        UserError: the device is unknown or absent, there are more processes than GPUs, or they do not find each other.
        ProcessLost: another process ended, or did not answer in time.
    """
    world_size = _environment_number("WORLD_SIZE", 1)
    rank = _environment_number("RANK", 0)
    if local_rank is None:
        local_rank = _environment_number("LOCAL_RANK", 0)
    chosen = _choose_device(device, local_rank, world_size)
    # init_process_group is called whenever a launcher set the environment, even for one process: it owns the store.
    joined = "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ
    if world_size > 1 and not joined:
        raise UserError(f"WORLD_SIZE={world_size} without MASTER_ADDR; start several processes with torchrun")
    with _reproducible(chosen) if deterministic else nullcontext():
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        store = _join("nccl" if chosen.type == "cuda" else "gloo", timeout) if joined else None
        to_ask = 0  # processes that ask this one, which has the store, who tells why the run ends
        try:
            yield Process(rank, local_rank, world_size, chosen)
        except BaseException as error:
            if store is None or world_size == 1:
                raise
            lost = _is_loss(error)
            # Of a lost first process its store is gone, too, and the second one may be all that is left.
            told = not is_first_to_tell(store, last=1 if lost else 0)
            if rank == 0 and not launcher_keeps_store():
                to_ask = world_size - lost
            if not lost:
                error.told = told
                raise
            # The group is left as it is: taking it down would wait for the one that is gone.
            joined = False
            raise ProcessLost(told, timeout) from error
        finally:
            if joined:
                dist.destroy_process_group()
            if to_ask:
                wait_until_told(store, to_ask)


@contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _join(backend: str, timeout: float) -> dist.Store:
    store = None
    try:
        store, rank, world_size = meeting_place(timeout)
        wait = timedelta(seconds=timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=wait)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
        reason = (str(error).splitlines() or [""])[0]
        problem = UserError(
            f"the {os.environ['WORLD_SIZE']} processes do not find each other at {address} within {timeout:g} s "
            f"({reason}); start all of them, with a --master_port that is free"
        )
        problem.told = not is_first_to_tell(store, last=0 if store else 1)
        raise problem from error
    return store


def _is_loss(error: BaseException) -> bool:
    """Whether an exchange between the processes failed; gloo has no type of its own for it."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def _environment_number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise UserError(
            f"environment variable {name}={value!r} must be a whole number; unset it or use torchrun"
        ) from None


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
        local_size = _environment_number("LOCAL_WORLD_SIZE", min(world_size, local_rank + 1))
        if local_size > gpus:
            raise UserError(f"{local_size} processes on this machine need as many GPUs and it has {gpus}; start fewer")
        return torch.device("cuda", local_rank)
    index = device.index or 0
    if index >= gpus:
        raise UserError(f"--device {wanted} does not exist; this machine has cuda:0 to cuda:{gpus - 1}")
    return torch.device("cuda", index)


def sum_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    """Sums over all processes, in double precision, the same list everywhere."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def largest_over_processes(value: float, device: torch.device) -> float:
    """The largest of the values of all processes."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


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

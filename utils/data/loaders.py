"""Batches of a data set for every process: training samples shuffled, test samples each once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, DistributedSampler, Sampler, TensorDataset

from utils.distributed import Process
from utils.errors import UserError
from utils.signals import in_worker, starting_workers

__all__ = ["Data", "make_loaders", "sample_seed", "set_epoch"]


class Data(Protocol):
    """What loaders are made of: sized data sets; ``train`` and ``val`` may be None."""

    @property
    def train(self) -> Any: ...

    @property
    def val(self) -> Any: ...

    @property
    def test(self) -> Any: ...


class _Shard(Sampler[int]):
    """Every ``world_size``-th sample, without padding: together the processes see every sample once."""

    def __init__(self, count: int, process: Process):
        self.indices = range(process.rank, count, process.world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class _Shuffled(DistributedSampler):
    """A shuffled share of the samples, without the first ``start`` ones of it."""

    start = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.start, None)

    def __len__(self) -> int:
        return super().__len__() - self.start


class _Loader(DataLoader):
    """A loader whose processes survive a SIGTERM to all processes of the run."""

    def __iter__(self) -> Any:
        with starting_workers():
            return super().__iter__()


def make_loaders(
    data: Data,
    batch_size: int,
    num_workers: int,
    seed: int,
    process: Process,
    collate: Callable[[list], Any] | None = None,
    drop_last: bool = True,
) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Loaders of this process: training batches (shuffled by seed and epoch), held-out and test batches.

    The held-out batches select an epoch; where nothing is held out they are the test batches.

    Call :func:`set_epoch` before every training epoch.

    Args:
        data: has ``train`` (None where only an evaluation is wanted: that loader is empty), ``val`` and ``test``.
        batch_size: of this process.
        collate: list of samples to a batch; torch's where it is None.
        drop_last: leave out the last training batch where it is smaller. Without, every process takes it, and up to
            ``world_size - 1`` samples are drawn twice so that all processes have as many.

    Raises:
        UserError: there is no training batch for every process.
    """
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": num_workers,
        "pin_memory": process.device.type == "cuda",
        "collate_fn": collate,
        "worker_init_fn": in_worker,
    }
    # Starting to iterate draws a number: in an evaluation not from the generator that training goes on with.
    test_batches, val_batches = (
        _Loader(samples, sampler=_Shard(len(samples), process), generator=torch.Generator(), **common)
        for samples in (data.test, data.test if data.val is None else data.val)
    )
    if data.train is None:
        return _Loader(TensorDataset(torch.empty(0))), val_batches, test_batches
    needed = (batch_size if drop_last else 1) * process.world_size
    if len(data.train) < needed:
        share = f"{needed // process.world_size} for each of {process.world_size} process(es)"
        raise UserError(
            f"--batch-size: a step takes {'' if drop_last else 'at least '}{needed} training samples ({share}) and "
            f"there are {len(data.train)}; use a smaller batch or fewer processes"
        )
    sampler = _Shuffled(data.train, process.world_size, process.rank, seed=seed, drop_last=drop_last)
    return _Loader(data.train, sampler=sampler, drop_last=drop_last, **common), val_batches, test_batches


def set_epoch(loader: Any, epoch: int, step: int = 0) -> None:
    """Give the epoch to everything in a training loader that draws, the order and the augmentation.

    Args:
        step: steps of the epoch that are done: their batches are left out.
    """
    loader.sampler.set_epoch(epoch)
    loader.sampler.start = step * loader.batch_size
    getattr(loader.dataset, "dataset", loader.dataset).epoch = epoch  # of a part of the samples: of all of them
    # Starting to iterate draws a number. At the start of the epoch that was done already.
    loader.generator = torch.Generator() if step else None


def sample_seed(*key: object) -> int:
    """A seed keyed by for instance (seed, epoch, sample): draws do not depend on workers, processes or what ran before.

    Returns:
        56 bits, as many as every generator takes.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:7], "little")

"""Which steps and channels Attention ZoneOut replaced, epoch by epoch: one small file an epoch in ``<run>/azo/``."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.sma import SMA
from utils.errors import UserError
from utils.files import replacing

__all__ = ["AZORecord", "kernel_sizes", "read_azo_record"]

FOLDER = "azo"
_BATCHES, _KERNELS = "batches", "kernels"


def kernel_sizes(sma: SMA) -> list[int]:
    """Kernel size of every scale."""
    branches: Any = sma.S_Convs
    return [branch.conv.kernel_size[0] for branch in branches]


class AZORecord:
    """Counts, in this process, how often AZO replaced each (step, channel) of every SMA with AZO of a network.

    It is the ``observer`` of these SMA. The counts stay on the device and come over once an epoch; the counts of an
    unfinished epoch go into the checkpoint with :meth:`state_dict`.

    Args:
        net: the network itself, not its wrapper.
    """

    def __init__(self, net: nn.Module):
        self._counts: dict[str, Tensor] = {}  # of every SMA, by name: [S, T, C]
        self._batches: dict[str, int] = {}
        self._kernels: list[int] = []
        for name, module in net.named_modules():
            if isinstance(module, SMA) and module.AZO:
                device = next(module.parameters()).device
                shape = (len(module.S_Convs), module.time, module.channel)
                self._counts[name] = torch.zeros(shape, dtype=torch.int32, device=device)
                self._batches[name] = 0
                self._kernels = kernel_sizes(module)  # the same in all SMA
                module.observer = self._observer(name)

    def __bool__(self) -> bool:
        return bool(self._counts)

    def _observer(self, name: str) -> Callable[[Tensor, Tensor, Tensor | None], None]:
        # A function, not a method: an averaged copy of the network shares it, and is never in training.
        @torch.compiler.disable  # it counts in Python: with --compile every batch would be a new graph
        def count(_w_time: Tensor, _w_channel: Tensor, replaced: Tensor | None) -> None:
            if replaced is not None:
                self._counts[name] += replaced
                self._batches[name] += 1

        return count

    def state_dict(self) -> dict[str, Any]:
        """The counts of the epoch so far, for a checkpoint."""
        return {
            "counts": {name: count.cpu().clone() for name, count in self._counts.items()},
            "batches": {**self._batches},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        for name, count in state["counts"].items():
            self._counts[name].copy_(count)
        self._batches.update(state["batches"])

    def start(self, run: Path, epochs_done: int) -> None:
        """Remove what lies in the run directory of epochs that will be trained once more."""
        for path in (run / FOLDER).glob("epoch_*.npz"):
            if int(path.stem.removeprefix("epoch_")) > epochs_done:
                path.unlink()

    def write(self, run: Path, epoch: int) -> None:
        """Write the counts of ``epoch`` into the run directory, whole or not at all, and start those of the next."""
        path = run / FOLDER / f"epoch_{epoch:04}.npz"
        path.parent.mkdir(exist_ok=True)
        content: dict[str, Any] = {name: count.cpu().numpy() for name, count in self._counts.items()}
        content |= {_BATCHES: max(self._batches.values()), _KERNELS: self._kernels}
        with replacing(path) as file:
            np.savez_compressed(file, **content)
        for name, count in self._counts.items():
            count.zero_()
            self._batches[name] = 0


def read_azo_record(run: Path) -> tuple[list[int], list[int], dict[str, np.ndarray]]:
    """Read what AZO replaced in the training of a run.

    Returns:
        The epochs, the kernel sizes of the scales, and for every SMA, by name, the share of the batches in which AZO
        replaced a (step, channel): ``[epochs, S, T, C]``, 0 to 1.

    Raises:
        UserError: the run has no record, or a file of it is damaged.
    """
    paths = sorted((run / FOLDER).glob("epoch_*.npz"))
    if not paths:
        raise UserError(
            f"run directory {run} has no record of AZO ({FOLDER}/epoch_*.npz); train with --AZO --record-azo, and "
            "give the --output-dir of that run"
        )
    shares: dict[str, list[np.ndarray]] = {}
    for path in paths:
        try:
            with np.load(path) as file:
                batches, kernels = max(1, int(file[_BATCHES])), file[_KERNELS].tolist()
                for name in file.files:
                    if name not in (_BATCHES, _KERNELS):
                        shares.setdefault(name, []).append(file[name] / batches)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"file {path} cannot be read ({error}); delete it to leave its epoch out") from error
    epochs = [int(path.stem.removeprefix("epoch_")) for path in paths]
    return epochs, kernels, {name: np.stack(values) for name, values in shares.items()}

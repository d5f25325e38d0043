"""One epoch of training, and exact evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.neurons import reset_net
from utils.distributed import any_process, broadcast_buffers, gather, sum_over_processes
from utils.errors import UserError

__all__ = ["AMP_DTYPES", "Progress", "evaluate", "time_first", "train_one_epoch"]

AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}

_MOST_SKIPPED = 25  # the scaler halves its factor at each: from 65536 down to below 1
_REMEDY = "lower --lr or use --amp off; the last finished epoch is saved"

Criterion = Callable[[Tensor, Tensor], Tensor]
Prepare = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def time_first(frames: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Event frames ``[B, T, 2, H, W]`` as the networks take them, ``[T, B, 2, H, W]``; the labels as they are.

    Counts in integers become float32 here, on the device: a quarter of the bytes to copy, and the same values.
    """
    frames = frames.transpose(0, 1).contiguous()
    return frames if frames.is_floating_point() else frames.float(), labels


class Progress:
    """How far an epoch has come in this process: steps, and the sums of loss, correct predictions and samples.

    The sums stay on the device: no step waits for it.

    Args:
        device: where the sums are kept.
        top: also count labels among so many largest logits.
        agree: whether a flag is set in any process; asked once a step.

    Attributes:
        epoch: its number, from 1, for messages.
        step: steps done.
        seconds: spent on the epoch before this start of the program.
        skips: steps of the epoch that the fp16 scaler skipped.
        streak: such steps in a row up to now, in earlier epochs, too.
    """

    _COUNTS = ("step", "count", "skips", "streak", "seconds")

    def __init__(self, device: torch.device, top: int = 1, agree: Callable[[bool], bool] = any_process):
        self.device, self.top, self.agree = device, top, agree
        self.epoch, self.streak = 1, 0
        self.reset()

    def reset(self) -> None:
        """Start an epoch."""
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.step = self.count = self.skips = 0
        self.seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"sums": self.sums.cpu(), **{name: getattr(self, name) for name in self._COUNTS}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        self.sums = state["sums"].to(self.device)
        for name in self._COUNTS:
            setattr(self, name, state[name])

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: its mean loss, logits ``[T, B, K]`` or ``[B, K]`` and labels ``[B]``."""
        scores = logits.detach().mean(0) if logits.ndim == 3 else logits.detach()
        correct = (scores.argmax(1) == labels).sum()
        among = (scores.topk(min(self.top, scores.shape[1])).indices == labels[:, None]).sum()
        self.sums += torch.stack([loss.detach().double() * len(labels), correct.double(), among.double()])
        self.count += len(labels)

    def result(self) -> dict[str, float]:
        """Averages and counts over all processes."""
        loss, correct, among, count = sum_over_processes([*self.sums.tolist(), self.count])
        count = int(count)
        found = {"loss": loss / count, "acc1": 100.0 * correct / count, "correct": int(correct), "count": count}
        if self.top > 1:
            found |= {f"acc{self.top}": 100.0 * among / count, f"correct{self.top}": int(among)}
        return found


def train_one_epoch(
    net: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    amp: str = "off",
    prepare: Prepare = time_first,
    micro_batches: int = 1,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train on every batch once, one optimiser step a batch.

    Args:
        net: inputs to logits ``[T, B, K]`` or ``[B, K]``.
        batches: pairs of samples ``[B, ...]`` and labels ``[B]``.
        criterion: logits and targets to the mean loss of the batch.
        optimizer, scaler: of the parameters of ``net``.
        device: where ``net`` is.
        amp: ``"fp16"``, ``"bf16"`` or ``"off"``.
        prepare: samples and labels on the device to the inputs of the network and the targets of the criterion.
        micro_batches: divide every batch into so many parts, one after the other, and add up their gradients. BatchNorm
            and AZO see one part at a time.
        progress: of an epoch whose first batches are done and not among ``batches``; brought up to date every step.

    Returns:
        ``loss`` (mean over samples), ``acc1`` (percent), ``correct`` and ``count`` over all processes, and ``skips``:
        steps that the fp16 scaler skipped.

    Raises:
        UserError: the loss, a gradient or a running statistic is not finite (raised before the optimiser's step), or
            the fp16 scaler has skipped too many steps in a row, or a weight is not finite at the end; nothing of the
            epoch should be kept.
    """
    net.train()
    reset_net(net)  # whatever an interrupted batch left behind
    progress = progress or Progress(device)
    statistics = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    for samples, labels in batches:
        optimizer.zero_grad(set_to_none=True)
        losses = []
        parts = list(zip(samples.chunk(micro_batches), labels.chunk(micro_batches), strict=True))
        for number, part in enumerate(parts, 1):
            inputs, targets = prepare(*_to_device(*part, device))
            with _gradients_stay_local(net) if number < len(parts) else nullcontext():
                with _autocast(device, amp):
                    logits = net(inputs)
                loss = criterion(logits, targets)
                scaler.scale(loss * (len(part[1]) / len(labels))).backward()
            reset_net(net)
            losses.append(loss.detach())
            progress.add(loss, logits, part[1].to(device))
        where = f"training diverged in epoch {progress.epoch}, step {progress.step + 1}, at learning rate"
        where = f"{where} {optimizer.param_groups[0]['lr']:g}"
        # The processes agree: all stop, or none does.
        if progress.agree(not _is_finite(losses, net, statistics, scaler)):
            of_all = gather(losses[-1].item())  # so that all processes raise the same sentence
            loss = next((one for one in of_all if not math.isfinite(one)), of_all[0])
            raise UserError(
                f"{where}: the loss ({loss:.4g}), a gradient or a running statistic is not finite; check "
                f"the data, {_REMEDY}"
            )
        taken: list[bool] = []  # a hook sees whether the scaler takes the step; asking for its scale waits for a GPU
        with optimizer.register_step_post_hook(lambda *_, taken=taken: taken.append(True)):
            scaler.step(optimizer)
        scaler.update()
        skipped = not taken
        progress.skips += skipped
        progress.streak = progress.streak + 1 if skipped else 0
        if progress.streak >= _MOST_SKIPPED:
            raise UserError(f"{where}: fp16 gradients were not finite in {progress.streak} steps in a row; {_REMEDY}")
        progress.step += 1
    if any_process(not all(value.isfinite().all() for value in net.state_dict().values())):
        raise UserError(f"training diverged in epoch {progress.epoch}: a weight is not finite; {_REMEDY}")
    return progress.result() | {"skips": progress.skips}


@torch.inference_mode()
def evaluate(
    net: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    criterion: Criterion,
    device: torch.device,
    prepare: Prepare = time_first,
    top: int = 1,
    amp: str = "off",
) -> dict[str, float]:
    """Evaluate every sample once; exact for any number of processes and any batch size.

    Args:
        net: as in :func:`train_one_epoch`; the very network that was trained.
        batches: those of all processes together hold every sample once (no padding).
        criterion, device, prepare: as in :func:`train_one_epoch`.
        top: above 1, also count labels among so many largest logits.
        amp: ``"off"`` as published (float32; on a GPU torch lets convolutions use TF32), or another precision, which
            changes the predictions where potentials come within a rounding of the threshold.

    Returns:
        As :func:`train_one_epoch`, and with ``top`` also ``acc<top>`` and ``correct<top>``.
    """
    net.eval()
    reset_net(net)
    broadcast_buffers(net)  # in training every process has BatchNorm statistics of its own
    progress = Progress(device, top)
    for samples, labels in batches:
        samples, labels = _to_device(samples, labels, device)
        inputs, targets = prepare(samples, labels)
        with _autocast(device, amp):
            logits = net(inputs)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        reset_net(net)
        progress.add(criterion(logits, targets), logits, labels)
    return progress.result()


def _autocast(device: torch.device, amp: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=AMP_DTYPES[amp], enabled=AMP_DTYPES[amp] is not None)


def _is_finite(losses: list[Tensor], net: nn.Module, statistics: list[Tensor], scaler: torch.amp.GradScaler) -> bool:
    """Whether a step may be taken. With fp16 the scaler looks at the gradients, which overflow now and then.

    Losses and gradients alone would not do: neurons that get nan stay silent, and it shows in the running statistics.
    """
    values = [*losses, *statistics]
    if not scaler.is_enabled():
        values += [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    return bool(torch.nn.utils.get_total_norm(values).isfinite())


def _gradients_stay_local(net: nn.Module) -> AbstractContextManager:
    """No exchange between the processes in this backward: the last part's exchanges the sum."""
    return net.no_sync() if isinstance(net, DistributedDataParallel) else nullcontext()


def _to_device(samples: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    return samples.to(device, non_blocking=True), labels.to(device, non_blocking=True)

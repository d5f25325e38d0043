"""One epoch of training, and exact evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.folding import folded
from models.neurons import reset_net
from utils.distributed import any_process, broadcast_buffers, sum_over_processes
from utils.errors import UserError

__all__ = ["AMP_DTYPES", "Progress", "evaluate", "time_first", "train_one_epoch"]

AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}

_MOST_SKIPPED = 25  # the scaler halves its factor at each: from 65536 down to below 1
_REMEDY = "lower --lr, use --amp off or --on-nan skip; the last finished epoch is saved"

Criterion = Callable[[Tensor, Tensor], Tensor]
Prepare = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def time_first(frames: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Event frames ``[B, T, 2, H, W]`` as the networks take them, ``[T, B, 2, H, W]``; the labels as they are.

    Counts in integers become float32 here, on the device: a quarter of the bytes to copy, and the same values.
    """
    frames = frames.transpose(0, 1).contiguous()
    return frames if frames.is_floating_point() else frames.float(), labels


class Progress:
    """How far an epoch has come: steps done and left out, and loss, correct predictions and samples of this process.

    The sums stay on the device: no wait for it in every step.

    Attributes:
        skips: steps of the epoch that the fp16 scaler skipped.
        streak: such steps in a row up to now, in earlier epochs, too.
    """

    _COUNTS = ("step", "count", "left_out", "skips", "streak")

    def __init__(self, device: torch.device, top: int = 1):
        self.device, self.top = device, top
        self.streak = 0
        self.reset()

    def reset(self) -> None:
        """Start an epoch."""
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.step = self.count = self.left_out = self.skips = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"sums": self.sums.cpu(), **{name: getattr(self, name) for name in self._COUNTS}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.sums = state["sums"].to(self.device)
        for name in self._COUNTS:
            setattr(self, name, state.get(name, 0))  # older checkpoints have no skips and streak

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
    accumulate: int = 1,
    epoch: int = 1,
    progress: Progress | None = None,
    nan_limit: int = 0,
    agree: Callable[[bool], bool] = any_process,
) -> dict[str, float]:
    """Train on every batch once, one optimiser step a batch.

    Args:
        net: inputs to logits ``[T, B, K]`` or ``[B, K]``.
        batches: pairs of samples ``[B, ...]`` and labels ``[B]``.
        criterion: logits and targets to the mean loss of the batch.
        amp: ``"fp16"``, ``"bf16"`` or ``"off"``.
        prepare: samples and labels on the device to the inputs of the network and the targets of the criterion.
        accumulate: split every batch into so many parts, one after the other, and add up their gradients. BatchNorm
            and AZO see one part at a time.
        epoch: for the message of a run that diverges.
        progress: of an epoch whose first batches are done and not among ``batches``; brought up to date every step.
        nan_limit: so many steps of an epoch whose loss, gradient or running statistics are not finite are left out:
            weights, optimiser and statistics stay as they were, and the samples are not counted. One more stops.
        agree: whether a flag is set in any process; called once a step. :meth:`utils.signals.StopSignal.agree` sends
            the signals along.

    Returns:
        ``loss`` (mean over samples), ``acc1`` (percent), ``correct`` and ``count`` over all processes, and
        ``left_out`` and ``skips`` (by the fp16 scaler), numbers of steps.

    Raises:
        UserError: the loss, a gradient or a running statistic is not finite (told before the optimiser's step), or the
            fp16 scaler has skipped too many steps in a row, or a weight is not finite at the end; nothing of the epoch
            should be kept.
    """
    net.train()
    reset_net(net)  # whatever an interrupted batch left behind
    progress = progress or Progress(device)
    statistics = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    for samples, labels in batches:
        optimizer.zero_grad(set_to_none=True)
        before = [buffer.clone() for buffer in net.buffers()] if nan_limit else []
        outcomes = []
        parts = list(zip(samples.chunk(accumulate), labels.chunk(accumulate), strict=True))
        for number, (some, their_labels) in enumerate(parts, 1):
            some, their_labels = _to_device(some, their_labels, device)
            inputs, targets = prepare(some, their_labels)
            with _gradients_stay_local(net) if number < len(parts) else nullcontext():
                with _autocast(device, amp):
                    logits = net(inputs)
                loss = criterion(logits, targets)
                scaler.scale(loss * (len(some) / len(samples))).backward()
            reset_net(net)
            outcomes.append((loss.detach(), logits.detach(), their_labels))
        where = f"training diverged in epoch {epoch}, step {progress.step + 1}, at learning rate {_rate(optimizer):g}"
        counted = progress.sums.clone(), progress.count
        for outcome in outcomes:
            progress.add(*outcome)
        # Agreed between the processes: all stop (or leave the step out) with one message, or none does.
        if agree(not _is_finite(outcomes, net, statistics, scaler)):
            what = f"the loss ({loss.item():.4g}), a gradient or a running statistic is not finite"
            if progress.left_out == nan_limit:
                already = f", and {nan_limit} steps are left out already (--nan-limit)" if nan_limit else ""
                raise UserError(f"{where}: {what}{already}; check the data, {_REMEDY}")
            progress.sums, progress.count = counted
            progress.left_out += 1
            progress.step += 1
            for buffer, value in zip(net.buffers(), before, strict=True):
                buffer.copy_(value)
            continue
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped = scaler.get_scale() < scale or scale == 0.0  # where it is 0 it cannot fall, and no step is taken
        progress.skips += skipped
        progress.streak = progress.streak + 1 if skipped else 0
        if progress.streak >= _MOST_SKIPPED:
            raise UserError(f"{where}: fp16 gradients were not finite in {progress.streak} steps in a row; {_REMEDY}")
        progress.step += 1
    if not progress.count:
        raise UserError(f"training diverged in epoch {epoch}: every step had to be left out; check the data, {_REMEDY}")
    if any_process(not all(value.isfinite().all() for value in net.state_dict().values())):
        raise UserError(f"training diverged in epoch {epoch}: a weight is not finite; {_REMEDY}")
    return progress.result() | {"left_out": progress.left_out, "skips": progress.skips}


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

    In float32 as published, or with ``amp`` as in training, which changes the predictions where potentials come within
    a rounding of the threshold.

    BatchNorm is folded into the convolutions of a copy, which changes rounding only; ``net`` stays as it is.
    ``batches`` of all processes together hold every sample once (no padding). Returns as :func:`train_one_epoch`;
    with ``top`` above 1 also ``acc<top>`` and ``correct<top>``: the label is among the ``top`` largest logits.
    """
    net.eval()
    reset_net(net)
    broadcast_buffers(net)  # in training every process has BatchNorm statistics of its own
    net = folded(net)
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


def _rate(optimizer: torch.optim.Optimizer) -> float:
    return optimizer.param_groups[0]["lr"]


def _is_finite(outcomes: list[tuple], net: nn.Module, statistics: list[Tensor], scaler: torch.amp.GradScaler) -> bool:
    """Whether a step may be taken. With fp16 the scaler looks at the gradients, which overflow now and then.

    Losses and gradients alone would not do: neurons that get nan stay silent, and it shows in the running statistics.
    """
    values = [loss for loss, *_ in outcomes] + statistics
    if not scaler.is_enabled():
        values += [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    return bool(torch.nn.utils.get_total_norm(values).isfinite())


def _gradients_stay_local(net: nn.Module) -> AbstractContextManager:
    """No exchange between the processes in this backward: the last part's exchanges the sum."""
    return net.no_sync() if isinstance(net, DistributedDataParallel) else nullcontext()


def _to_device(samples: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    return samples.to(device, non_blocking=True), labels.to(device, non_blocking=True)

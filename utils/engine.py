"""One epoch of training, and exact evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from models.neurons import reset_net
from utils.distributed import broadcast_buffers, sum_over_processes
from utils.errors import UserError

__all__ = ["AMP_DTYPES", "evaluate", "train_one_epoch"]

AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}

Criterion = Callable[[Tensor, Tensor], Tensor]


class _Sums:
    """Loss, correct predictions and samples, summed on the device: no wait for the device in every step."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        correct = (logits.mean(0).argmax(1) == labels).sum()
        self.sums += torch.stack([loss.detach().double() * len(labels), correct.double()])
        self.count += len(labels)

    def result(self) -> dict[str, float]:
        loss, correct, count = sum_over_processes([*self.sums.tolist(), self.count], self.sums.device)
        count = int(count)
        return {"loss": loss / count, "acc1": 100.0 * correct / count, "correct": int(correct), "count": count}


def train_one_epoch(
    net: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    amp: str = "off",
) -> dict[str, float]:
    """Train on every batch once.

    Args:
        net: ``[T, B, 2, H, W]`` to logits ``[T, B, K]``.
        batches: pairs of frames ``[B, T, 2, H, W]`` and labels ``[B]``.
        criterion: logits ``[T, B, K]`` and labels ``[B]`` to the mean loss of the batch.
        amp: ``"fp16"``, ``"bf16"`` or ``"off"``.

    Returns:
        ``loss`` (mean over samples), ``acc1`` (percent), ``correct`` and ``count`` over all processes.

    Raises:
        UserError: the loss or the weights are not finite any more; nothing of the epoch should be kept.
    """
    net.train()
    reset_net(net)  # whatever an interrupted batch left behind
    sums = _Sums(device)
    for frames, labels in batches:
        frames, labels = _to_device(frames, labels, device)
        with torch.autocast(device.type, dtype=AMP_DTYPES[amp], enabled=AMP_DTYPES[amp] is not None):
            logits = net(frames)
        loss = criterion(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        reset_net(net)
        sums.add(loss, logits, labels)
    result = sums.result()
    # The loss alone does not tell: neurons that get nan stay silent, and the last layer's bias gives a finite loss.
    if not math.isfinite(result["loss"]) or not all(value.isfinite().all() for value in net.state_dict().values()):
        raise UserError(
            f"training diverged at learning rate {optimizer.param_groups[0]['lr']:g}: the loss is {result['loss']:.4g} "
            "and the weights are no longer finite; lower --lr or use --amp off; the last finished epoch is saved"
        )
    return result


@torch.inference_mode()
def evaluate(
    net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], criterion: Criterion, device: torch.device
) -> dict[str, float]:
    """Evaluate every sample once, in float32 as published; exact for any number of processes and any batch size.

    ``batches`` of all processes together hold every sample once (no padding). Returns as :func:`train_one_epoch`.
    """
    net.eval()
    reset_net(net)
    broadcast_buffers(net)  # in training every process has BatchNorm statistics of its own
    sums = _Sums(device)
    for frames, labels in batches:
        frames, labels = _to_device(frames, labels, device)
        logits = net(frames)
        reset_net(net)
        sums.add(criterion(logits, labels), logits, labels)
    return sums.result()


def _to_device(frames: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    frames = frames.to(device, non_blocking=True).transpose(0, 1)  # [B, T, 2, H, W] -> [T, B, 2, H, W]
    return frames.contiguous(), labels.to(device, non_blocking=True)

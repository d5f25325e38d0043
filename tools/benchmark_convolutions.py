"""The convolutions of SMA's branches in tools/benchmark.py: one by one against the shared transform, by size."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.fast.convolution import applies, branch_convolutions, estimate
from tools.benchmark_model import alternate, convolutions, seconds_of

__all__ = ["benchmark_convolutions"]

KERNELS = (1, 3, 5, 7)
# T, C, H, W of SMA in the networks of this repository, from the largest map to the smallest, and some in between.
SIZES = (
    (16, 128, 64, 64),
    (16, 256, 32, 32),
    (14, 128, 90, 120),
    (6, 64, 56, 56),
    (6, 128, 28, 28),
    (6, 256, 14, 14),
    (6, 512, 7, 7),
    (16, 64, 32, 32),
    (16, 32, 32, 32),
    (16, 128, 16, 16),
    (16, 64, 16, 16),
    (16, 32, 16, 16),
    (16, 64, 8, 8),
    (4, 128, 32, 32),
    (10, 16, 64, 64),
)


def benchmark_convolutions(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The branches' convolutions directly and by their shared transform, with the choice that SMA makes: a CPU."""
    if args.threads:
        torch.set_num_threads(args.threads)
    return [_row(T, C, H, W, args.runs) for T, C, H, W in SIZES]


def _row(T: int, C: int, H: int, W: int, runs: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, C, H, W, generator=generator).requires_grad_()
    weights = [(torch.randn(C, C, k, k, generator=generator) / k / C**0.5).requires_grad_() for k in KERNELS]
    biases = [torch.zeros(C, requires_grad=True) for _ in KERNELS]
    grads = [torch.randn(T, C, H, W, generator=generator) for _ in KERNELS]

    def direct() -> tuple[Tensor, ...]:
        pairs = zip(weights, biases, strict=True)
        return tuple(nn.functional.conv2d(x, w, b, padding=w.shape[-1] // 2) for w, b in pairs)

    def shared() -> tuple[Tensor, ...]:
        return branch_convolutions(x, weights, biases)

    def training(form: Callable[[], tuple[Tensor, ...]]) -> float:
        return seconds_of(lambda: torch.autograd.grad(form(), [x, *weights, *biases], grads), x.device)

    def evaluation(form: Callable[[], tuple[Tensor, ...]]) -> float:
        with torch.inference_mode():
            return seconds_of(form, x.device)

    def medians(a_pass: Callable[..., float]) -> tuple[float, float]:
        seconds = alternate({"direct": partial(a_pass, direct), "shared": partial(a_pass, shared)}, runs)
        return statistics.median(seconds["direct"]), statistics.median(seconds["shared"])

    (direct_training, shared_training), (direct_evaluation, shared_evaluation) = medians(training), medians(evaluation)
    with convolutions("SMA"):
        chosen = "shared" if applies(x.detach(), weights, T) else "direct"
    return {
        "T, C, H, W": f"{T}, {C}, {H}, {W}",
        "direct, training": direct_training,
        "shared, training": shared_training,
        "ratio": shared_training / direct_training,
        "estimate": estimate(KERNELS, T, C, H, W),
        "ratio in evaluation": shared_evaluation / direct_evaluation,
        "chosen": chosen,
    }

"""Where the time of a network goes, in tools/benchmark.py: the share of every part."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tools.benchmark_model import setting_of, steps_of

__all__ = ["benchmark_parts"]

# Of an operation, or of the outermost that it is a part of: a word in its name (in this order), and the part.
PARTS = {
    "_SharedTransform": "convolutions of the branches",
    "_NormalizeAndFire": "BatchNorm and neurons",
    "_WeightedSum": "weighted sum and AZO",
    "onvolution": "other convolutions, and those of the branches that are direct",
    "_LIFSequence": "other neurons",
    "atch_norm": "other BatchNorm",
    "atchNorm": "other BatchNorm",
    "ool": "pooling",
    "ddmm": "linear layers",
}


def benchmark_parts(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Where the time of SMA's training step and evaluation goes, by torch's profiler: one thread of a CPU."""
    torch.set_num_threads(1)  # the profiler does not look into the threads of the shared transform
    for name in args.net:
        steps, _, _ = steps_of(name, "SMA", setting_of(name, args, torch.device("cpu")))
        for kind, step in steps.items():
            step()
            with profile(activities=[ProfilerActivity.CPU]) as found:
                step()
            seconds: Counter[str] = Counter()
            for event in found.events():
                seconds[_part(event)] += event.self_cpu_time_total / 1e6
            total = sum(seconds.values())
            yield [
                {"subject": name, "pass": kind, "part": part, "seconds": value, "share": value / total}
                for part, value in seconds.most_common()
            ]


def _part(event: Any) -> str:
    name, outermost = event.name, event
    while outermost.cpu_parent is not None:
        outermost = outermost.cpu_parent
        name = outermost.name if any(word in outermost.name for word in PARTS) else name
    part = next((part for word, part in PARTS.items() if word in name), "the rest")
    if part == PARTS["_SharedTransform"]:
        return f"{part}: {'products' if 'bmm' in event.name else 'transforms'}"
    return part

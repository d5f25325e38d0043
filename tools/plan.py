"""What a training will need, before you launch it: parameters, operations, memory, exchange, least time. No GPU needed.

    python tools/plan.py vgg8_dvs128_SMA.py -b 9 --amp fp16 --gpu-memory 24
    python tools/plan.py train_amp.py -net resnet18 -b 256 --gpus 4 --gpu-memory 24 --peak 165
    python tools/plan.py vgg8_dvs128_SMA.py --device cpu -b 1       the way a CPU goes

Memory is counted on shapes alone: every tensor that a step allocates, in blocks of 512 bytes. Unknown are what CUDA and
its libraries take (context, workspaces of convolutions) and what the allocator cannot use: a tenth of the card is left
for that. Times are those of direct convolutions at the peak rate. Real ones are usually longer; a library that
transforms 3x3 convolutions (Winograd) needs fewer operations and can be below.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

if not __package__:  # run as a file: the modules of the repository are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools._memory import Step, step_of
from utils.analysis.tables import markdown_table
from utils.args import above_zero, whole
from utils.engine import AMP_DTYPES
from utils.errors import SentenceParser, UserError, exit_with_sentence
from utils.event_args import parse_event_args
from utils.image_args import batch_of_process, parse_image_args
from utils.prepare.datasets import DATA_SETS

__all__ = ["Task", "main", "task_of"]

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
IMAGENET = 1_281_167  # training images
FREE = 0.1  # of a card, for what is unknown
# By the script's data set, as the script makes it; momentum and moments are what needs memory.
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "dvs128": torch.optim.AdamW,
    "cifar10dvs": torch.optim.Adam,
    "ncaltech101": torch.optim.NAdam,
    "imagenet": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}
SAMPLES = {"dvs128": 1176, "cifar10dvs": 9000, "ncaltech101": 7838}  # N-Caltech101: about


@dataclasses.dataclass(frozen=True)
class Task:
    """A training, as its script would run it."""

    data_set: str
    make: Callable[[], torch.nn.Module]
    amp: str
    device: str
    batch: int  # of a process
    parts: int  # in which a process computes its batch
    input: tuple[int, ...]  # of one sample: [T, 2, H, W] or [3, H, W]
    recompute: bool

    def shape(self, samples: int) -> tuple[int, ...]:
        """Of the input of the network."""
        T_or_channels, *rest = self.input
        return (T_or_channels, samples, *rest) if len(self.input) == 4 else (samples, *self.input)

    def step(self, samples: int, neurons: str, recompute: bool) -> Step:
        """A step of so many samples at once."""
        amp, optimizer = AMP_DTYPES[self.amp], OPTIMIZERS[self.data_set]
        return step_of(self.make, optimizer, self.shape(samples), amp, self.device, neurons, recompute)


def task_of(script: Path, flags: list[str], processes: int) -> Task:
    """The training that ``python <script> <flags>`` runs in every process.

    Raises:
        UserError: there is no such script, or it refuses its flags.
    """
    path = script if script.exists() else ROOT / script
    if not path.exists():
        raise UserError(
            f"there is no script {script}; use one of {', '.join(sorted(p.name for p in ROOT.glob('*.py')))}"
        )
    module = _load(path)
    if not hasattr(module, "build_model"):
        raise UserError(f"{script} is not a training script; use vgg8_dvs128_SMA.py or another with a recipe")
    flags = flags if "--device" in flags else ["--device", "cuda", *flags]
    if hasattr(module, "DATA_SET"):
        args = parse_event_args(module.SETTINGS, module.__doc__, module.DATA_SET, flags)
        data_set, classes = module.DATA_SET, DATA_SETS[module.DATA_SET].num_classes
        size = args.frame_size or args.sensor_size or DATA_SETS[module.DATA_SET].sensor
        batch, sample = args.batch_size, (args.timesteps, 2, *size)
    else:
        args = parse_image_args(module.SETTINGS, module.__doc__, flags)
        data_set, classes = "imagenet", 1000
        batch, sample = batch_of_process(args, processes), (3, args.image_size, args.image_size)
    made = partial(module.build_model, args, classes)
    device = "cpu" if args.device == "cpu" else "cuda"
    return Task(data_set, made, args.amp, device, batch, args.micro_batches, sample, args.recompute)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def largest_batch(peaks: dict[int, int], room: float) -> int:
    """The most samples that fit, from the peaks of two numbers of them: the peak is a line. 0: not even one fits."""
    (few, low), (many, high) = sorted(peaks.items())
    return max(0, int(few + (room - low) * (many - few) // max(1, high - low)))


def make_parser() -> SentenceParser:
    """The parser of this tool's own flags; those of the script follow in any order."""
    parser = SentenceParser(description=__doc__)
    add = parser.add_argument
    add("script", type=Path, help="one of the four training scripts; its own flags may follow")
    add("--gpu-memory", type=above_zero, default=24.0, metavar="GIB", help="of one card (default: 24)")
    add("--gpus", type=whole(1), metavar="N", help="cards of one machine (default: as published)")
    add("--machines", type=whole(1), default=1, metavar="N", help="machines (default: 1)")
    add("--peak", type=above_zero, default=71.0, metavar="TFLOPS", help="peak rate of a card (default: 71)")
    add("--bandwidth", type=above_zero, default=12.0, metavar="GB", help="per second between cards (default: 12)")
    add("--network", type=above_zero, default=1.25, metavar="GB", help="per second between machines (default: 1.25)")
    add("--neurons", choices=("triton", "torch"), default="triton", help="what runs the neurons (default: triton)")
    return parser


def main() -> None:
    """Print the plan."""
    args, flags = make_parser().parse_known_args()
    cards = args.gpus or (6 if args.script.name == "train_amp.py" else 4)
    processes = cards * args.machines
    task = task_of(args.script, flags, processes)
    at_once = -(-task.batch // task.parts)
    step = task.step(at_once, args.neurons, task.recompute)
    print(_plan(task, step, at_once, args, cards, processes))


def _plan(task: Task, step: Step, at_once: int, args: argparse.Namespace, cards: int, processes: int) -> str:
    parameters = step.weights / 4
    weights = step.weights / 1e9
    # A ring: every process sends and receives 2 (n - 1) / n of the gradients; between machines all cards share a line.
    sent = 2 * (processes - 1) / processes * weights
    slowest = args.bandwidth if args.machines == 1 else min(args.bandwidth, args.network / cards)
    exchange = sent / slowest if processes > 1 else 0.0
    compute = step.operations * task.parts / (args.peak * 1e12)
    together = task.batch * processes
    # The event scripts leave out a last, smaller batch.
    steps = -(-IMAGENET // together) if task.data_set == "imagenet" else SAMPLES[task.data_set] // together
    parts = f", in {task.parts} parts of {at_once}" if task.parts > 1 else ""
    buckets = step.weights if processes > 1 else 0  # the copies of the gradients that DDP exchanges
    lines = [
        f"{task.batch} samples a process{parts}, {processes} process(es), precision {task.amp}",
        f"parameters              {parameters / 1e6:.3f} M",
        f"operations of a step    {step.operations * task.parts / 1e12:.3g} T in convolutions and linear layers, "
        "forward and backward",
        f"exchanged a step        {sent:.3g} GB each way in every process" if processes > 1 else
        "exchanged a step        nothing",
        f"an epoch                {steps} steps; {_time(steps * max(compute, exchange))} at the peak rate: "
        f"{1000 * compute:.3g} ms of operations at {args.peak:g} TFLOP/s, with {1000 * exchange:.3g} ms of exchange "
        f"at {slowest:.3g} GB/s in parallel",
        "",
        "Memory at the peak of a step, GiB:",
        "",
        markdown_table(
            [
                ["part", "GiB"],
                *([part, f"{size / GIB:.2f}"] for part, size in _parts_of(step, buckets).items()),
                ["workspaces, CUDA", "unknown"],
            ]
        ),
        "",
    ]  # fmt: skip
    if task.device == "cuda":
        room = (1 - FREE) * args.gpu_memory * GIB
        rows = [["SMA", f"GiB for {at_once}", f"samples at once in {args.gpu_memory:g} GiB"]]
        for recompute in (False, True):
            known = {at_once: step} if recompute == task.recompute else {}
            peaks = {n: (known.get(n) or task.step(n, args.neurons, recompute)).peak + buckets
                     for n in (at_once, 2 * at_once)}  # fmt: skip
            most = largest_batch(peaks, room)
            found = str(most) if most else "does not fit"
            rows.append(["recomputed" if recompute else "kept", f"{peaks[at_once] / GIB:.2f}", found])
        lines += [markdown_table(rows), "", "A larger batch fits in parts of so many samples (--micro-batches)."]
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _parts_of(step: Step, buckets: int) -> dict[str, int]:
    named = {
        "weights and buffers": step.weights + step.buffers,
        "gradients": step.gradients,
        "optimiser": step.optimizer,
        "exchange of gradients": buckets,
        "input": step.input,
        "activations and passing": step.activations,
    }
    return {**{part: size for part, size in named.items() if size}, "peak": step.peak + buckets}


if __name__ == "__main__":
    exit_with_sentence(main)

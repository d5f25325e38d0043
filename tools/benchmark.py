"""Time the parts of a training: each against a baseline, in alternating runs of one process.

    python tools/benchmark.py model -net resnet18 --image-size 64 -T 2 -b 8     a CPU
    python tools/benchmark.py model --amp fp16 -b 0                             a GPU: the largest batch that fits
    python tools/benchmark.py images                                            decoding and augmentation, one core
    python tools/benchmark.py data                                              event frames, one core

Every figure is a median over the runs with the spread beside it; a ratio compares medians of the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

if not __package__:  # run as a file: the modules of the repository are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import ms_resnet18, ms_resnet34, ms_resnet104, sma_ms_resnet18, sma_ms_resnet34, sma_ms_resnet104
from models.neurons import Rectangle, reset_net, select_backend, spikingjelly_version
from tools.benchmark_data import add_data_arguments, benchmark_data
from utils.args import whole
from utils.demo_images import PATTERNS, render_picture
from utils.engine import AMP_DTYPES
from utils.errors import SentenceParser, UserError, exit_with_sentence, user_input
from utils.image_args import NETS
from utils.images import DECODERS, load_image_data, to_channels_last

__all__ = ["PublishedNeuron", "make_parser", "with_published_neurons"]

FACTORIES = {
    "resnet18": (sma_ms_resnet18, ms_resnet18),
    "resnet34": (sma_ms_resnet34, ms_resnet34),
    "resnet104": (sma_ms_resnet104, ms_resnet104),
}
TYPICAL_SIZE = (500, 375)  # pixels of a usual ImageNet photograph
MOST_IMAGES = 4096


class PublishedNeuron(nn.Module):
    """The baseline: the neuron of ImageNet as a Python loop over the steps, all of it recorded by autograd.

    ``u_t = 0.25 u_{t-1} (1 - s_{t-1}) + x_t``, ``s_t = [u_t >= 0.5]``; written from the equation.
    """

    def __init__(self):
        super().__init__()
        self.spike = Rectangle()

    def forward(self, x: Tensor) -> Tensor:
        u = s = torch.zeros_like(x[0])
        spikes = []
        for step in x:
            u = 0.25 * u * (1 - s.detach()) + step
            s = self.spike(u - 0.5)
            spikes.append(s)
        return torch.stack(spikes)


def with_published_neurons(net: nn.Module) -> nn.Module:
    """Put :class:`PublishedNeuron` in the place of every neuron of a network of ImageNet."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "v_threshold"):
                setattr(module, name, PublishedNeuron())
    return net


def alternate(tasks: dict[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """Run every task in turn, ``runs`` times, after one run that does not count; the values that they return."""
    for task in tasks.values():
        task()
    values: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(runs):
        for name, task in tasks.items():
            values[name].append(task())
    return values


def seconds_of(step: Callable[[], None], device: torch.device) -> float:
    """Wall time of a step, until the device has finished it."""
    _wait(device)
    began = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Networks of ImageNet -----------------------------------------------------------------------------------------------


def benchmark_model(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Training step and evaluation of the networks, with SMA and without, against the published neuron."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.batch_size == 0 and device.type != "cuda":
        raise UserError("-b 0 looks for the largest batch that fits on a GPU, and the device is a CPU; give a number")
    rows = []
    for name in args.net:
        sma, plain = FACTORIES[name]
        for title, factory in ((f"SMA-{name}", sma), (name, plain)):
            with user_input():
                nets = {
                    "ours": factory(T=args.timesteps),
                    "published neuron": with_published_neurons(factory(T=args.timesteps)),
                }
            backend = select_backend(nets["ours"], "auto", device)
            rows += _time_networks(title, nets, backend, args, device)
    return rows


def _time_networks(
    title: str, nets: dict[str, nn.Module], backend: str, args: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    for net in nets.values():
        net.to(device)
        if args.channels_last:
            to_channels_last(net)
    batch = args.batch_size or min(_largest_batch(net, args, device) for net in nets.values())
    rows = []
    for kind in ("training", "evaluation"):
        tasks = {name: _step(net, batch, kind, args, device) for name, net in nets.items()}
        peaks = {name: _peak(task, device) for name, task in tasks.items()}
        seconds = alternate({n: lambda task=task: seconds_of(task, device) for n, task in tasks.items()}, args.runs)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        rows += [
            {
                "network": title,
                "pass": kind,
                "neuron": backend if name == "ours" else name,
                "batch": batch,
                "images/s": batch / medians[name],
                "seconds": medians[name],
                "from": min(seconds[name]),
                "to": max(seconds[name]),
                "speed-up": medians["published neuron"] / medians[name],
                "peak GiB": peaks[name],
            }
            for name in nets
        ]
    return rows


def _step(net: nn.Module, batch: int, kind: str, args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    images = torch.randn(batch, 3, args.image_size, args.image_size, device=device)
    if args.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    dtype = AMP_DTYPES[args.amp]
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    def training() -> None:
        net.train()
        net.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            logits = net(images)
        scaler.scale(logits.float().logsumexp(1).mean()).backward()
        reset_net(net)

    def evaluation() -> None:
        net.eval()
        with torch.inference_mode():
            net(images)
        reset_net(net)

    return training if kind == "training" else evaluation


def _peak(step: Callable[[], None], device: torch.device) -> float | None:
    """Peak memory of a step in GiB; None on a CPU, where torch does not count it."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    _wait(device)
    return torch.cuda.max_memory_allocated(device) / 2**30


def _largest_batch(net: nn.Module, args: argparse.Namespace, device: torch.device) -> int:
    """The largest power of two whose training step fits into the memory of the GPU."""
    batch = 1
    while batch < MOST_IMAGES:
        try:
            _step(net, 2 * batch, "training", args, device)()
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            net.zero_grad(set_to_none=True)
            reset_net(net)
            torch.cuda.empty_cache()
        batch *= 2
    return batch


# Reading images -----------------------------------------------------------------------------------------------------


def benchmark_images(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Training samples per second of one core, by decoder, against the usual torchvision pipeline to floats."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.data_dir or _write_photographs(Path(scratch), args.count)
        sets = {}
        for decoder in DECODERS:
            try:
                sets[decoder] = load_image_data(folder, args.image_size, decoder=decoder).train
            except UserError as error:
                if decoder == "pil":
                    raise
                print(error, file=sys.stderr)
        size = len(sets["pil"])
        count = min(args.count, size)
        chosen = range(0, count * (size // count), size // count)  # of all classes
        sets = {"standard": ImageFolder(folder / "train", _standard_transform(args.image_size)), **sets}

        def read(data: torch.utils.data.Dataset) -> float:
            began = time.process_time()
            for index in chosen:
                _ = data[index]
            return time.process_time() - began

        seconds = alternate({name: lambda data=data: read(data) for name, data in sets.items()}, args.runs)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "path": name,
            "crop": args.image_size,
            "images": count,
            "images/s and core": count / medians[name],
            "from": count / max(seconds[name]),
            "to": count / min(seconds[name]),
            "speed-up": medians["standard"] / medians[name],
        }
        for name in sets
    ]


def _standard_transform(size: int) -> Callable:
    """The published augmentation as it is usually written: every sample a float tensor, normalised by the worker."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.AutoAugment(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def _write_photographs(root: Path, count: int) -> Path:
    """JPEGs of the usual size: the demo's patterns, enlarged, with the grain of a photograph."""
    rng = np.random.default_rng(0)
    for number in range(count + 1):
        label = number % len(PATTERNS)
        small = Image.fromarray(render_picture(label, number // len(PATTERNS)))
        pixels = np.asarray(small.resize(TYPICAL_SIZE, Image.Resampling.BICUBIC), np.float32)
        pixels = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        for part in ("train", "test") if number < len(PATTERNS) else ("train",):
            folder = root / part / PATTERNS[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number:05}.jpg", quality=90)
    return root


# Printing -----------------------------------------------------------------------------------------------------------


def _table(rows: list[dict[str, Any]]) -> str:
    def words(value: Any) -> str:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([words(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _machine(device: str | None) -> dict[str, str]:
    on_gpu = torch.cuda.is_available() and (device or "cuda").startswith("cuda")
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    return {
        "machine": torch.cuda.get_device_name() if on_gpu else f"{cpu}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "spikingjelly": spikingjelly_version(),
    }


def make_parser() -> argparse.ArgumentParser:
    """The parser of this tool's command line."""
    parser = SentenceParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model", help=benchmark_model.__doc__)
    model.add_argument("-net", "--net", nargs="+", choices=NETS, default=list(NETS), help="default: all three")
    model.add_argument(
        "-b", "--batch-size", type=whole(0), default=32, metavar="N", help="0: the largest that fits a GPU"
    )
    model.add_argument("-T", "--timesteps", type=whole(1), default=6, metavar="T", help="default: 6")
    model.add_argument("--image-size", type=whole(32), default=224, metavar="N", help="pixels; default: 224")
    model.add_argument("--amp", choices=AMP_DTYPES, default="off", help="of the training step; default: off")
    model.add_argument("--channels-last", action="store_true", help="memory layout of the images")
    model.add_argument("--device", metavar="NAME", help="cpu or cuda; default: a GPU where there is one")
    images = commands.add_parser("images", help=benchmark_images.__doc__)
    images.add_argument("--data-dir", type=Path, metavar="DIR", help="photographs; default: generated ones")
    images.add_argument("--image-size", type=whole(32), default=224, metavar="N", help="crop in pixels; default: 224")
    images.add_argument("--count", type=whole(1), default=200, metavar="N", help="images in a run; default: 200")
    data = commands.add_parser("data", help=benchmark_data.__doc__)
    add_data_arguments(data)
    for command in (model, images, data):
        command.add_argument("--runs", type=whole(1), default=5, metavar="N", help="of each task; default: 5")
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser


def main() -> None:
    """Run one benchmark and print its table."""
    args = make_parser().parse_args()
    benchmarks = {"model": benchmark_model, "images": benchmark_images, "data": benchmark_data}
    rows = benchmarks[args.command](args)
    machine = _machine(getattr(args, "device", "cpu"))
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(_table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps({**machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    exit_with_sentence(main)

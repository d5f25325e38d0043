"""Time the parts of a training: each against a baseline, in alternating runs of one process.

    python tools/benchmark.py model                            a CPU: SMA-VGG8 of DVS128 Gesture, one sample
    python tools/benchmark.py model --amp fp16 -net block dvs128 cifar10dvs ncaltech101 --runs 10    all rows of a GPU
    python tools/benchmark.py model -net resnet18 --image-size 64 -T 2 -b 8
    python tools/benchmark.py convolutions --threads 1         where the branches of SMA share one transform: a CPU
    python tools/benchmark.py parts                            where the time goes: a CPU
    python tools/benchmark.py scaling                          one and two processes
    python tools/benchmark.py images                           decoding and augmentation, one core
    python tools/benchmark.py data                             event frames, one core

Every figure is a median over the runs with the spread beside it; a ratio compares medians of the same run.
"""

from __future__ import annotations

import argparse
import json
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
from torchvision import transforms
from torchvision.datasets import ImageFolder

if not __package__:  # run as a file: the modules of the repository are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.benchmark_convolutions import benchmark_convolutions
from tools.benchmark_data import add_data_arguments, benchmark_data
from tools.benchmark_model import FORMS, SUBJECTS, alternate, benchmark_model, benchmark_scaling
from tools.benchmark_parts import benchmark_parts
from utils.analysis.tables import markdown_table
from utils.args import whole
from utils.data.demo_images import PATTERNS, render_picture
from utils.data.images import DECODERS, load_image_data
from utils.engine import AMP_DTYPES
from utils.errors import SentenceParser, UserError, exit_with_sentence
from utils.files import write_text
from utils.versions import machine, versions

__all__ = ["make_parser"]

TYPICAL_SIZE = (500, 375)  # pixels of a usual ImageNet photograph


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

    return markdown_table([list(rows[0]), *([words(value) for value in row.values()] for row in rows)])


def make_parser() -> argparse.ArgumentParser:
    """The parser of this tool's command line."""
    parser = SentenceParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model", help=benchmark_model.__doc__)
    convolutions = commands.add_parser("convolutions", help=benchmark_convolutions.__doc__)
    parts = commands.add_parser("parts", help=benchmark_parts.__doc__)
    scaling = commands.add_parser("scaling", help=benchmark_scaling.__doc__)
    model.add_argument(
        "--forms", nargs="+", choices=FORMS, metavar="FORM",
        help=f"next to SMA, of {', '.join(FORMS)}; default: all but the last",
    )  # fmt: skip
    model.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=True,
                       help="on a GPU, float32 convolutions may use TF32; default: on, as torch has it")  # fmt: skip
    for command in (model, convolutions):
        command.add_argument("--threads", type=whole(1), metavar="N", help="of a CPU; default: as torch has it")
    for command, size in ((model, None), (parts, None), (scaling, 64)):
        command.add_argument("-net", "--net", nargs="+", choices=SUBJECTS, default=["dvs128"], help="default: dvs128")
        command.add_argument("-b", "--batch-size", type=whole(0), metavar="N",
                             help="default: 1 on a CPU, the recipe's on a GPU; 0: the largest that fits")  # fmt: skip
        command.add_argument("-T", "--timesteps", type=whole(1), metavar="T", help="default: the recipe's")
        command.add_argument("--image-size", type=whole(32), default=size, metavar="N",
                             help=f"pixels; default: {size or 'that of the recipe'}")  # fmt: skip
        command.add_argument("--amp", choices=AMP_DTYPES, default="off", help="of the training step; default: off")
        command.add_argument("--channels-last", action="store_true", help="memory layout of images")
        command.add_argument("--device", metavar="NAME", help="cpu or cuda; default: a GPU where there is one")
    images = commands.add_parser("images", help=benchmark_images.__doc__)
    images.add_argument("--data-dir", type=Path, metavar="DIR", help="photographs; default: generated ones")
    images.add_argument("--image-size", type=whole(32), default=224, metavar="N", help="crop in pixels; default: 224")
    images.add_argument("--count", type=whole(1), default=200, metavar="N", help="images in a run; default: 200")
    data = commands.add_parser("data", help=benchmark_data.__doc__)
    add_data_arguments(data)
    for command in (model, convolutions, scaling, images, data):
        command.add_argument("--runs", type=whole(1), default=3, metavar="N", help="of each task; default: 3")
    for command in commands.choices.values():
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser


def main() -> None:
    """Run one benchmark and print its table."""
    args = make_parser().parse_args()
    benchmarks = {
        "model": benchmark_model,
        "convolutions": benchmark_convolutions,
        "parts": benchmark_parts,
        "scaling": benchmark_scaling,
        "images": benchmark_images,
        "data": benchmark_data,
    }
    on_gpu = torch.cuda.is_available() and (getattr(args, "device", "cpu") or "cuda").startswith("cuda")
    made = {"machine": machine(torch.device("cuda" if on_gpu else "cpu")), **versions()}
    print(", ".join(f"{name} {value}" for name, value in made.items()))
    sys.stdout.flush()
    rows: list[dict[str, Any]] = []
    found = benchmarks[args.command](args)
    for some in [found] if isinstance(found, list) else found:  # each table as it comes
        rows += some
        print(f"{_table(some)}\n", flush=True)
    if args.json is not None:
        write_text(args.json, json.dumps({**made, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    exit_with_sentence(main)

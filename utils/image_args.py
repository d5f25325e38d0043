"""Command line of train_amp.py, with the published spellings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.ms_resnet import SMA_PLACES
from utils.args import (
    COMMON,
    ScriptParser,
    above_zero,
    add_accumulate,
    add_azo,
    add_branches,
    add_run,
    complete,
    not_negative,
    settings_of,
    told_by_weights,
    whole,
)
from utils.checkpoint import describe_ms_resnet
from utils.data.images import DECODERS
from utils.errors import UserError

__all__ = ["batch_of_process", "deviations", "image_parser", "parse_image_args", "recipe_of"]

NETS = ("resnet18", "resnet34", "resnet104")

_COMMON: dict[str, Any] = {
    **COMMON,
    "sma_blocks": "first-two",
    "AZO": False,
    "test_crop": None,
    "decoder": "pil",
    "on_bad_image": "stop",
    "mixup": False,
    "ema": 0.0,
    "warm_up": 0,
    "channels_last": False,
    "gpu": False,
}

_RECIPE_FIELDS = (
    "demo", "net", "timesteps", "width", "sma_blocks", "branch_groups", "AZO", "RCR", "RTR", "image_size", "test_crop",
    "decoder", "batch_size", "accumulate", "epochs", "lr", "warm_up", "weight_decay", "label_smoothing", "mixup", "ema",
    "amp", "eval_amp", "seed", "weights",
)  # fmt: skip

_EVALUATION_FIELDS = ("demo", "timesteps", "width", "sma_blocks", "branch_groups", "test_crop", "decoder")

# What a weights file of this project tells of the input that it was trained on. T shows in the weights of SMA only.
INPUT_FIELDS = ("timesteps", "image_size", "test_crop", "demo")

_FLAGS = {"net": "-net"}


def parse_image_args(
    description: str, recipe: dict[str, Any], demo: dict[str, Any], argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse the command line of train_amp.py.

    Args:
        description: the script's docstring, shown by ``--help``.
        recipe: the published settings.
        demo: what ``--demo`` changes.

    Raises:
        UserError: arguments contradict each other or the weights file.
    """
    given = vars(image_parser(description, recipe).parse_args(argv))
    told = told_by_weights(given, describe_ms_resnet, INPUT_FIELDS, _FLAGS)
    if "image_size" in given:
        told.pop("test_crop", None)
    demo = demo if given.get("demo", told.get("demo")) else {}
    args = argparse.Namespace(**{**_COMMON, **recipe, **demo, **told, **given})
    args.test_crop = args.test_crop or args.image_size
    if args.ema >= 1:
        raise UserError(f"--ema {args.ema:g} must be 0 (off) or a decay below 1, for instance 0.9999")
    if args.warm_up >= args.epochs:
        raise UserError(f"--warm-up {args.warm_up} must be less than the {args.epochs} epochs of --epochs")
    if args.gpu:
        if not (args.device or "cuda").startswith("cuda"):
            raise UserError(f"-gpu asks for a GPU and --device {args.device} for none; leave out one of them")
        args.device = args.device or "cuda"
    complete(args, "imagenet", f"imagenet_{args.net}")
    return args


def batch_of_process(args: argparse.Namespace, processes: int) -> int:
    """Images of one process in one step; ``--batch-size`` is of all of them.

    An evaluation counts every image once with any batch, so there it need not come out even.

    Raises:
        UserError: the batch of a training step cannot be shared out evenly.
    """
    if args.evaluate:
        return max(1, args.batch_size // processes)
    parts = processes * args.accumulate
    if args.batch_size % parts:
        below, above = args.batch_size // parts * parts, (args.batch_size // parts + 1) * parts
        use = f"{below} or {above}" if below else f"at least {above}"
        shared = f"{processes} process(es)" + (f" in {args.accumulate} parts" if args.accumulate > 1 else "")
        raise UserError(f"--batch-size {args.batch_size} cannot be shared out evenly to {shared}; use {use}")
    return args.batch_size // processes


def recipe_of(args: argparse.Namespace, images: str) -> dict[str, Any]:
    """Everything that a result depends on, in plain values: a checkpoint is continued only where it agrees.

    Args:
        images: the fingerprint of the images.
    """
    return {**settings_of(args, _RECIPE_FIELDS), "images": images}


def deviations(args: argparse.Namespace, recipe: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings (for an evaluation: of data and network) that differ from the recipe: name to (published, used)."""
    published = {**_COMMON, "amp": "fp16", **recipe, "net": args.net, "test_crop": recipe["image_size"]}
    used = settings_of(args, _EVALUATION_FIELDS if args.evaluate else _RECIPE_FIELDS)
    return {name: (published[name], value) for name, value in used.items() if value != published[name]}


def image_parser(description: str, recipe: dict[str, Any]) -> ScriptParser:
    """The parser of train_amp.py; its defaults, told in the help, are those of ``recipe``."""
    parser = ScriptParser(description)
    switch = argparse.BooleanOptionalAction
    add = parser.group("data")
    add("--demo", action="store_true", help="train on built-in pictures: small settings, no download")
    add("--data-dir", type=Path, metavar="DIR", help="holds train/ and test/ or val/", default="data/imagenet")
    add("--image-size", type=whole(32), metavar="N", help="side of the crops, pixels", default=recipe["image_size"])
    add("--test-crop", type=whole(32), metavar="N", help="of an image of 256/224 times that", default="--image-size")
    add("--decoder", choices=DECODERS, help="torchcodec is faster; same augmentation", default="pil")
    add("--on-bad-image", choices=("stop", "skip"), help="unreadable training images", default="stop")

    add = parser.group("network")
    add("-net", "--net", choices=NETS, help="depth", default=recipe["net"])
    add("-T", "--timesteps", type=whole(1), metavar="T", help="repeats of the image", default=recipe["timesteps"])
    add("--sma-blocks", choices=SMA_PLACES, help="of each stage: blocks with SMA", default="first-two")
    add_branches(add)
    add_azo(add, recipe, default=False)
    add("--width", type=above_zero, metavar="X", help="multiplies the channels of all layers", default=1.0)

    add = parser.group("training")
    add("-b", "--batch-size", type=whole(1), metavar="N", help="of all processes together",
        default=recipe["batch_size"])  # fmt: skip
    add_accumulate(add)
    add("-N", "--epochs", "--epoch", dest="epochs", type=whole(1), metavar="N",
        help="epochs to train; in the last one the learning rate is 0", default=recipe["epochs"])  # fmt: skip
    add("-lr", "--lr", "--learning-rate", type=above_zero, metavar="X", help="learning rate", default=recipe["lr"])
    add(
        "--warm-up",
        type=whole(0),
        metavar="N",
        help="epochs of rising learning rate; the cosine takes the others",
        default="0: none",
    )
    add("--weight-decay", type=not_negative, metavar="X", help="of SGD", default=recipe["weight_decay"])
    add("--label-smoothing", type=not_negative, metavar="X", help="in training", default=recipe["label_smoothing"])
    add("--mixup", action=switch, help="Mixup 0.8 or CutMix 1.0 in every batch", default="off")
    add("--ema", type=not_negative, metavar="X", help="evaluate and save averaged weights, of this decay",
        default="0: off")  # fmt: skip
    add("--channels-last", action=switch, help="memory layout of the images", default="off")
    add("--amp", choices=("fp16", "bf16", "off"), help="mixed precision in training", default="fp16 on a GPU")
    add("--seed", type=whole(0), metavar="N", help="of weights, order, augmentation", default=recipe["seed"])

    add_run(parser, "imagenet_<net>")
    parser.add_argument("-gpu", action="store_true", help="insist on a GPU, as --device cuda")
    return parser

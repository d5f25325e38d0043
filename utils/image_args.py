"""Settings of train_amp.py, with the published spellings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from models.ms_resnet import SMA_PLACES
from utils.args import (
    RUN,
    TRAINING,
    Setting,
    Settings,
    above_zero,
    azo_settings,
    branch_settings,
    complete,
    fraction,
    micro_batches,
    not_negative,
    whole,
)
from utils.data.images import DECODERS
from utils.errors import UserError
from utils.networks import RESNETS

__all__ = ["TABLE", "batch_of_process", "image_settings", "parse_image_args"]

_switch = {"action": argparse.BooleanOptionalAction}
_data = partial(Setting, group="data")
_network = partial(Setting, group="network", depends="evaluation", stored=True)
_training = partial(Setting, group="training", depends="training")

TABLE = [
    _data("--demo", "train on built-in pictures: small settings, no download", False, shown="",
          parser={"action": "store_true"}, depends="evaluation", stored=True),
    _data("--data-dir", "holds train/ and test/ or val/", parse=Path, parser={"metavar": "DIR"},
          shown="data/imagenet"),
    _data("--image-size", "side of the crops, pixels", parse=whole(32, 4096), parser={"metavar": "N"},
          depends="training", stored=True),
    _data("--test-crop", "of an image of 256/224 times that", parse=whole(32, 4096), parser={"metavar": "N"},
          shown="--image-size", depends="evaluation", stored=True),
    _data("--decoder", "torchcodec is faster; same augmentation", "pil", parser={"choices": DECODERS},
          depends="evaluation"),
    _data("--on-bad-image", "unreadable training images", "stop", parser={"choices": ("stop", "skip")}),
    _network("-net --net", "depth", parser={"choices": tuple(RESNETS)}),
    _network("-T --timesteps", "repeats of the image", parse=whole(1, 1000), parser={"metavar": "T"}),
    _network("--sma-blocks", "of each stage: blocks with SMA", "first-two", parser={"choices": SMA_PLACES}),
    _network("--width", "multiplies the channels of all layers", 1.0, parse=above_zero, parser={"metavar": "X"}),
    *azo_settings(default=False),
    *branch_settings(),
    _training("-b --batch-size", "of all processes together", parse=whole(1), parser={"metavar": "N"}),
    micro_batches(),
    _training("-N --epoch --epochs", "epochs to train; in the last one the learning rate is 0", parse=whole(1),
              parser={"metavar": "N"}),
    _training("-lr --learning-rate --lr", "learning rate", parse=above_zero, parser={"metavar": "X"}),
    _training("--warm-up", "epochs of rising learning rate; the cosine takes the others", 0, parse=whole(0),
              parser={"metavar": "N"}, shown="0: none"),
    _training("--weight-decay", "of SGD", parse=not_negative, parser={"metavar": "X"}),
    _training("--label-smoothing", "in training", parse=fraction, parser={"metavar": "X"}),
    _training("--mixup", "Mixup 0.8 or CutMix 1.0 in every batch", False, parser=_switch),
    _training("--ema", "evaluate and save averaged weights, of this decay", 0.0, parse=fraction,
              parser={"metavar": "X"}, shown="0: off"),
    Setting("--channels-last", "memory layout of the images", False, group="training", parser=_switch),
    *TRAINING,
    *RUN,
    Setting("-gpu", "insist on a GPU, as --device cuda", False, parser={"action": "store_true"}, shown=""),
]  # fmt: skip


def image_settings(recipe: Mapping[str, Any], demo: Mapping[str, Any]) -> Settings:
    """The settings of train_amp.py. No depth is a deviation: the published script has all three."""
    return Settings(TABLE, recipe, demo, "ms_resnet", {"amp": "fp16"})


def parse_image_args(
    settings: Settings, description: str | None, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse the command line of train_amp.py.

    Args:
        settings: of the script.
        description: the script's docstring, shown by ``--help``.
        argv: the arguments; those of the process where it is None.

    Raises:
        UserError: arguments contradict each other or the weights file.
    """
    args = settings.parse(description, argv)
    settings.published["net"] = args.net
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
    parts = processes * args.micro_batches
    if args.batch_size % parts:
        below, above = args.batch_size // parts * parts, (args.batch_size // parts + 1) * parts
        use = f"{below} or {above}" if below else f"at least {above}"
        shared = f"{processes} process(es)" + (f" in {args.micro_batches} parts" if args.micro_batches > 1 else "")
        raise UserError(f"--batch-size {args.batch_size} cannot be shared out evenly to {shared}; use {use}")
    return args.batch_size // processes

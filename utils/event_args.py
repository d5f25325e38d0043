"""Settings of the event scripts, with the published spellings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from utils.args import (
    RUN,
    TRAINING,
    Setting,
    Settings,
    above_zero,
    azo_settings,
    branch_settings,
    complete,
    micro_batches,
    not_negative,
    size,
    whole,
)
from utils.errors import UserError

__all__ = ["TABLE", "event_settings", "parse_event_args"]


def _block(text: str) -> int | None:
    return None if text == "none" else whole(1, 5)(text)


class _Blocks(argparse.Action):
    """``none`` in the place of block numbers is no block."""

    def __call__(self, _parser: Any, namespace: argparse.Namespace, values: Any, _flag: str | None = None) -> None:
        setattr(namespace, self.dest, [value for value in values if value is not None])


_switch = {"action": argparse.BooleanOptionalAction}
_data = partial(Setting, group="data")
_network = partial(Setting, group="network", depends="evaluation", stored=True)
_training = partial(Setting, group="training", depends="training")

TABLE = [
    _data("--demo", "train on the built-in demo data: small settings, no download", False, shown="",
          parser={"action": "store_true"}, depends="evaluation", stored=True),
    _data("--data-dir", "folder of the data set", parse=Path, parser={"metavar": "DIR"}, shown="data/<data set>"),
    _data("--sensor-size", "size of another camera", parse=size(1), parser={"metavar": "HxW"}, shown="the data set's",
          depends="evaluation", stored=True),
    _data("--frame-size", "resize frames", parse=size(32), parser={"metavar": "N|HxW"}, shown="the sensor's size",
          depends="evaluation", stored=True),
    _data("--split", "train/test split", parser={"metavar": "random|first90|tebn|FILE"},
          shown="random 90/10 in each class", depends="evaluation", stored=True, in_recipe=True),
    _data("--split-seed", "of the random split", parse=whole(0), parser={"metavar": "N"}, depends="evaluation",
          stored=True, in_recipe=True),
    _data("--flip", "mirror half of the training samples", True, parser=_switch, depends="training", in_recipe=True),
    _data("--frames", "read packed frames, made once, or the files", "packed", parser={"choices": ("packed", "npz")}),
    _data("--on-bad-sample", "stop, or leave damaged samples out", "stop", parser={"choices": ("stop", "skip")}),
    _network("-T --timesteps", "frames per sample", parse=whole(1, 1000), parser={"metavar": "T"}),
    _network("--width", "multiplies the channels of all layers", 1.0, parse=above_zero, parser={"metavar": "X"}),
    _network("--sma-blocks", "blocks with SMA, or none", [2, 3], parse=_block,
             parser={"nargs": "*", "metavar": "N", "action": _Blocks}),
    _network("--branch-activation", "inside SMA", "lif", parser={"choices": ("lif", "relu")}),
    Setting("num_classes", group="network", stored=True),
    *azo_settings(default=True),
    *branch_settings(),
    _training("-b --batch-size", "samples per process", parse=whole(1), parser={"metavar": "N"}),
    micro_batches(),
    _training("-N --epoch --epochs", "epochs to train", parse=whole(1), parser={"metavar": "N"}),
    _training("--learning-rate --lr", "learning rate", parse=above_zero, parser={"metavar": "X"}),
    _training("--decay", "period of the cosine in epochs; after it the learning rate rises again", parse=whole(1),
              parser={"metavar": "N"}, shown="--epochs"),
    _training("--weight-decay", "of the optimiser", parse=not_negative, parser={"metavar": "X"}),
    _training("--momentum-decay", "of NAdam", parse=not_negative, parser={"metavar": "X"}, in_recipe=True),
    *TRAINING,
    *RUN,
]  # fmt: skip


def event_settings(recipe: Mapping[str, Any], demo: Mapping[str, Any]) -> Settings:
    """The settings of an event script."""
    return Settings(TABLE, recipe, demo, "vgg8", {"amp": "fp16", "decay": recipe["epochs"], "processes": 4})


def parse_event_args(
    settings: Settings, description: str | None, data_set: str, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse the command line of an event script.

    Args:
        settings: of the script.
        description: the script's docstring, shown by ``--help``.
        data_set: a key of ``utils.prepare.datasets.DATA_SETS``, and the name of the default folders.
        argv: the arguments; those of the process where it is None.

    Raises:
        UserError: arguments contradict each other or the weights file, or a batch has no equal parts.
    """
    args = settings.parse(description, argv)
    args.decay = args.decay or args.epochs
    if args.batch_size % args.micro_batches:
        raise UserError(
            f"--micro-batches {args.micro_batches} does not divide --batch-size {args.batch_size}; the parts of a "
            "batch must be of one size"
        )
    complete(args, data_set, data_set)
    return args

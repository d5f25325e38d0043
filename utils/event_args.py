"""Command line of the event scripts, with the published spellings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    size,
    told_by_weights,
    whole,
)
from utils.checkpoint import describe_vgg8
from utils.errors import UserError

__all__ = ["deviations", "parse_event_args", "recipe_of"]

_COMMON: dict[str, Any] = {
    **COMMON,
    "sma_blocks": [2, 3],
    "branch_activation": "lif",
    "AZO": True,
    "sensor_size": None,
    "frame_size": None,
    "split": "random",
    "frames": "packed",
    "on_bad_sample": "stop",
    "flip": True,
}

_RECIPE_FIELDS = (
    "demo", "timesteps", "width", "sma_blocks", "branch_activation", "branch_groups", "AZO", "RCR", "RTR",
    "sensor_size", "frame_size", "split", "split_seed", "flip", "batch_size", "accumulate", "epochs", "lr",
    "decay", "weight_decay", "momentum_decay", "amp", "eval_amp", "seed", "weights",
)  # fmt: skip

_EVALUATION_FIELDS = (
    "demo", "timesteps", "width", "sma_blocks", "branch_activation", "branch_groups", "sensor_size", "frame_size",
    "split", "split_seed",
)  # fmt: skip

# What a weights file of this project tells of the input that it was trained on. T shows in the weights of SMA only.
INPUT_FIELDS = ("timesteps", "sensor_size", "frame_size", "split", "split_seed", "demo")

_PUBLISHED_PROCESSES = 4  # of all three runs; the batch size is per process


def parse_event_args(
    description: str, data_set: str, recipe: dict[str, Any], demo: dict[str, Any], argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse the command line of an event script.

    Args:
        description: the script's docstring, shown by ``--help``.
        data_set: a key of ``utils.prepare.frames.DATA_SETS``, and the name of the default folders.
        recipe: the published settings.
        demo: what ``--demo`` changes.

    Raises:
        UserError: arguments contradict each other or the weights file, or a batch has no equal parts.
    """
    given = vars(event_parser(description, recipe).parse_args(argv))
    if "sma_blocks" in given:
        given["sma_blocks"] = sorted(set(given["sma_blocks"]))
    told = told_by_weights(given, describe_vgg8, INPUT_FIELDS, {})
    demo = demo if given.get("demo", told.get("demo")) else {}
    args = argparse.Namespace(**{**_COMMON, **recipe, **demo, **told, **given})
    args.decay = getattr(args, "decay", args.epochs)
    if args.batch_size % args.accumulate:
        raise UserError(
            f"--accumulate {args.accumulate} does not divide --batch-size {args.batch_size}; the parts of a batch must "
            "be of one size"
        )
    complete(args, data_set, data_set)
    return args


def recipe_of(args: argparse.Namespace, split: str | None = None) -> dict[str, Any]:
    """Everything that a result depends on, in plain values: a checkpoint is continued only where it agrees.

    Args:
        split: the fingerprint of the samples in training and test; None where only the settings are wanted.
    """
    return settings_of(args, _RECIPE_FIELDS) | ({} if split is None else {"split_fingerprint": split})


def deviations(args: argparse.Namespace, recipe: dict[str, Any], processes: int) -> dict[str, tuple[Any, Any]]:
    """Settings (for an evaluation: of data and network) that differ from the recipe: name to (published, used)."""
    published = {**_COMMON, "amp": "fp16", "processes": _PUBLISHED_PROCESSES, "decay": recipe["epochs"], **recipe}
    used = {**recipe_of(args), "processes": processes}
    if args.evaluate:
        used = settings_of(args, _EVALUATION_FIELDS)
    return {name: (published[name], value) for name, value in used.items() if value != published[name]}


def event_parser(description: str, recipe: dict[str, Any]) -> ScriptParser:
    """The parser of an event script; its defaults, told in the help, are those of ``recipe``."""
    parser = ScriptParser(description)
    switch = argparse.BooleanOptionalAction
    add = parser.group("data")
    add("--demo", action="store_true", help="train on the built-in demo data: small settings, no download")
    add("--data-dir", type=Path, metavar="DIR", help="folder of the data set", default="data/<data set>")
    add("--sensor-size", type=size(1), metavar="HxW", help="of another camera", default="the data set's")
    add("--frame-size", type=size(32), metavar="N|HxW", help="resize frames", default="the sensor's size")
    if "split_seed" in recipe:
        add(
            "--split", metavar="random|first90|tebn|FILE", help="train/test split", default="random 90/10 in each class"
        )
        add("--split-seed", type=whole(0), metavar="N", help="of that split", default=recipe["split_seed"])
    if "flip" in recipe:
        add("--flip", action=switch, help="mirror half of the training samples", default="on")
    add("--frames", choices=("packed", "npz"), help="read packed frames, made once, or the files", default="packed")
    add("--on-bad-sample", choices=("stop", "skip"), help="leave damaged samples out, or stop", default="stop")

    add = parser.group("network")
    add("-T", "--timesteps", type=whole(1), metavar="T", help="frames per sample", default=recipe["timesteps"])
    add_azo(add, recipe, default=True)
    add("--width", type=above_zero, metavar="X", help="multiplies the channels of all layers", default=1.0)
    add("--sma-blocks", type=whole(1), nargs="*", metavar="N", help="blocks with SMA", default="2 3")
    add("--branch-activation", choices=("lif", "relu"), help="inside SMA", default="lif")
    add_branches(add)

    add = parser.group("training")
    add("-b", "--batch-size", type=whole(1), metavar="N", help="per process", default=recipe["batch_size"])
    add_accumulate(add)
    add("-N", "--epochs", "--epoch", dest="epochs", type=whole(1), metavar="N",
        help="epochs to train", default=recipe["epochs"])  # fmt: skip
    add("--lr", "--learning-rate", type=above_zero, metavar="X", help="learning rate", default=recipe["lr"])
    add("--decay", type=whole(1), metavar="N",
        help="period of the cosine in epochs; the learning rate rises again after it", default="--epochs")  # fmt: skip
    add("--weight-decay", type=not_negative, metavar="X", help="weight decay", default=recipe["weight_decay"])
    if "momentum_decay" in recipe:
        add("--momentum-decay", type=not_negative, metavar="X", help="of NAdam", default=recipe["momentum_decay"])
    add("--amp", choices=("fp16", "bf16", "off"), help="mixed precision in training", default="fp16 on a GPU")
    add("--seed", type=whole(0), metavar="N", help="of weights, order, augmentation", default=recipe["seed"])

    add_run(parser, "<data set>")
    return parser

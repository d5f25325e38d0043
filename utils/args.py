"""Command line of the event scripts: published spellings, one-sentence errors, and where every setting comes from.

A setting is, in rising order: the common default, the script's recipe, the demo's, what the weights file tells, and
what the user gives.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from utils.checkpoint import describe_vgg8, read_weights
from utils.errors import EXIT_USER_ERROR, UserError

__all__ = ["deviations", "parse_event_args", "plain", "recipe_of", "words"]

COMMON: dict[str, Any] = {
    "data_dir": None,
    "output_dir": None,
    "log_dir": None,
    "demo": False,
    "evaluate": False,
    "weights": None,
    "resume": "auto",
    "device": None,
    "amp": None,
    "backend": "auto",
    "num_workers": None,
    "local_rank": None,
    "width": 1.0,
    "sma_blocks": [2, 3],
    "branch_activation": "lif",
    "AZO": True,
    "sensor_size": None,
    "frame_size": None,
    "split": "random",
    "keep_frames": False,
    "flip": True,
}

_RECIPE_FIELDS = (
    "demo", "timesteps", "width", "sma_blocks", "branch_activation", "AZO", "RCR", "RTR", "sensor_size", "frame_size",
    "split", "split_seed", "flip", "batch_size", "epochs", "lr", "decay", "amp", "seed", "weights",
)  # fmt: skip

_PUBLISHED_PROCESSES = 4  # of all three runs on event data; the batch size is per process

_EVALUATION_FIELDS = (
    "demo", "timesteps", "width", "sma_blocks", "branch_activation", "sensor_size", "frame_size", "split", "split_seed",
)  # fmt: skip

# What a weights file of this project tells of the data that it was trained on.
_INPUT_FIELDS = ("sensor_size", "frame_size", "split", "split_seed", "demo")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USER_ERROR, f"{self.prog}: error: {message} (all arguments: --help)\n")


def parse_event_args(
    description: str, data_set: str, recipe: dict[str, Any], demo: dict[str, Any], argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse the command line of an event script.

    Args:
        description: the script's docstring, shown by ``--help``.
        data_set: a key of ``utils.frames.DATA_SETS``, and the name of the default folders.
        recipe: the published settings.
        demo: what ``--demo`` changes.

    Raises:
        UserError: arguments contradict each other or the weights file.
    """
    given = vars(_event_parser(description, recipe).parse_args(argv))
    if "sma_blocks" in given:
        given["sma_blocks"] = sorted(set(given["sma_blocks"]))
    told = _told_by_weights(given)
    demo = demo if given.get("demo", told.get("demo")) else {}
    args = argparse.Namespace(**{**COMMON, **recipe, **demo, **told, **given})
    if args.evaluate and args.weights is None:
        raise UserError("--evaluate needs --weights FILE: the weights to evaluate")
    if args.demo and args.data_dir is not None:
        raise UserError("--demo makes its own data; leave out either --demo or --data-dir")
    suffix = "_demo" if args.demo else ""
    args.output_dir = args.output_dir or Path("output") / f"{data_set}{suffix}"
    args.data_dir = args.data_dir or (args.output_dir / "demo_data" if args.demo else Path("data") / data_set)
    args.log_dir = args.log_dir or args.output_dir
    args.AZO = args.AZO and not args.evaluate  # for training only: its divisors must not matter in an evaluation
    if args.num_workers is None:
        args.num_workers = 0 if args.keep_frames else _workers()
    on_gpu = torch.cuda.is_available() if args.device is None else args.device.startswith("cuda")
    args.amp = args.amp or ("fp16" if on_gpu else "off")
    if args.amp == "fp16" and not on_gpu:
        raise UserError("--amp fp16 needs a GPU; use --amp bf16 or --amp off on a CPU")
    return args


def recipe_of(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that a result depends on, in plain values: a checkpoint is continued only where it agrees."""
    return {name: plain(getattr(args, name)) for name in _RECIPE_FIELDS if hasattr(args, name)}


def deviations(args: argparse.Namespace, recipe: dict[str, Any], processes: int) -> dict[str, tuple[Any, Any]]:
    """Settings (for an evaluation: of data and network) that differ from the recipe: name to (published, used)."""
    published = {**COMMON, "amp": "fp16", "processes": _PUBLISHED_PROCESSES, **recipe}
    used = {**recipe_of(args), "processes": processes}
    if args.evaluate:
        used = {name: value for name, value in used.items() if name in _EVALUATION_FIELDS}
    return {name: (published[name], value) for name, value in used.items() if value != published[name]}


def _told_by_weights(given: dict[str, Any]) -> dict[str, Any]:
    """Settings that the weights file decides, checked against those that the user gives."""
    if given.get("weights") is None:
        return {}
    weights, beside = read_weights(given["weights"])
    architecture = describe_vgg8(weights)
    for name, value in architecture.items():
        if name in given and given[name] != value:
            raise UserError(
                f"--{name.replace('_', '-')} {words(given[name])} does not fit weights file {given['weights']}, which "
                f"was trained with {words(value)}; leave the argument out"
            )
    stored = beside.get("recipe") if isinstance(beside.get("recipe"), dict) else {}
    inputs = {name: stored[name] for name in _INPUT_FIELDS if name in stored}
    if "data_dir" in given:
        inputs.pop("demo", None)
    return {**architecture, **inputs}


def plain(value: object) -> object:
    """A setting as a value that JSON and a checkpoint can hold."""
    return str(value) if isinstance(value, Path) else value


def words(value: object) -> str:
    """A setting as the user would write it."""
    if value is None or isinstance(value, bool):
        return {None: "unset", True: "on", False: "off"}[value]
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _workers() -> int:
    """Loader processes: the cores that this process may use, shared with the other processes of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _event_parser(description: str, recipe: dict[str, Any]) -> _Parser:
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )

    def add(group: argparse._ArgumentGroup, *names: str, help: str, default: object = None, **keywords: Any) -> None:
        shown = f"{default:g}" if isinstance(default, float) else default
        group.add_argument(*names, help=help if default is None else f"{help} (default: {shown})", **keywords)

    switch = argparse.BooleanOptionalAction
    data = parser.add_argument_group("data")
    add(data, "--demo", action="store_true", help="train on the built-in demo data: small settings, no download")
    add(data, "--data-dir", type=Path, metavar="DIR", help="folder of the data set", default="data/<data set>")
    add(data, "--sensor-size", type=_size(1), metavar="HxW", help="of another camera", default="the data set's")
    add(data, "--frame-size", type=_size(32), metavar="N|HxW", help="resize frames", default="the sensor's size")
    if "split_seed" in recipe:
        add(data, "--split", metavar="random|FILE", help="train/test split", default="random 90/10 in each class")
        add(data, "--split-seed", type=_whole(0), metavar="N", help="of that split", default=recipe["split_seed"])
    if "flip" in recipe:
        add(data, "--flip", action=switch, help="mirror half of the training samples", default="on")
    add(data, "--num-workers", type=_whole(0), metavar="N", help="loader processes", default="the cores, at most 8")
    add(data, "--keep-frames", action=switch, help="read all frames once, into memory", default="off; on for the demo")

    model = parser.add_argument_group("network")
    add(model, "-T", "--timesteps", type=_whole(1), metavar="T", help="frames per sample", default=recipe["timesteps"])
    add(model, "--AZO", action=switch, help="Attention ZoneOut in training", default="on")
    add(model, "--RCR", type=_whole(1), metavar="N", help="AZO: channels / RCR are replaced", default=recipe["RCR"])
    add(model, "--RTR", type=_whole(1), metavar="N", help="AZO: in T / RTR steps", default=recipe["RTR"])
    add(model, "--width", type=_above_zero, metavar="X", help="multiplies the channels of all layers", default=1.0)
    add(model, "--sma-blocks", type=_whole(1), nargs="*", metavar="N", help="blocks with SMA", default="2 3")
    add(model, "--branch-activation", choices=("lif", "relu"), help="inside SMA", default="lif")

    training = parser.add_argument_group("training")
    add(training, "-b", "--batch-size", type=_whole(1), metavar="N", help="per process", default=recipe["batch_size"])
    add(training, "-N", "--epochs", "--epoch", dest="epochs", type=_whole(1), metavar="N",
        help="also the length of the cosine schedule", default=recipe["epochs"])  # fmt: skip
    add(training, "--lr", "--learning-rate", type=_above_zero, metavar="X", help="learning rate", default=recipe["lr"])
    add(training, "--decay", type=_not_negative, metavar="X",
        help="weight decay; of NAdam, momentum decay", default=recipe["decay"])  # fmt: skip
    add(training, "--amp", choices=("fp16", "bf16", "off"), help="mixed precision in training", default="fp16 on a GPU")
    add(training, "--seed", type=_whole(0), metavar="N", help="of weights, order, augmentation", default=recipe["seed"])

    run = parser.add_argument_group("run")
    add(run, "--output-dir", "--model-output-dir", type=Path, metavar="DIR",
        help="where everything of the run goes", default="output/<data set>")  # fmt: skip
    add(run, "--log-dir", type=Path, metavar="DIR", help="TensorBoard events", default="the output directory")
    add(run, "--weights", type=Path, metavar="FILE", help="start from these weights, or evaluate them")
    add(run, "--evaluate", action="store_true", help="evaluate --weights and stop")
    add(run, "--resume", metavar="auto|never|FILE", help="continue the run in the output directory", default="auto")
    add(run, "--device", metavar="NAME", help="cpu, cuda or cuda:N", default="a GPU where there is one")
    add(run, "--backend", choices=("auto", "cupy", "torch"), help="of the neurons", default="auto")
    add(run, "--local-rank", "--local_rank", type=_whole(0), metavar="N", help="set by older launchers")
    return parser


def _number(text: str, convert: Callable[[str], float], allowed: Callable[[float], bool], needed: str) -> Any:
    try:
        value = convert(text)
        if allowed(value):
            return value
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be {needed}")


def _whole(least: int) -> Callable[[str], int]:
    return lambda text: _number(text, int, lambda value: value >= least, f"a whole number of at least {least}")


def _above_zero(text: str) -> float:
    return _number(text, float, lambda value: math.isfinite(value) and value > 0, "a finite number above 0")


def _not_negative(text: str) -> float:
    return _number(text, float, lambda value: math.isfinite(value) and value >= 0, "a finite number of at least 0")


def _size(least: int) -> Callable[[str], list[int]]:
    def parse(text: str) -> list[int]:
        height, _, width = text.partition("x")
        needed = f"N or HxW in whole pixels of at least {least}, for instance 48 or 180x240"
        return [_number(side, int, lambda value: value >= least, needed) for side in (height, width or height)]

    return parse

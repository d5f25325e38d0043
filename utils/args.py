"""What the command lines of all scripts share: groups of arguments, one-sentence errors, where a setting comes from.

A setting is, in rising order: the common default, the script's recipe, the demo's, what the weights file tells, and
what the user gives.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from utils.checkpoint import read_weights
from utils.distributed import processes_here
from utils.errors import SentenceParser, UserError

__all__ = [
    "COMMON",
    "ScriptParser",
    "above_zero",
    "add_accumulate",
    "add_azo",
    "add_branches",
    "add_run",
    "complete",
    "not_negative",
    "plain",
    "settings_of",
    "size",
    "told_by_weights",
    "whole",
    "words",
]

COMMON: dict[str, Any] = {
    "data_dir": None,
    "output_dir": None,
    "log_dir": None,
    "demo": False,
    "evaluate": False,
    "weights": None,
    "resume": "auto",
    "keep_every": 0,
    "on_nan": "stop",
    "nan_limit": 10,
    "deterministic": False,
    "timeout": 600.0,
    "device": None,
    "amp": None,
    "eval_amp": "off",
    "backend": "auto",
    "num_workers": None,
    "local_rank": None,
    "width": 1.0,
    "branch_groups": 1,
    "checkpoint_activations": False,
    "accumulate": 1,
}

_MOST_WORKERS = 8


class ScriptParser(SentenceParser):
    """The parser of a script: its result holds only what the user gave."""

    def __init__(self, description: str):
        super().__init__(description=description, argument_default=argparse.SUPPRESS)

    def group(self, title: str) -> Callable[..., None]:
        """A group of arguments: the function that adds one to it, with its default told in the help."""
        group = self.add_argument_group(title)

        def add(*names: str, help: str, default: object = None, **keywords: Any) -> None:
            shown = f"{default:g}" if isinstance(default, float) else default
            group.add_argument(*names, help=help if default is None else f"{help} (default: {shown})", **keywords)

        return add


def add_azo(add: Callable[..., None], recipe: Mapping[str, Any], default: bool) -> None:
    """Add the arguments of Attention ZoneOut."""
    shown = "on" if default else "off"
    add("--AZO", action=argparse.BooleanOptionalAction, help="Attention ZoneOut in training", default=shown)
    add("--RCR", type=whole(1), metavar="N", help="AZO: channels / RCR are replaced", default=recipe["RCR"])
    add("--RTR", type=whole(1), metavar="N", help="AZO: in T / RTR steps", default=recipe["RTR"])


def add_branches(add: Callable[..., None]) -> None:
    """Add the arguments of the convolutions inside SMA."""
    add("--branch-groups", type=lambda text: 1 if text == "1" else text, choices=(1, "channel"),
        help="of the convolutions inside SMA: channel makes them depthwise", default=1)  # fmt: skip
    add("--checkpoint-activations", action="store_true",
        help="keep less of SMA for backward and compute it again: less memory, same result")  # fmt: skip


def add_accumulate(add: Callable[..., None]) -> None:
    """Add the argument of gradient accumulation."""
    add("--accumulate", type=whole(1), metavar="N",
        help="compute a batch in N parts, in less memory; BatchNorm and AZO see one part", default=1)  # fmt: skip


def add_run(parser: ScriptParser, name: str) -> None:
    """Add the group of arguments that say where and how a run goes; ``name`` is that of its default folder."""
    add = parser.group("run")
    add("--output-dir", "--model-output-dir", type=Path, metavar="DIR",
        help="where everything of the run goes", default=f"output/{name}")  # fmt: skip
    add("--log-dir", type=Path, metavar="DIR", help="TensorBoard events", default="the output directory")
    add("--weights", type=Path, metavar="FILE", help="start from these weights, or evaluate them")
    add("--evaluate", action="store_true", help="evaluate --weights and stop")
    add("--resume", metavar="auto|never|FILE", help="continue the run in the output directory", default="auto")
    add("--keep-every", type=whole(0), metavar="N", help="keep the checkpoint of every N-th epoch", default="0: none")
    add("--on-nan", choices=("stop", "skip"), help="a step that is not finite: stop, or leave it out", default="stop")
    add("--nan-limit", type=whole(1), metavar="N", help="with skip: at most so many steps of an epoch", default=10)
    add("--deterministic", action="store_true", help="bit-equal reruns on this machine")
    add("--timeout", type=above_zero, metavar="S", help="seconds to wait for a lost process", default=600.0)
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N", default="a GPU where there is one")
    add("--eval-amp", choices=("fp16", "bf16", "off"), help="mixed precision in evaluation", default="off")
    add("--backend", choices=("auto", "cupy", "torch"), help="of the neurons", default="auto")
    add("--num-workers", type=whole(0), metavar="N", help="loader processes", default="the cores, at most 8")
    add("--local-rank", "--local_rank", type=whole(-1), metavar="N", help="set by older launchers; -1: no launcher")


def complete(args: argparse.Namespace, data_set: str, run: str) -> None:
    """Check what contradicts itself, and fill in the defaults that depend on other settings or on the machine.

    Args:
        data_set, run: names of the default folders of the data and of the output.

    Raises:
        UserError: arguments contradict each other.
    """
    if args.evaluate and args.weights is None:
        raise UserError("--evaluate needs --weights FILE: the weights to evaluate")
    if args.demo and args.data_dir is not None:
        raise UserError("--demo makes its own data; leave out either --demo or --data-dir")
    suffix = "_demo" if args.demo else ""
    args.output_dir = args.output_dir or Path("output") / f"{run}{suffix}"
    args.data_dir = args.data_dir or (args.output_dir / "demo_data" if args.demo else Path("data") / data_set)
    args.log_dir = args.log_dir or args.output_dir
    if args.on_nan == "stop":
        args.nan_limit = 0
    args.AZO = args.AZO and not args.evaluate  # for training only: its divisors must not matter in an evaluation
    if args.num_workers is None:
        args.num_workers = _workers()
    on_gpu = torch.cuda.is_available() if args.device is None else args.device.startswith("cuda")
    args.amp = args.amp or ("fp16" if on_gpu else "off")
    for flag, amp in {"--amp": args.amp, "--eval-amp": args.eval_amp}.items():
        if amp == "fp16" and not on_gpu:
            raise UserError(f"{flag} fp16 needs a GPU; use {flag} bf16 or {flag} off on a CPU")


def told_by_weights(
    given: Mapping[str, Any],
    describe: Callable[[Mapping[str, torch.Tensor]], dict[str, Any]],
    input_fields: Sequence[str],
    flags: Mapping[str, str],
) -> dict[str, Any]:
    """Settings that the weights file decides, checked against those that the user gives.

    Args:
        given: the user's arguments.
        describe: tells the network's settings from names and shapes of its weights.
        input_fields: settings of the data that a file of this project tells.
        flags: how the user writes a setting, where that is not ``--name``.

    Raises:
        UserError: the user gives another value than the file has.
    """
    if given.get("weights") is None:
        return {}
    weights, beside = read_weights(given["weights"])
    architecture = describe(weights)
    for name, value in architecture.items():
        if name in given and given[name] != value:
            flag = flags.get(name, f"--{name.replace('_', '-')}")
            raise UserError(
                f"{flag} {words(given[name])} does not fit weights file {given['weights']}, which "
                f"was trained with {words(value)}; leave the argument out"
            )
    stored = beside.get("recipe") if isinstance(beside.get("recipe"), dict) else {}
    inputs = {name: stored[name] for name in input_fields if name in stored}
    if "data_dir" in given:
        inputs.pop("demo", None)
    return {**architecture, **inputs}


def settings_of(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those of the named settings that there are, in plain values."""
    return {name: plain(getattr(args, name)) for name in names if hasattr(args, name)}


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
    return min(_MOST_WORKERS, cores // processes_here())


def _number(text: str, convert: Callable[[str], float], allowed: Callable[[float], bool], needed: str) -> Any:
    try:
        value = convert(text)
        if allowed(value):
            return value
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be {needed}")


def whole(least: int) -> Callable[[str], int]:
    """Make the type of a whole number of at least ``least``."""
    return lambda text: _number(text, int, lambda value: value >= least, f"a whole number of at least {least}")


def above_zero(text: str) -> float:
    """The type of a finite number above 0."""
    return _number(text, float, lambda value: math.isfinite(value) and value > 0, "a finite number above 0")


def not_negative(text: str) -> float:
    """The type of a finite number of at least 0."""
    return _number(text, float, lambda value: math.isfinite(value) and value >= 0, "a finite number of at least 0")


def size(least: int) -> Callable[[str], list[int]]:
    """Make the type of a height and width ``N`` or ``HxW`` in pixels."""

    def parse(text: str) -> list[int]:
        height, _, width = text.partition("x")
        needed = f"N or HxW in whole pixels of at least {least}, for instance 48 or 180x240"
        return [_number(side, int, lambda value: value >= least, needed) for side in (height, width or height)]

    return parse

"""Settings of the scripts. Each is described once, in a table of :class:`Setting`; parser, help, recipe and deviations
come from it.

The value of a setting is, in rising order: its default, the script's recipe, the demo's, what the weights file says,
and what the user gives.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from utils.checkpoint import read_weights
from utils.distributed import processes_here
from utils.errors import SentenceParser, UserError
from utils.networks import settings_of_weights
from utils.tracker import TRACKERS, check_tracker

__all__ = [
    "RUN",
    "Setting",
    "Settings",
    "above_zero",
    "azo_settings",
    "branch_settings",
    "fraction",
    "not_negative",
    "plain",
    "size",
    "stored_settings",
    "whole",
    "words",
]

_MOST_WORKERS = 8
_LARGEST = 1e6


@dataclass(frozen=True)
class Setting:
    """One setting of a script.

    Args:
        flags: separated by spaces; the last one names the setting. A name without dashes has no flag: only a weights
            file sets it.
        help: what it does; the default is added.
        default: the value where nothing else sets it. A script's recipe replaces it.
        group: heading in the help.
        parse: text to value, with argparse's own errors.
        parser: further keywords of ``add_argument``.
        shown: the default in the help, where the value itself says less.
        depends: what depends on it: the result of ``"training"``, also that of an ``"evaluation"``, or nothing.
        stored: whether a weights file says it, by names and shapes or in the recipe that a run stored with them.
        in_recipe: only scripts whose recipe names it have it.
    """

    flags: str
    help: str = ""
    default: Any = None
    group: str = "run"
    parse: Callable[[str], Any] | None = None
    parser: Mapping[str, Any] | None = None
    shown: str | None = None
    depends: str = ""
    stored: bool = False
    in_recipe: bool = False

    @property
    def name(self) -> str:
        """Its name in ``args``."""
        return self.flag.lstrip("-").replace("-", "_")

    @property
    def flag(self) -> str:
        """How a message writes it."""
        return self.flags.split()[-1]

    def check(self, value: Any) -> Any:
        """A value from a file, as the command line would take it.

        Raises:
            ValueError: the command line would not.
        """
        keywords = self.parser or {}
        if isinstance(self.default, bool):
            if isinstance(value, bool):
                return value
        elif keywords.get("nargs") == "*":
            if isinstance(value, list):
                return [self.parse(str(one)) if self.parse else one for one in value]
        elif self.parse is not None:
            return self.parse("x".join(map(str, value)) if isinstance(value, list) else str(value))
        elif isinstance(value, str) and value in keywords.get("choices", [value]):
            return value
        raise ValueError(f"{value!r:.40} is not allowed")


class Settings:
    """The settings of one script.

    Args:
        table: of its family.
        recipe: the published values.
        demo: what ``--demo`` changes.
        family: ``"vgg8"`` or ``"ms_resnet"``: the networks that its weights files may hold.
        published: values of a published run that the recipe does not hold, for the deviations.
    """

    def __init__(
        self,
        table: Sequence[Setting],
        recipe: Mapping[str, Any],
        demo: Mapping[str, Any],
        family: str,
        published: Mapping[str, Any],
    ):
        self.table = [one for one in table if not one.in_recipe or one.name in recipe]
        self.recipe, self.demo, self.family = recipe, demo, family
        self.published = {one.name: one.default for one in self.table} | {**published, **recipe}

    def parser(self, description: str | None) -> SentenceParser:
        """The parser of the command line; its result holds only what the user gave."""
        parser = SentenceParser(description=description, argument_default=argparse.SUPPRESS)
        groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(s.group for s in self.table)}
        for one in self.table:
            if not one.flags.startswith("-"):
                continue
            default = one.shown if one.shown is not None else words(self.published[one.name])
            text = f"{one.help} (default: {default})" if default else one.help
            keywords: dict[str, Any] = {"type": one.parse} if one.parse else {}
            flags = sorted(one.flags.split(), key=lambda flag: (flag.startswith("--"), flag != one.flag))
            groups[one.group].add_argument(*flags, dest=one.name, help=text, **keywords, **(one.parser or {}))
        known = {flag for one in self.table for flag in one.flags.split()}
        for flag, advice in _GONE.items():
            if flag not in known:
                parser.add_argument(flag, action=_Gone, nargs="?", const=advice, help=argparse.SUPPRESS)
        return parser

    def parse(self, description: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """The settings for a command line.

        Raises:
            UserError: an argument is not allowed, or contradicts the weights file.
        """
        given = vars(self.parser(description).parse_args(argv))
        stored = self._stored(given)
        demo = self.demo if given.get("demo", stored.get("demo")) else {}
        defaults = {one.name: one.default for one in self.table}
        return argparse.Namespace(**{**defaults, **self.recipe, **demo, **stored, **given})

    def recipe_of(self, args: argparse.Namespace) -> dict[str, Any]:
        """Everything that the result of a training depends on, in plain values."""
        return {one.name: plain(getattr(args, one.name)) for one in self.table if one.depends}

    def deviations(self, args: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
        """Settings (for an evaluation: of data and network) that differ: name to (published, used)."""
        needed = ("evaluation",) if args.evaluate else ("training", "evaluation")
        used = {one.name: plain(getattr(args, one.name)) for one in self.table if one.depends in needed}
        return {name: (self.published[name], value) for name, value in used.items() if value != self.published[name]}

    def _stored(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the weights file says, checked against what the user gives."""
        if given.get("weights") is None:
            return {}
        weights, known = read_weights(given["weights"])
        network = settings_of_weights(weights, self.family)
        for one in self.table:
            if one.stored and one.name in network and one.name in given and given[one.name] != network[one.name]:
                raise UserError(
                    f"{one.flag} {words(given[one.name])} does not fit weights file {given['weights']}, which "
                    f"was trained with {words(network[one.name])}; leave the argument out"
                )
        found = stored_settings(self.table, known, given["weights"])
        if "data_dir" in given:
            found.pop("demo", None)
        return {**found, **network}


def stored_settings(table: Sequence[Setting], known: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What the recipe in a weights file says of data and network, each value as the command line would take it.

    Args:
        table: of the script that wrote it.
        known: as :func:`utils.checkpoint.read_weights` gives it.
        path: of the file, for the message.

    Raises:
        UserError: a value is none that the command line would take.
    """
    recipe = known["recipe"] if isinstance(known.get("recipe"), Mapping) else {}
    found = {}
    for one in table:
        if one.stored and one.flags.startswith("-") and recipe.get(one.name) is not None:
            try:
                found[one.name] = one.check(recipe[one.name])
            except (ValueError, argparse.ArgumentTypeError) as error:
                raise UserError(
                    f"weights file {path} holds a recipe that this program did not write ({one.name}: {error}); use "
                    "its weights alone"
                ) from error
    return found


# Flags of earlier versions: what to do now.
_GONE = {
    "--accumulate": "is now --micro-batches, which says what it does: it divides the batch",
    "--checkpoint-activations": "is now --recompute",
    "--keep-frames": "is gone: packed frames are read as fast; leave it out",
    "--on-nan": "is gone: a step that is not finite stops the run; lower --lr, or use --amp off",
    "--nan-limit": "is gone with --on-nan; leave it out",
    "--branch-groups": "is gone from the scripts; depthwise branches are SMA(groups='channel')",
    "--decay": "is now --weight-decay",  # where the table has no --decay
}


class _Gone(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        parser.error(f"{self.option_strings[0]} {self.const}")


def whole(least: int, most: int = int(_LARGEST)) -> Callable[[str], int]:
    """Make the type of a whole number from ``least`` to ``most``."""
    return lambda text: _number(text, int, lambda n: least <= n <= most, f"a whole number from {least} to {most}")


def above_zero(text: str) -> float:
    """The type of a number above 0."""
    return _number(text, float, lambda n: 0 < n <= _LARGEST, f"a number above 0 and at most {_LARGEST:g}")


def not_negative(text: str) -> float:
    """The type of a number of at least 0."""
    return _number(text, float, lambda n: 0 <= n <= _LARGEST, f"a number from 0 to {_LARGEST:g}")


def fraction(text: str) -> float:
    """The type of a number from 0 to below 1."""
    return _number(text, float, lambda n: 0 <= n < 1, "a number of at least 0 and below 1")


def size(least: int, most: int = 4096) -> Callable[[str], list[int]]:
    """Make the type of a height and width ``N`` or ``HxW`` in pixels."""

    def parse(text: str) -> list[int]:
        height, x, width = text.partition("x")
        needed = f"N or HxW in whole pixels from {least} to {most}, for instance 48 or 180x240"
        sides = (height, width if x else height)
        return [_number(side, int, lambda n: least <= n <= most, needed, text) for side in sides]

    return parse


def _number(
    text: str, convert: Callable[[str], float], allowed: Callable[[float], bool], needed: str, given: str = ""
) -> Any:
    try:
        value = convert(text)
        if math.isfinite(value) and allowed(value):
            return value
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{(given or text)[:40]!r} must be {needed}")


def plain(value: object) -> Any:
    """A setting as a value that JSON and a checkpoint can hold."""
    return str(value) if isinstance(value, Path) else value


def words(value: object) -> str:
    """A setting as the user would write it."""
    if value is None or isinstance(value, bool):
        return {None: "", True: "on", False: "off"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)


_switch = {"action": argparse.BooleanOptionalAction}
_on = {"action": "store_true"}
_AMP = {"choices": ("fp16", "bf16", "off")}


def azo_settings(default: bool) -> list[Setting]:
    """The settings of Attention ZoneOut."""
    add = partial(Setting, group="network", depends="training")
    return [
        add("--AZO", "Attention ZoneOut in training", default, parser=_switch),
        add("--RCR", "AZO: channels / RCR are replaced", parse=whole(1), parser={"metavar": "N"}),
        add("--RTR", "AZO: in T / RTR steps", parse=whole(1), parser={"metavar": "N"}),
    ]


def branch_settings() -> list[Setting]:
    """The settings of the convolutions inside SMA."""
    return [
        Setting("branch_groups", default=1, group="network", depends="evaluation", stored=True),
        Setting(
            "--recompute", "keep less of SMA for backward and compute it again: less memory, same result", False,
            group="network", parser=_on, shown="",
        ),
    ]  # fmt: skip


def micro_batches() -> Setting:
    """The setting that divides a batch."""
    return Setting(
        "--micro-batches", "compute a batch in N parts, in less memory; BatchNorm and AZO see one part", 1,
        group="training", parse=whole(1), parser={"metavar": "N"}, depends="training",
    )  # fmt: skip


def _file(metavar: str) -> dict[str, Any]:
    return {"parse": Path, "parser": {"metavar": metavar}}


def _count(metavar: str = "N", least: int = 0, most: int = int(_LARGEST)) -> dict[str, Any]:
    return {"parse": whole(least, most), "parser": {"metavar": metavar}}


# Where and how a run goes: the same for all scripts.
RUN = [
    Setting("--model-output-dir --output-dir", "folder of the run", shown="output/<data set>", **_file("DIR")),
    Setting("--log-dir", "folder for TensorBoard events", shown="the output directory", **_file("DIR")),
    Setting("--tracker", "also log to this tracker, a package that you install", shown="none",
            parser={"choices": TRACKERS}),
    Setting("--weights", "start from these weights, or evaluate them", depends="training", **_file("FILE")),
    Setting("--evaluate", "evaluate --weights and stop", False, parser=_on, shown=""),
    Setting("--resume", "continue the run in the output directory", "auto", parser={"metavar": "auto|never|FILE"}),
    Setting("--keep-every", "keep the checkpoint of every N-th epoch", 0, shown="0: none", **_count()),
    Setting("--record-azo", "record which steps and channels AZO replaces, for pictures", False, parser=_on, shown=""),
    Setting("--deterministic", "bit-equal reruns on this machine", False, parser=_on, shown=""),
    Setting("--timeout", "seconds to wait for a lost process", 600.0, parse=above_zero, parser={"metavar": "S"}),
    Setting("--device", "cpu, cuda or cuda:N", shown="a GPU if there is one", parser={"metavar": "NAME"}),
    Setting("--eval-amp", "mixed precision in evaluation", "off", parser=_AMP, depends="evaluation"),
    Setting("--tf32", "on a GPU, float32 convolutions may use TF32", True, parser=_switch, depends="evaluation"),
    Setting("--backend", "of the neurons", "auto", parser={"choices": ("auto", "cupy", "triton", "torch")}),
    Setting("--compile", "train with torch.compile; evaluation runs the network as it is", False, parser=_on, shown=""),
    Setting("--num-workers", "loader processes", shown=f"the cores, at most {_MOST_WORKERS}", **_count(most=1024)),
    Setting(
        "--local_rank --local-rank", "set by older launchers; -1 means no launcher", shown="",
        **_count(least=-1, most=1 << 16),
    ),
]  # fmt: skip

TRAINING = [
    Setting("--val", "hold out a part of the training samples to select the epoch; the test then comes once", 0.0,
            group="data", parse=fraction, parser={"metavar": "FRACTION"}, shown="0: none", depends="training",
            stored=True),
    Setting(
        "--amp", "mixed precision in training", group="training", parser=_AMP, shown="fp16 on a GPU, off on a CPU",
        depends="training",
    ),
    Setting("--seed", "of weights, order and augmentation", group="training", depends="training",
            **_count(most=1 << 62)),
]  # fmt: skip


def complete(args: argparse.Namespace, data_set: str, run: str) -> None:
    """Check what contradicts itself, and fill in the defaults that depend on other settings or on the machine.

    Args:
        args: the settings of a script.
        data_set, run: names of the default folders of the data and of the output.

    Raises:
        UserError: arguments contradict each other.
    """
    if args.evaluate and args.weights is None:
        raise UserError("--evaluate needs --weights FILE: the weights to evaluate")
    if args.resume not in ("auto", "never") and not Path(args.resume).is_file():
        is_not = "is no file" if Path(args.resume).exists() else "does not exist"
        raise UserError(f"--resume: {args.resume or '(nothing)'} {is_not}; give auto, never or a checkpoint of a run")
    if args.demo and args.data_dir is not None:
        raise UserError("--demo makes its own data; leave out either --demo or --data-dir")
    run_dir = Path("output") / (f"{run}_demo" if args.demo else run)
    demo_data = (args.output_dir or run_dir) / "demo_data"
    args.data_dir = args.data_dir or (demo_data if args.demo else Path("data") / data_set)
    args.output_dir = args.output_dir or (None if args.evaluate else run_dir)
    args.log_dir = args.log_dir or args.output_dir
    if not args.evaluate:
        check_tracker(args.tracker)
    args.AZO = args.AZO and not args.evaluate  # for training only: its divisors must not matter in an evaluation
    if args.num_workers is None:
        args.num_workers = _workers()
    on_gpu = torch.cuda.is_available() if args.device is None else args.device.startswith("cuda")
    args.amp = args.amp or ("fp16" if on_gpu else "off")
    for flag, amp in {"--amp": args.amp, "--eval-amp": args.eval_amp}.items():
        if amp == "fp16" and not on_gpu:
            raise UserError(f"{flag} fp16 needs a GPU; use {flag} bf16 or {flag} off on a CPU")


def _workers() -> int:
    """Loader processes: the cores that this process may use, shared with the other processes of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_WORKERS, cores // processes_here())

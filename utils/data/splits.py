"""Train and test: by a rule or by a file, and written down as a file.

A split file is text with a line for every sample,

    train,<class>/<sample>,<checksum>
    val,<class>/<sample>,<checksum>
    test,<class>/<sample>,<checksum>

where ``val`` are training samples that are held out to select an epoch.

``#`` starts a comment. The checksum may be left out or ``-``; it is that of the sample's event counts (see
``content_checksum`` in utils/prepare/check.py), and in the split.txt of a run it goes on with ``:`` and that of the
frames, which depends on T. ``train,*`` or ``test,*`` stands for all samples that no line names.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

from utils.errors import UserError

__all__ = ["RULES", "Split", "SplitInfo", "changes", "held_out", "make_split", "read_split"]

RULES = ("random", "first90", "tebn")

_PARTS = ("train", "val", "test")
_UNKNOWN = "-"


@dataclass(frozen=True)
class Split:
    """Which samples are for training and which for the test.

    They are ``<class>/<sample>``, or ``<part>/<class>/<sample>`` of a data set with its own split.
    """

    rule: str  # of RULES, "own" of a data set with train and test folders, "file"
    train: tuple[str, ...]  # with those that are held out
    test: tuple[str, ...]
    val: tuple[str, ...] = ()  # training samples that are held out
    seed: int | None = None  # of a random one
    file: str | None = None  # that names the samples
    checksums: Mapping[str, str] = field(default_factory=dict)  # that its file demands

    @property
    def name(self) -> str:
        """The rule, with its seed and what is held out, as the beginning of a file name."""
        rule = self.rule if self.seed is None else f"{self.rule}_seed{self.seed}"
        return f"{rule}_val{len(self.val)}" if self.val else rule

    @cached_property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """``train`` (without what is held out), ``val`` and ``test``."""
        held = set(self.val)
        return {"train": tuple(name for name in self.train if name not in held), "val": self.val, "test": self.test}

    @cached_property
    def fingerprint(self) -> str:
        """8 digits that depend on the names and their part, and on nothing else."""
        lines = sorted(f"{part},{_short(name)}" for part, names in self.parts.items() for name in names)
        return _hash("\n".join(lines))[:8]

    @property
    def file_name(self) -> str:
        """Without suffix, another one for other samples."""
        return f"{self.name}_{self.fingerprint}"

    def without(self, names: set[str]) -> Split:
        """The same without these samples."""
        train, val, test = (tuple(n for n in part if n not in names) for part in (self.train, self.val, self.test))
        return replace(self, train=train, val=val, test=test)

    def holding_out(self, fraction: float) -> Split:
        """The same with a part of the training samples of every class held out."""
        held = held_out([_short(name) for name in self.train], fraction)
        return replace(self, val=tuple(name for name in self.train if _short(name) in held))

    def contents(self, checksums: Mapping[str, str], labels: Mapping[str, int]) -> str:
        """16 digits that depend on every sample's name, part, label and checksum."""
        parts = self.parts.items()
        lines = [f"{part},{name},{labels[name]},{checksums[name]}" for part, names in parts for name in names]
        return _hash("\n".join(lines))[:16]

    def manifest(self, data_set: str, checksums: Mapping[str, str]) -> str:
        """The text of its file."""
        held = f", {len(self.val)} held out" if self.val else ""
        lines = [
            f"# {data_set}, split {self.name}, fingerprint {self.fingerprint}: "
            f"{len(self.parts['train'])} training{held} and {len(self.test)} test",
            "# part,class/sample,checksum of the counts of events at each pixel",
        ]
        for part, names in self.parts.items():
            lines += [f"{part},{_short(name)},{checksums.get(name, _UNKNOWN)}" for name in names]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class SplitInfo:
    """What a run's samples are, in values: for ``args.json``, checkpoints, ``evaluation.json`` and exported files."""

    rule: str  # "random", "first90", "tebn", "own", "file"
    seed: int | None
    file: str | None
    fingerprint: str  # of the names in every part, the same for every T and on every machine
    contents: str  # of names, labels and frames: it changes with any of them
    train: int  # without those that are held out
    val: int  # training samples that are held out
    test: int
    classes: int
    left_out: int  # bad files
    official: bool  # all samples of the data set, and no others
    demo: bool


def changes(before: str, now: str) -> list[str]:
    """What differs between the manifests (``split.txt``) of two runs: a line for each sample, by its name.

    A checksum that one of the two does not give is not compared.
    """
    old, new = _samples_of(before), _samples_of(now)
    found = []
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            found.append(f"{name} is not there any more")
        elif name not in old:
            found.append(f"{name} is new")
        elif old[name] != new[name] and _UNKNOWN not in (old[name], new[name]):
            events = [checksum.partition(":")[0] for checksum in (old[name], new[name])]
            if events[0] != events[1]:
                found.append(f"{name} has other contents")
            elif ":" in old[name] and ":" in new[name]:
                found.append(f"{name} has other frames of the same events")
    return found


def _samples_of(manifest: str) -> dict[str, str]:
    """``part,class/sample`` to its checksum."""
    lines = (line.rpartition(",") for line in manifest.split("\n") if line and not line.startswith("#"))
    return {name: checksum for name, _, checksum in lines}


def make_split(rule: str, names: Sequence[str], seed: int) -> Split:
    """Split samples ``<class>/<sample>`` by a rule.

    ============  ==================================================================================================
    ``random``    inside each class, over the names in sorted order, ``int(0.9 n)`` drawn for training (as published)
    ``first90``   the first ``ceil(0.9 n)`` of each class in sorted order for training: SpikingJelly's
                  ``split_to_train_test_set(0.9, ...)``
    ``tebn``      samples 0 to 99 of each class of CIFAR10-DVS, by number, for the test (as in TEBN)
    ============  ==================================================================================================
    """
    train: list[str] = []
    test: list[str] = []
    for label, group in groupby(sorted(names, key=_class_and_sample), lambda name: name.partition("/")[0]):
        of_class = list(group)
        if rule == "random":
            random.Random(f"{seed}/{label}".encode("utf-8", "surrogateescape")).shuffle(of_class)
            cut = int(0.9 * len(of_class))
        elif rule == "first90":
            cut = math.ceil(0.9 * len(of_class))
        else:
            of_class = [n for n in of_class if _number(n) >= 100] + [n for n in of_class if _number(n) < 100]
            cut = sum(_number(name) >= 100 for name in of_class)
        train += sorted(of_class[:cut], key=_class_and_sample)
        test += sorted(of_class[cut:], key=_class_and_sample)
    return Split(rule, tuple(train), tuple(test), seed=seed if rule == "random" else None)


def held_out(names: Sequence[str], fraction: float) -> set[str]:
    """The training samples ``<class>/<sample>`` that ``--val`` holds out: ``fraction`` of every class, rounded.

    In every class those whose SHA-256 of ``val/<class>/<sample>`` comes first: the same ones for every seed and on
    every machine, and of a larger fraction they are a part. One sample of each class stays for training.
    """
    classes: dict[str, list[str]] = {}
    for name in names:
        classes.setdefault(name.partition("/")[0], []).append(name)
    held: set[str] = set()
    for of_class in classes.values():
        count = min(int(fraction * len(of_class) + 0.5), len(of_class) - 1)
        held.update(sorted(of_class, key=lambda name: _hash(f"val/{name}"))[:count])
    return held


def read_split(path: Path, names: Sequence[str]) -> Split:
    """Read a split file for the samples that exist.

    Raises:
        UserError: it cannot be read, a line has another form, or a sample does not exist or is named twice.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--split {path} is neither one of {', '.join(RULES)} nor a readable file ({error})") from error
    left = set(names)
    parts: dict[str, list[str]] = {part: [] for part in _PARTS}
    checksums, rest = {}, None
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        part, _, name = line.partition(",")
        if part in ("train", "test") and name == "*" and rest is None:
            rest = part
            continue
        if name not in left:
            name, _, checksum = name.rpartition(",")
            if checksum != _UNKNOWN:
                checksums[name] = checksum.partition(":")[0]
        if part not in parts or name not in left:
            raise UserError(
                f"--split {path}, line {number}: {line!r} is not 'train,<class>/<sample>', 'val,<class>/<sample>' or "
                "'test,<class>/<sample>' of a sample that exists, once"
            )
        left.remove(name)
        parts[part].append(name)
    if rest is not None:
        parts[rest] += left
    parts["train"] += parts["val"]
    train, val, test = (tuple(sorted(parts[part], key=_class_and_sample)) for part in _PARTS)
    return Split("file", train, test, val, file=str(path), checksums=checksums)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()  # a name may be any bytes


def _class_and_sample(name: str) -> tuple[str, str]:
    label, _, sample = name.partition("/")
    return label, f"{sample}.npz"  # the order of the files: "a-1.npz" before "a.npz"


def _short(name: str) -> str:
    """``<class>/<sample>``."""
    return "/".join(name.split("/")[-2:])


def _number(name: str) -> int:
    digits = re.search(r"(\d+)\D*$", name.partition("/")[2])
    if digits is None:
        raise UserError(
            f"--split tebn goes by the numbers of CIFAR10-DVS and sample {name} has none; use another split"
        )
    return int(digits[1])

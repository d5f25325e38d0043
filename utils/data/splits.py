"""Train and test: by a rule or by a file, and written down as a file.

A split file is text with a line for every sample,

    train,<class>/<sample>,<checksum>
    test,<class>/<sample>,<checksum>

``#`` starts a comment. The checksum may be left out or ``-``; it is that of the sample's event counts (see
``content_checksum`` in utils/prepare/check.py). ``train,*`` or ``test,*`` stands for all samples that no line names.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from utils.errors import UserError

__all__ = ["RULES", "Split", "make_split", "read_split"]

RULES = ("random", "first90", "tebn")

_PARTS = ("train", "test")
_UNKNOWN = "-"


@dataclass(frozen=True)
class Split:
    """Which samples are for training and which for the test.

    They are ``<class>/<sample>``, or ``<part>/<class>/<sample>`` of a data set with its own split.
    """

    title: str  # the rule or the file in words
    name: str  # the rule as the beginning of a file name; "file" for any file
    train: tuple[str, ...]
    test: tuple[str, ...]
    checksums: Mapping[str, str] = field(default_factory=dict)  # that its file demands

    @property
    def fingerprint(self) -> str:
        """8 digits that depend on the names and their part, and on nothing else."""
        parts = zip(_PARTS, (self.train, self.test), strict=True)
        lines = sorted(f"{part},{_short(name)}" for part, names in parts for name in names)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]

    @property
    def file_name(self) -> str:
        """Without suffix, another one for other samples."""
        return f"{self.name}_{self.fingerprint}"

    @property
    def described(self) -> str:
        """For the header of a run and every result."""
        return f"{self.title}, fingerprint {self.fingerprint}"

    def without(self, names: set[str]) -> Split:
        """The same without these samples."""
        train, test = (tuple(n for n in part if n not in names) for part in (self.train, self.test))
        return Split(self.title, self.name, train, test, self.checksums)

    def manifest(self, data_set: str, checksums: Mapping[str, str]) -> str:
        """The text of its file."""
        lines = [
            f"# {data_set}, split {self.name}, fingerprint {self.fingerprint}: "
            f"{len(self.train)} training and {len(self.test)} test",
            "# part,class/sample,checksum of the counts of events at each pixel",
        ]
        for part, names in zip(_PARTS, (self.train, self.test), strict=True):
            lines += [f"{part},{_short(name)},{checksums.get(name, _UNKNOWN)}" for name in names]
        return "\n".join(lines) + "\n"


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
            random.Random(f"{seed}/{label}").shuffle(of_class)
            cut = int(0.9 * len(of_class))
        elif rule == "first90":
            cut = math.ceil(0.9 * len(of_class))
        else:
            of_class = [n for n in of_class if _number(n) >= 100] + [n for n in of_class if _number(n) < 100]
            cut = sum(_number(name) >= 100 for name in of_class)
        train += sorted(of_class[:cut], key=_class_and_sample)
        test += sorted(of_class[cut:], key=_class_and_sample)
    titles = {
        "random": f"random 90/10 in each class, seed {seed}",
        "first90": "the first 90 % of each class",
        "tebn": "TEBN's: the first 100 of each class to test",
    }
    return Split(titles[rule], f"random_seed{seed}" if rule == "random" else rule, tuple(train), tuple(test))


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
        if part in parts and name == "*" and rest is None:
            rest = part
            continue
        if name not in left:
            name, _, checksum = name.rpartition(",")
            if checksum != _UNKNOWN:
                checksums[name] = checksum
        if part not in parts or name not in left:
            raise UserError(
                f"--split {path}, line {number}: {line!r} is not 'train,<class>/<sample>' or 'test,<class>/<sample>' "
                "of a sample that exists, once"
            )
        left.remove(name)
        parts[part].append(name)
    if rest is not None:
        parts[rest] += left
    train, test = (tuple(sorted(parts[part], key=_class_and_sample)) for part in _PARTS)
    return Split(f"file {path}", "file", train, test, checksums)


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

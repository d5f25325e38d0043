"""What is in a folder of classes: links are followed, each target once, and what cannot be a sample is named."""

from __future__ import annotations

import os
import re
import stat
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

__all__ = ["BadFile", "File", "Folder", "Special", "Stamp", "listing", "read_folder", "walk"]

_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_ALIKE = 20  # bad files of one kind that are all listed


class BadFile(NamedTuple):
    """A file or folder that cannot be used, and why."""

    path: Path
    what: str
    sample: str = ""  # its path below the folder of its data, without suffix, where it is a sample

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


class Special(BadFile):
    """Something under the name of a sample that is no file."""


class Stamp(NamedTuple):
    """Size and time of the last change: a file that has neither changed is the one that was looked at."""

    size: int  # bytes
    changed: int  # nanoseconds


class File(NamedTuple):
    """A file that was found."""

    path: str
    stamp: Stamp


@dataclass
class Folder:
    """The samples of a folder of classes, and what is wrong with it."""

    path: Path
    files: dict[str, File] = field(default_factory=dict)  # by the path in it, without suffix
    classes: list[str] = field(default_factory=list)  # folders that may hold samples, by the path in it
    bad: list[BadFile] = field(default_factory=list)

    def without_samples(self, what: str = "samples") -> list[BadFile]:
        """The classes that hold none, and those that one part lacks of another."""
        used = {name.rpartition("/")[0] for name in self.files}
        parts, names = ({name.rpartition("/")[at] for name in used} for at in (0, 2))
        lacking = {f"{part}/{name}".lstrip("/") for part in parts for name in names} | set(self.classes)
        return [BadFile(self.path / name, f"is a class without {what}") for name in sorted(lacking - used)]


def read_folder(
    path: Path,
    suffixes: Sequence[str] = (".npz",),
    parts: Sequence[str] = (),
    leave_out: Callable[[str], bool] | None = None,
) -> Folder:
    """Find ``<class>/<sample>``, or ``<part>/<class>/<sample>`` for the given parts.

    A folder inside a class, a sample outside, another part and everything that :func:`walk` names is bad.

    Args:
        suffixes: of the samples, in lower case.
        parts: the folders above the classes.
        leave_out: tells by the name whether something in ``path`` itself is not looked at.
    """
    found, levels, depth = Folder(path), dict[str, list[File]](), 2 if parts else 1
    for entry in walk(path, suffixes, depth, leave_out) if path.is_dir() else ():
        if isinstance(entry, BadFile):
            found.bad.append(entry)
        else:
            levels.setdefault(entry[0], []).extend(entry[1])
    for inside in sorted(levels, key=lambda inside: inside.replace("/", "\0")):
        files, level = sorted(levels[inside]), inside.count("/") + 1 if inside else 0
        if parts and level and inside.partition("/")[0] not in parts:
            if level == 1:
                found.bad.append(BadFile(path / inside, f"is neither of the folders {', '.join(parts)}"))
        elif level < depth:
            found.bad += [BadFile(Path(file.path), "does not lie in the folder of a class") for file in files]
        else:
            found.classes.append(inside)
            for file in files:
                other = found.files.setdefault(_sample(inside, file.path.rpartition("/")[2]), file)
                if other is not file:
                    found.bad.append(BadFile(Path(file.path), f"and {other.path} are one sample by their names"))
    return found


def walk(
    folder: Path, suffixes: Sequence[str], depth: int | None = None, leave_out: Callable[[str], bool] | None = None
) -> Iterator[tuple[str, list[File]] | BadFile]:
    """Everything below a folder: its folders, by the path in it, with their files, and what is bad.

    Hidden names are left out. Links are followed after everything else, and a folder or file that was seen already is
    bad the second time: a link cannot make two samples of one, nor lead in a circle. A folder may be named again, with
    files behind links.

    Args:
        suffixes: of the files, in lower case; names are compared in lower case.
        depth: of the deepest folders to look into, 0 is ``folder`` itself; deeper ones are bad. None: any.
        leave_out: tells by the name whether something in ``folder`` itself is not looked at.
    """
    seen: dict[tuple[int, int], str] = {}  # folders
    numbers, linked_files = array("q"), list[tuple[str, str]]()  # of files: hashes, as there may be millions
    folders, links = deque([(str(folder), "")]), deque[tuple[str, str]]()
    wanted = tuple(suffixes)
    while folders or links:
        place, inside = (folders or links).popleft()
        try:
            status = os.stat(place)
            other = seen.setdefault((status.st_dev, status.st_ino), place)
            if other is not place:
                yield BadFile(Path(place), f"is a link to {other}, which is read already; remove one of them")
                continue
            with os.scandir(place) as entries:
                found = list(entries)
        except OSError as error:
            yield BadFile(Path(place), f"cannot be read ({error.strerror or error})")
            continue
        files = []
        for entry in found:
            name = entry.name
            if name.startswith((".", "__MACOSX")) or (leave_out is not None and not inside and leave_out(name)):
                continue
            is_sample = name.lower().endswith(wanted)
            try:
                status = entry.stat()
            except OSError as error:
                if is_sample or "." not in name:
                    what = "is a link to nothing" if entry.is_symlink() else f"cannot be read ({error.strerror})"
                    yield BadFile(Path(entry.path), what, _sample(inside, name) if is_sample else "")
                continue
            if stat.S_ISREG(status.st_mode):
                if not is_sample:
                    continue
                if "\n" in name:
                    yield BadFile(Path(entry.path), "has a line break in its name; rename it")
                elif entry.is_symlink():
                    linked_files.append((inside, entry.path))
                else:
                    numbers.append(hash((status.st_dev, status.st_ino)))
                    files.append(File(entry.path, Stamp(status.st_size, status.st_mtime_ns)))
            elif stat.S_ISDIR(status.st_mode):
                deeper = f"{inside}/{name}" if inside else name
                if depth is not None and deeper.count("/") >= depth:
                    yield BadFile(Path(entry.path), "is a folder inside a class and is not read; move it away")
                else:
                    (links if entry.is_symlink() else folders).append((entry.path, deeper))
            elif is_sample:
                kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
                yield Special(Path(entry.path), f"is {kind} and no file; remove it", _sample(inside, name))
        yield inside, files
    targets = set(numbers) if linked_files else set()
    for inside, path in linked_files:
        status = os.stat(path)
        number = hash((status.st_dev, status.st_ino))
        if number in targets:
            yield BadFile(Path(path), "is a link to a sample that is read already; remove it")
        else:
            targets.add(number)
            yield inside, [File(path, Stamp(status.st_size, status.st_mtime_ns))]


def _sample(folder: str, name: str) -> str:
    return f"{folder}/{name.rpartition('.')[0]}"


def listing(bad: Sequence[BadFile]) -> str:
    """A line for each; where very many have the same fault, the first three of them and how many more there are."""
    kinds: dict[str, list[BadFile]] = {}
    for file in sorted(bad):
        kinds.setdefault(re.sub(r"\d+", "", file.what), []).append(file)
    lines = []
    for alike in kinds.values():
        shown = alike if len(alike) <= _ALIKE else alike[:3]
        lines += [str(file) for file in shown]
        if len(shown) < len(alike):
            lines.append(f"... and {len(alike) - len(shown)} more with the same fault")
    return "".join(f"\n  {line}" for line in lines)

"""Recordings of any camera, a sample each: which format a file has, its events, and the sensor size that it states.

===========================  ==========================================================================================
``.npz``                     arrays ``t``, ``x``, ``y``, ``p``, as SpikingJelly writes them
``.npy``                     one array with the fields ``t``, ``x``, ``y``, ``p`` (or ``on``)
``.bin``                     5 bytes an event (N-MNIST, N-Caltech101)
``.aedat``                   AEDAT 2.0 of a DVS128 camera, AEDAT 3.1
``.aedat4``                  AEDAT 4, read by the package aedat
``.raw``, ``.dat``           EVT 2, EVT 2.1 and EVT 3 of Prophesee cameras, read by the package faery
===========================  ==========================================================================================
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.data.folders import BadFile, read_folder
from utils.prepare.arrays import read_array
from utils.prepare.datasets import DataSet
from utils.prepare.events import checked_events, read_events
from utils.prepare.recordings import Events, Recording, RecordingError, read_aedat2, read_aedat3, read_bin

__all__ = ["SUFFIXES", "Read", "find_any_recordings", "read_recording"]

_OWN_FOLDERS = re.compile(r"(events_np|splits|download|extract|(frames_number|packed)_.*)$")
_CUT = "is cut off inside an event, at byte {}"


class Read(NamedTuple):
    """What a file holds."""

    events: Events
    sensor: tuple[int, int] | None  # (H, W) that it states


def read_recording(path: Path) -> Read:
    """The events of a file in one of the formats above, checked.

    Raises:
        RecordingError: it is damaged, has no events, has events outside the size that it states, or needs a package
            that is not installed.
    """
    if not path.is_file():  # a named pipe would never end
        raise RecordingError(path, "is not there, or no file")
    events, sensor = _READERS[path.suffix.lower()](path)
    return Read(checked_events(path, events, sensor), sensor)


def find_any_recordings(folder: Path, about: DataSet) -> tuple[list[Recording], list[BadFile]]:
    """The recordings of a folder of classes, without what preparation itself puts there."""
    found = read_folder(folder, SUFFIXES, about.parts, lambda name: _OWN_FOLDERS.match(name) is not None)
    recordings = [Recording(f.path, (name,), f.stamp.changed, _read_alone) for name, f in found.files.items()]
    return recordings, found.bad + (found.without_samples("recordings") if recordings else [])


def _read_alone(path: Path) -> list[Events]:
    return [read_recording(path).events]


def _read_npz(path: Path) -> Read:
    return Read(read_events(path), None)


def _read_npy(path: Path) -> Read:
    try:
        with path.open("rb") as file:
            array = read_array(file)
    except Exception as error:  # numpy raises many types on a damaged file
        what = f"cannot be read, it is damaged or cut off ({type(error).__name__}: {error})"
        raise RecordingError(path, what) from error
    fields = array.dtype.names or ()
    polarity = next((name for name in ("p", "on") if name in fields), None)
    if polarity is None or not {"t", "x", "y"} <= set(fields):
        raise RecordingError(path, f"has the fields {', '.join(fields) or 'none'} and t, x, y and p are needed")
    return Read({"t": array["t"], "x": array["x"], "y": array["y"], "p": array[polarity]}, None)


def _read_bin(path: Path) -> Read:
    return Read(read_bin(path), None)


def _read_aedat(path: Path) -> Read:
    with path.open("rb") as file:
        old = file.read(11) == b"#!AER-DAT2."
    if old:
        return Read(read_aedat2(path), (128, 128))
    events, cut = read_aedat3(path)
    if cut:
        raise RecordingError(path, "is cut off inside a packet")
    return Read(events, None)


def _read_aedat4(path: Path) -> Read:
    aedat = _package("aedat", path)
    packets: list[np.ndarray] = []
    sizes: set[tuple[int, int]] = set()

    def read() -> None:
        decoder = aedat.Decoder(str(path))
        sizes.update((s["height"], s["width"]) for s in decoder.id_to_stream().values() if s["type"] == "events")
        packets.extend(packet["events"] for packet in decoder if "events" in packet)

    _by_package(path, read)
    if len(sizes) != 1:
        raise RecordingError(path, f"has the events of {len(sizes)} cameras; one is needed")
    return Read(_joined(packets), sizes.pop())


def _read_with_faery(path: Path) -> Read:
    faery = _package("faery", path)
    _check_length(path)
    packets: list[np.ndarray] = []
    sizes: list[tuple[int, int]] = []

    def read() -> None:
        stream = faery.events_stream_from_file(path, dimensions_fallback=(0, 0))
        sizes.append(stream.dimensions())
        packets.extend(stream)

    _by_package(path, read)
    width, height = sizes[0]
    return Read(_joined(packets), (height, width) if width and height else None)


def _check_length(path: Path) -> None:
    """Lines that begin with ``%``, then words of one size: faery passes over a word that is cut off."""
    data = path.read_bytes()
    position, header = 0, b""
    while data.startswith(b"%", position):
        end = data.find(b"\n", position)
        end = len(data) if end < 0 else end + 1
        header, position = header + data[position:end], end
    if path.suffix.lower() == ".dat":
        word, position = 8, position + 2  # type and size of an event
    else:
        version = header.lower()
        word = 2 if b"evt 3" in version or b"evt3" in version else 8 if b"evt 2.1" in version else 4
        if b"evt" not in version:
            raise RecordingError(path, "is no EVT recording (no '% evt' line)")
    if len(data) < position or (len(data) - position) % word:
        raise RecordingError(path, _CUT.format(len(data)))


def _joined(packets: list[np.ndarray]) -> Events:
    if not packets:
        return {name: np.zeros(0, np.int64) for name in ("t", "x", "y", "p")}
    events = np.concatenate(packets)
    return {"t": events["t"].astype(np.int64), "x": events["x"], "y": events["y"], "p": events["on"]}


def _package(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RecordingError(path, f"needs the package {name} to be read: pip install {name}") from error


def _by_package(path: Path, read: Callable[[], None]) -> None:
    """A package in Rust raises whatever it wants on a damaged file, a panic among it."""
    try:
        read()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise RecordingError(path, f"cannot be read, it is damaged or cut off ({error})") from error


_READERS: dict[str, Callable[[Path], Read]] = {
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".bin": _read_bin,
    ".aedat": _read_aedat,
    ".aedat4": _read_aedat4,
    ".raw": _read_with_faery,
    ".dat": _read_with_faery,
}
SUFFIXES = tuple(_READERS)

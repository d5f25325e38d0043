"""Raw event recordings of the three data sets, read from any bytes: valid events, or an error that names the file.

==============  ============================================================================================
DVS128 Gesture  AEDAT 3.1 (little-endian packets) with a table of labelled time spans beside each recording
CIFAR10-DVS     AEDAT 2.0 (big-endian pairs of address and time stamp)
N-Caltech101    ``.bin``, 5 bytes an event
==============  ============================================================================================

Events are a dictionary of equally long arrays ``t`` (microseconds), ``x``, ``y`` (pixels) and ``p`` (polarity, 0 or 1),
with the values and types that SpikingJelly's readers give. Those of AEDAT are replaced: that of 3.1 takes an event at a
time in Python and as much memory as a packet claims, that of 2.0 raises on current numpy in 0.0.0.0.14. Events take at
most about 14 times the size of their file in memory (packets of one event each; 8 times in long ones), labels 25 times.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.data.folders import BadFile, read_folder
from utils.errors import DataError
from utils.prepare.datasets import DataSet

__all__ = [
    "Events",
    "Recording",
    "RecordingError",
    "Span",
    "find_recordings",
    "read_aedat2",
    "read_aedat3",
    "read_bin",
    "read_spans",
]

Events = dict[str, np.ndarray]

_END_OF_HEADER = b"#!END-HEADER\r\n"
_PACKET = struct.Struct("<HHIIIIII")  # type, source, bytes of an event, ..., overflow, capacity, number, valid
_POLARITY = 1  # the type of packet that holds events of pixels
_LABELS = range(1, 12)


class RecordingError(DataError):
    """A file that is no such recording, or not a whole one. ``what`` is what is wrong, without the path."""

    def __init__(self, path: Path, what: str):
        super().__init__(f"{path}: {what}")
        self.path, self.what = path, what


class Span(NamedTuple):
    """A labelled part of a recording of DVS128 Gesture: label from 0, times in microseconds."""

    label: int
    start: int
    end: int


class Recording(NamedTuple):
    """A recording, and the samples (their paths below the folder of events) that it gives."""

    path: str
    samples: tuple[str, ...]
    changed: int  # nanoseconds: the last change of anything that its samples depend on
    reader: Callable[..., list[Events]]
    spans: tuple[Span, ...] = ()  # of DVS128 Gesture

    def read(self) -> list[Events]:
        """The events of every sample.

        Raises:
            RecordingError
        """
        return self.reader(Path(self.path), *([self.spans] if self.spans else []))


def find_recordings(folder: Path, about: DataSet) -> tuple[list[Recording], list[BadFile]]:
    """What there is to convert; and lists, labels and classes that are not as they should be."""
    if about.has_split:
        return _find_labelled(folder) if any(folder.glob(f"*{about.suffix}")) else ([], [])
    found = read_folder(folder, (about.suffix,))
    reader = _read_aedat2_alone if about.suffix == ".aedat" else _read_bin_alone
    recordings = [Recording(file.path, (name,), file.stamp.changed, reader) for name, file in found.files.items()]
    return recordings, found.bad + (found.without_samples(f"{about.suffix} files") if recordings else [])


def _read_aedat2_alone(path: Path) -> list[Events]:
    return [read_aedat2(path)]


def _read_bin_alone(path: Path) -> list[Events]:
    return [read_bin(path)]


def _find_labelled(folder: Path) -> tuple[list[Recording], list[BadFile]]:
    """The recordings that the two lists of DVS128 Gesture name."""
    found, bad = [], []
    for part in ("train", "test"):
        listed = folder / f"trials_to_{part}.txt"
        try:
            lines = _contents(listed).decode().splitlines()
        except (RecordingError, UnicodeDecodeError) as error:
            bad.append(BadFile(listed, getattr(error, "what", "is no text")))
            continue
        for path in (folder / Path(line.strip()).name for line in lines if line.strip()):
            labels = path.with_name(f"{path.stem}_labels.csv")
            try:
                spans = read_spans(labels)
            except RecordingError as error:
                bad.append(BadFile(error.path, error.what))
                continue
            counts = dict.fromkeys((span.label for span in spans), 0)
            samples = []
            for span in spans:
                samples.append(f"{part}/{span.label}/{path.stem}_{counts[span.label]}")
                counts[span.label] += 1
            changed = max(_changed(path), _changed(labels))
            found.append(Recording(str(path), tuple(samples), changed, _read_labelled, tuple(spans)))
    return found, bad


def _read_labelled(path: Path, spans: Sequence[Span]) -> list[Events]:
    """The events of each labelled span of a recording of DVS128 Gesture.

    Raises:
        RecordingError
    """
    events, cut = read_aedat3(path)
    last = int(events["t"].max(initial=0))
    beyond = [span for span in spans if span.end > last]
    if cut and beyond:
        raise RecordingError(path, f"is cut off at {last} us, before the end of {len(beyond)} of its labelled spans")
    inside = (np.flatnonzero((events["t"] >= span.start) & (events["t"] < span.end)) for span in spans)
    return [{name: values[chosen] for name, values in events.items()} for chosen in inside]


def _changed(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def read_aedat3(path: Path) -> tuple[Events, bool]:
    """Read AEDAT 3.1, the format of DVS128 Gesture.

    Text lines that begin with ``#`` up to ``#!END-HEADER``, then packets: a header of 28 bytes and ``capacity`` events.
    An event of a pixel is 8 bytes: a word with x in bits 17-31, y in bits 2-16 and the polarity in bit 1, then the time
    stamp, above whose 31 bits the packet's overflow counter goes. Source: iniVation's description of AEDAT 3.1, and
    SpikingJelly, whose result this is, to the bit.

    Returns:
        The events, and whether the last packet is cut off (behind a whole event).

    Raises:
        RecordingError
    """
    data = _contents(path)
    start = data.find(_END_OF_HEADER)
    if not data.startswith(b"#!AER-DAT3") or start < 0:
        raise RecordingError(path, "is no AEDAT 3 recording (no '#!AER-DAT3' or no '#!END-HEADER' line)")
    position, cut = start + len(_END_OF_HEADER), False
    words, overflows = [np.empty((0, 2), "<u4")], [np.empty(0, np.int64)]
    while position < len(data) and not cut:
        if len(data) - position < _PACKET.size:
            raise RecordingError(path, f"is cut off inside the header of a packet, at byte {len(data)}")
        kind, _, size, _, overflow, capacity, _, _ = _PACKET.unpack_from(data, position)
        position += _PACKET.size
        there = min(size * capacity, len(data) - position)
        cut = there < size * capacity
        if kind == _POLARITY and there:
            if size < 8 or there % size:
                raise RecordingError(path, f"is damaged or cut off inside an event, near byte {position + there}")
            packet = np.frombuffer(data, np.uint8, there, position).reshape(-1, size)
            words.append(np.ascontiguousarray(packet[:, :8]).view("<u4"))
            overflows.append(np.full(len(packet), overflow << 31, np.int64))
        position += there
    address, stamp = np.concatenate(words).astype(np.int64).T
    return {
        "t": stamp | np.concatenate(overflows),
        "x": (address >> 17) & 0x7FFF,
        "y": (address >> 2) & 0x7FFF,
        "p": (address >> 1) & 1,
    }, cut


def read_spans(path: Path) -> list[Span]:
    """Read the labels beside a recording of DVS128 Gesture: a heading, then lines ``class,start,end``, class from 1.

    Raises:
        RecordingError
    """
    try:
        lines = _contents(path).decode("utf-8-sig").split("\n")[1:]
    except UnicodeDecodeError as error:
        raise RecordingError(path, f"is no text ({error.reason})") from error
    spans = []
    for number, line in enumerate(lines, 2):
        fields = [field.strip() for field in line.split(",")]
        if fields == [""]:
            continue
        if len(fields) != 3 or not all(field.isdecimal() and len(field) < 19 for field in fields):
            raise RecordingError(
                path, f"line {number}: {line.strip()[:60]!r} is not 'class,start,end' in whole numbers"
            )
        label, start, end = map(int, fields)
        if label not in _LABELS:
            raise RecordingError(path, f"line {number}: class {label} is not one of 1 to {_LABELS[-1]}")
        spans.append(Span(label - 1, start, end))
    if not spans:
        raise RecordingError(path, "has no labelled spans")
    return spans


def read_aedat2(path: Path) -> Events:
    """Read AEDAT 2.0 of a DVS128 camera, the format of CIFAR10-DVS.

    Text lines that begin with ``#``, then for each event two big-endian words of 32 bits: the address (polarity in bit
    0, x in bits 1-7, y in bits 8-14) and the time stamp. As in SpikingJelly both axes are mirrored and exchanged, and
    the polarity is inverted, so that the pictures stand upright. Source: jAER's description of AEDAT 2.0.

    Raises:
        RecordingError
    """
    data = _contents(path)
    if not data.startswith(b"#!AER-DAT2"):
        raise RecordingError(path, "is no AEDAT 2.0 recording (no '#!AER-DAT2.0' line)")
    position = 0
    while data.startswith(b"#", position):
        end = data.find(b"\n", position)
        position = len(data) if end < 0 else end + 1
    if (len(data) - position) % 8:
        raise RecordingError(path, f"is cut off inside an event, at byte {len(data)}")
    address, stamp = np.frombuffer(data, ">u4", offset=position).astype(np.uint32).reshape(-1, 2).T
    if not len(stamp):
        raise RecordingError(path, "has no events")
    x, y, p = (address & 0xFE) >> 1, (address & 0x7F00) >> 8, (address & 1).astype(np.int64)
    return {"t": stamp.copy(), "x": 127 - y, "y": 127 - x, "p": 1 - p}


def read_bin(path: Path) -> Events:
    """Read the format of N-Caltech101 (and N-MNIST): 5 bytes an event, x, y, then polarity and 23 bits of time.

    Raises:
        RecordingError
    """
    data = _contents(path)
    if not data or len(data) % 5:
        what = "is empty" if not data else f"is cut off inside an event: {len(data)} bytes are no multiple of 5"
        raise RecordingError(path, what)
    x, y, high, middle, low = np.frombuffer(data, np.uint8).reshape(-1, 5).T.astype(np.uint32)
    return {"t": ((high & 127) << 16) | (middle << 8) | low, "x": x, "y": y, "p": high >> 7}


def _contents(path: Path) -> bytes:
    try:
        if not path.is_file():  # a named pipe would never end
            raise RecordingError(path, "is not there, or no file")
        return path.read_bytes()
    except OSError as error:
        raise RecordingError(path, f"cannot be read ({error.strerror or error})") from error

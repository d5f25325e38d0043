"""A user's recordings: folders of classes become a data set that every event script trains on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import read_text, write_text
from utils.prepare.datasets import DataSet, own_recordings
from utils.prepare.events import extent, read_events
from utils.prepare.formats import read_recording
from utils.prepare.job import Job
from utils.prepare.lock import one_process_at_a_time
from utils.prepare.recordings import RecordingError
from utils.prepare.stages import convert, find

__all__ = ["describe_recordings", "own_data_set"]

_FILE = "data.json"
_PARTS = ("train", "test")
# (H, W) of cameras: events rarely fill the last rows and columns of a sensor.
_CAMERAS = ((34, 34), (100, 120), (128, 128), (180, 240), (240, 304), (260, 346), (480, 640), (720, 1280))
_FILLED = 0.9


def own_data_set(data_dir: Path) -> DataSet | None:
    """The data set that :func:`describe_recordings` has found in a folder; None where it was not there.

    Raises:
        UserError: its file holds something else.
    """
    text = read_text(data_dir / _FILE)
    if text is None:
        return None
    try:
        found = json.loads(text)
        height, width = map(int, found["sensor"])
        parts = tuple(map(str, found["parts"]))
        if min(height, width) < 1 or len(parts) not in (0, 2):
            raise ValueError(f"sensor {height}x{width}, parts {parts}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{data_dir / _FILE} does not describe recordings ({type(error).__name__}: {error}); delete it and run "
            f"tools/prepare_data.py folder --data-dir {data_dir}"
        ) from error
    return own_recordings(data_dir.resolve().name, (height, width), parts)


def describe_recordings(
    data_dir: Path, sensor_size: Sequence[int] | None, workers: int | None, skip_bad: bool
) -> DataSet:
    """Convert the recordings of a folder to events, find the size of their camera, and write both down.

    Args:
        data_dir: holds ``<class>/<recording>``, or two folders ``train`` and ``test`` with them.
        sensor_size: (H, W) of the camera; None finds it.
        workers: threads; the cores where it is None.
        skip_bad: leave bad recordings out.

    Raises:
        UserError: there are no recordings, or they cannot be read.
        OSError: no room, or the folder cannot be written to.
    """
    known = own_data_set(data_dir)
    folders = {path.name.lower(): path.name for path in sorted(data_dir.glob("*")) if path.is_dir()}
    if not set(_PARTS) <= folders.keys():
        folders = {path.name.lower(): path.name for path in sorted(data_dir.glob("events_np/*")) if path.is_dir()}
    parts = tuple(folders[part] for part in _PARTS) if set(_PARTS) <= folders.keys() else ()
    about = own_recordings(data_dir.resolve().name, (0, 0), parts)
    job = Job(about, data_dir, 1, (0, 0), skip_bad=skip_bad, official=False)
    job.workers = workers or job.workers
    if not data_dir.is_dir():
        raise UserError(about.missing(data_dir))
    with one_process_at_a_time(data_dir):
        for stage in (find, convert):
            stage(job)
        job.refuse()
        if not job.events.files:
            raise UserError(about.missing(data_dir))
        if sensor_size is not None:
            (height, width), how = sensor_size, "as given"
        elif known is not None:
            (height, width), how = known.sensor, "as found before"
        else:
            (height, width), how = _sensor(job)
        text = json.dumps({"sensor": [height, width], "parts": parts}) + "\n"
        write_text(data_dir / _FILE, text)
    classes = {name.split("/")[-2] for name in job.events.files}
    print(
        f"{len(job.events.files)} recordings in {len(classes)} classes, of a camera with {height}x{width} pixels "
        f"({how}; --sensor-size gives another size)",
        flush=True,
    )
    return own_recordings(about.title, (height, width), parts)


def _sensor(job: Job) -> tuple[tuple[int, int], str]:
    """(H, W) of the camera, and how it was found."""
    if job.recordings:
        try:
            stated = read_recording(Path(job.recordings[0].path)).sensor
        except RecordingError:
            stated = None
        if stated is not None:
            return stated, "as the files state"
    sizes = job.in_threads(lambda file: extent(read_events(Path(file.path))), list(job.events.files.values()), "size")
    height, width = np.max(sizes, 0).tolist()
    for camera in _CAMERAS:
        if all(_FILLED * side <= there <= side for side, there in zip(camera, (height, width), strict=True)):
            return camera, f"events fill {height}x{width} of it"
    return (height, width), "as far as there are events"

"""Checking a data set: stages that read everything there is and change nothing."""

from __future__ import annotations

from pathlib import Path

from utils.data.folders import BadFile
from utils.data.store import damage
from utils.errors import UserError
from utils.prepare.archives import archive_fault, contents_fault
from utils.prepare.events import checked_events, read_events
from utils.prepare.job import Job
from utils.prepare.recordings import Recording, RecordingError
from utils.prepare.spikingjelly_data import published_md5
from utils.prepare.stages import check, find, older_frames, split

__all__ = ["CHECKS"]


def check_archives(job: Job) -> None:
    """Read every archive."""
    about, root = job.about, job.data_dir
    made = job.recordings or job.events.files or any(root.glob("frames_number_*"))
    if job.archives and not (job.any_archive or made):
        absent = [name for name in about.archives if name not in job.archives]
        job.bad += [BadFile(root / "download" / name, f"is missing; download it from {about.page}") for name in absent]
    md5 = published_md5(about.reader) if job.archives else {}
    for name, path in job.archives.items():
        try:
            fault = archive_fault(path, md5[name], job.any_archive, None)
            fault = fault or (contents_fault(path) if job.any_archive else "")
        except OSError as error:
            fault = f"cannot be read ({error.strerror or error})"
        job.bad += [BadFile(path, fault)] if fault else []
    job.counts["archives"] = len(job.archives)


def check_recordings(job: Job) -> None:
    """Read every recording."""

    def work(recording: Recording) -> BadFile | None:
        try:
            for events in recording.read():
                checked_events(Path(recording.path), events, job.about.sensor)
        except RecordingError as error:
            return BadFile(error.path, error.what, recording.samples[0])
        return None

    job.bad += filter(None, job.in_threads(work, job.recordings, "checking recordings"))
    job.counts["recordings"] = len(job.recordings)


def check_events(job: Job) -> None:
    """Read every file of events."""
    files = job.events.files

    def work(name: str) -> BadFile | None:
        try:
            read_events(Path(files[name].path), job.about.sensor)
        except RecordingError as error:
            return BadFile(error.path, error.what, name)
        return None

    job.bad += filter(None, job.in_threads(work, list(files), "checking events"))
    job.bad += job.events.without_samples()
    job.counts["event files"] = len(files)


def check_ages(job: Job) -> None:
    """Is anything older than what it was made from?"""
    events, bad = job.events.files, job.bad_samples
    what = "is older than {}; it is made again at the next start"
    for recording in job.recordings:
        for name in recording.samples:
            if name in events and name not in bad and events[name].stamp.changed < recording.changed:
                job.bad.append(BadFile(Path(events[name].path), what.format(f"its recording {recording.path}"), name))
    for name in older_frames(job):
        if name not in bad:
            path = Path(job.frames.files[name].path)
            job.bad.append(BadFile(path, what.format(f"its events {events[name].path}"), name))


def check_stores(job: Job) -> None:
    """Read every sample of the packed frames for this T."""
    height, width = job.about.sensor
    stores = sorted(job.data_dir.glob(f"packed_T{job.T}_{height}x{width}*/*.b2nd"))
    job.bad += [BadFile(path, what) for path in stores if (what := damage(path))]
    job.counts["packed stores"] = len(stores)


def need_anything(job: Job) -> None:
    """Raise UserError where there was nothing to read."""
    job.counts = {what: count for what, count in job.counts.items() if count}
    if not job.counts:
        raise UserError(job.about.missing(job.data_dir))


CHECKS = (
    *(find, check_archives, check_recordings, check_events, check, split, check_ages, check_stores, need_anything),
)

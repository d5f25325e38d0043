"""Preparing a data set: a list of stages over one record, from the archives or recordings to packed frames, once.

    <data-dir>/download/   the official archives           (put there by hand)
    <data-dir>/extract/    the recordings                  (unpacked from the archives)
    <data-dir>/events_np/  one .npz of events a sample     (as SpikingJelly makes them)
    <data-dir>/frames_number_<T>_split_by_number/          (as SpikingJelly makes them, one folder for each T)
    <data-dir>/packed_T<T>_<H>x<W>/                        (what training reads, a file for each part of a split)

You can start from any of these: what is there is used, and what is missing, or older than what it was made from, is
made from what comes before it. A file grows under the name ``.<name>.partial`` and a folder under
``.building-<name>``, so that what this program gives its name is whole; the same call continues where a killed one
stopped. A folder that has its name and files already, as SpikingJelly may leave it, is completed where it is.

Frames are read through when they are new or have changed; ``--check`` (utils/prepare/checks.py) reads everything.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from utils.data.folders import BadFile, Stamp, listing
from utils.data.splits import RULES, Split, changes, make_split, read_split
from utils.data.store import Contents, count_type, encode, open_store, write_store
from utils.errors import DataError, UserError
from utils.files import read_text, write_text
from utils.prepare import archives
from utils.prepare.building import any_file, building_folder, finish, save_arrays
from utils.prepare.events import extent, read_events
from utils.prepare.formats import find_any_recordings
from utils.prepare.frames import Facts, facts_of, read_frames, read_record, resized, write_record
from utils.prepare.job import Job
from utils.prepare.recordings import Recording, RecordingError, find_recordings
from utils.prepare.spikingjelly_data import integrate as frames_of
from utils.prepare.spikingjelly_data import published_md5

__all__ = ["STAGES", "check", "find", "older_frames", "split"]

_UNKNOWN = Stamp(-1, -1)
_LOOKED_AT = 32  # event files, before frames are made of all
_FILLED = 0.75  # of the sensor, in height or width: less is another camera
_AT_A_TIME = 512  # samples in memory while they are packed


# What there is --------------------------------------------------------------------------------------------------------


def find(job: Job) -> None:
    """List archives, recordings, events and frames."""
    if job.about.is_split_by_folder:  # nothing else is needed
        job.frames = job.read(job.frames_dir)
        job.bad += job.frames.bad
        return
    job.archives = archives.find_archives(job.data_dir, job.about.archives)
    find_them = find_any_recordings if job.about.is_own else find_recordings
    job.recordings, bad = find_them(job.recordings_dir, job.about)
    job.events, job.frames = job.read(job.events_dir), job.read(job.frames_dir)
    job.known = read_record(job.record)
    job.bad += bad + job.events.bad + job.frames.bad
    _check_classes(job)


def _check_classes(job: Job) -> None:
    """Before anything is made of them: are these all classes?"""
    recorded = [name for recording in job.recordings for name in recording.samples]
    stages = [(job.frames.path, job.frames.files), (job.events.path, job.events.files), (job.recordings_dir, recorded)]
    there = [(folder, set(names)) for folder, names in stages if names]
    if job.change:  # what one stage lacks, another may have
        there = [(there[0][0], set().union(*(names for _, names in there)))] if there else []
    lacking = []
    for folder, names in there if job.official else ():
        lacking += job.about.lacking_classes(folder, names, job.bad)
    job.bad += lacking
    if not job.change:
        return
    job.refuse(lacking)
    classes = {name.split("/")[-2] for _, names in there for name in names}
    if classes and job.num_classes is not None and len(classes) != job.num_classes:
        raise UserError(
            f"--data-dir {job.data_dir} has {len(classes)} classes and the network {job.num_classes}; give the data "
            "that the weights were trained on"
        )


# Archives to recordings -----------------------------------------------------------------------------------------------


def unpack(job: Job) -> None:
    """Unpack the archives, where there is nothing that comes behind them."""
    if job.recordings or job.events.files or job.frames.files or job.bad:
        return
    about, extract = job.about, job.data_dir / "extract"
    absent = [name for name in about.archives if name not in job.archives]
    if not job.archives:
        raise UserError(_nothing(job))
    if absent and not job.any_archive:
        raise UserError(f"{job.data_dir / 'download'} lacks {', '.join(absent)}; download from {about.page}")
    if any_file(extract):  # unpacking into it could be cut short, and be taken for whole
        raise UserError(
            f"folder {extract} has files and no {about.suffix} files in {about.recordings or 'class folders'}; move it "
            "away to have the archives unpacked"
        )
    md5 = published_md5(about.reader)
    for name, path in job.archives.items():
        fault = archives.archive_fault(path, md5[name], job.any_archive, job.data_dir / ".checked_archives")
        if fault:
            raise UserError(
                f"archive {path} {fault}; download it again, or take other recordings in the same layout by "
                "tools/prepare_data.py --any-archive"
            )
    # What a killed process unpacked is used only if it came from the very same archives.
    paths = list(job.archives.values())
    stamps = "".join(f"{p.stat().st_size} {p.stat().st_mtime_ns} {p.name}\n" for p in paths)
    begun, folder = job.data_dir / ".unpacking", building_folder(extract)
    if read_text(begun) != stamps:
        shutil.rmtree(folder)
        write_text(begun, stamps)
        folder.mkdir()
    archives.unpack_all(paths, folder)
    job.recordings, bad = find_recordings(folder / about.recordings, about)
    if not job.recordings and not bad:
        raise UserError(
            f"{', '.join(map(str, paths))} hold no {about.suffix} files in {about.recordings or 'class folders'}; use "
            "the official ones"
        )
    begun.unlink(missing_ok=True)
    finish(folder, extract)
    job.recordings, bad = find_recordings(job.recordings_dir, about)
    job.bad += bad
    _check_classes(job)


def _nothing(job: Job) -> str:
    """The sentence where there are neither archives nor anything made of them."""
    folders = (
        path.name.split("_")[2] for path in job.data_dir.glob("frames_number_*_split_by_number") if job.read(path).files
    )
    others = sorted(int(number) for number in folders if number.isdecimal())
    if not others:
        return job.about.missing(job.data_dir)
    return (
        f"--data-dir {job.data_dir} has frames for T = {', '.join(map(str, others))} and {job.T} are asked for; give "
        "one of these as -T, or put events_np/ there, from which the others are made"
    )


# Recordings to events -------------------------------------------------------------------------------------------------


def convert(job: Job) -> None:
    """Make the events that are missing, or older than their recording."""
    frames, events, final = job.frames.files, job.events.files, job.events_dir
    wanted = [(name, recording.changed) for recording in job.recordings for name in recording.samples]
    if not events and all(name in frames and frames[name].stamp.changed >= changed for name, changed in wanted):
        return  # frames alone are a good start; recordings beside them say whether one is missing
    folder = final if events else building_folder(final)
    there = {
        name: file.stamp.changed for name, file in (job.events if folder == final else job.read(folder)).files.items()
    }
    left = [r for r in job.recordings if any(there.get(name, -1) < r.changed for name in r.samples)]
    if not left and folder == final:
        return
    print(f"converting {len(left)} recordings in {job.recordings_dir} ...", flush=True)

    def make(recording: Recording) -> list[BadFile]:
        try:
            samples = recording.read()
        except RecordingError as error:
            return [BadFile(error.path, error.what, name) for name in recording.samples]
        for name, made in zip(recording.samples, samples, strict=True):
            # As old as the recording: made once more they are the same events, and their frames are not made again.
            save_arrays(folder / f"{name}.npz", made, recording.changed)
        return []

    for bad in job.in_threads(make, left, "events"):
        job.bad += bad
    if not job.bad or job.skip_bad:
        finish(folder, final)
        folder = final
    job.events = job.read(folder)


# Events to frames -----------------------------------------------------------------------------------------------------


def integrate(job: Job) -> None:
    """Make the frames that are missing, or older than their events."""
    events, final = job.events.files, job.frames_dir
    left = [name for name in events if name not in job.frames.files]
    old = older_frames(job)
    if not left and not (old and job.writable):
        if old:
            print(
                f"{len(old)} frames are older than their events ({old[0]} ...); {job.data_dir} cannot be written to",
                flush=True,
            )
        return
    left += old
    _check_sensor(job, left)
    # What SpikingJelly 2.x would stop on, where it was killed.
    final.with_name(f"{final.name}.building").unlink(missing_ok=True)
    folder = building_folder(final)
    if folder == final:  # perhaps SpikingJelly was killed in it
        left += [
            name for name, file in job.frames.files.items() if name in events and not zipfile.is_zipfile(file.path)
        ]
    else:
        there = job.read(folder).files
        left = [n for n in left if n not in there or there[n].stamp.changed < events[n].stamp.changed]
    print(f"making {job.T} frames of {len(left)} samples in {job.data_dir} ...", flush=True)

    def make(name: str) -> BadFile | None:
        try:
            made = frames_of(read_events(Path(events[name].path), job.about.sensor), job.T, job.about.sensor)
        except RecordingError as error:
            return BadFile(error.path, error.what, name)
        save_arrays(folder / f"{name}.npz", {"frames": made})
        return None

    job.bad += filter(None, job.in_threads(make, sorted(set(left)), "frames"))
    if not job.bad or job.skip_bad:
        finish(folder, final)
        folder = final
    job.frames = job.read(folder)


def older_frames(job: Job) -> list[str]:
    """Samples whose frames are older than their events, or made of events that have changed since."""
    old = []
    for name in job.frames.files.keys() & job.events.files.keys():
        frames, events = job.frames.files[name].stamp, job.events.files[name].stamp
        stamp, source, _ = job.known.get(name, (None, _UNKNOWN, None))
        same = source == events if stamp == frames and source != _UNKNOWN else frames.changed >= events.changed
        if not same:
            old.append(name)
    return sorted(old)


def _check_sensor(job: Job, samples: list[str]) -> None:
    """Before frames are made: do a few recordings fit the sensor?"""
    if not job.official:
        return
    looked_at = samples[:: -(-len(samples) // _LOOKED_AT)]
    sizes = []
    for name in looked_at:
        with contextlib.suppress(RecordingError):
            sizes.append(extent(read_events(Path(job.events.files[name].path))))
    if not sizes:
        return
    (height, width), sensor = np.max(sizes, 0).tolist(), job.about.sensor
    beyond = sum(h > sensor[0] or w > sensor[1] for h, w in sizes)
    if 2 * beyond > len(sizes) or (height < _FILLED * sensor[0] and width < _FILLED * sensor[1]):
        raise UserError(
            f"the events in {job.events.path} fill {height}x{width} pixels and the camera of {job.about.title} has "
            f"{sensor[0]}x{sensor[1]}; give the size of theirs as --sensor-size, for instance {height}x{width}"
        )


# Checks and splits ----------------------------------------------------------------------------------------------------


def check(job: Job) -> None:
    """Read the frames that are new or have changed since they were read."""
    files, events = job.frames.files, job.events.files
    if not files:
        if job.change:
            job.refuse()
            raise UserError(f"{job.frames.path} has no samples; check the contents of {job.data_dir}")
        return
    known = job.known if job.change else {}
    sources = {name: events[name].stamp if name in events else _UNKNOWN for name in files}
    job.facts = {name: known[name][2] for name in files if name in known and known[name][0] == files[name].stamp}
    left = [name for name in files if name not in job.facts]

    def inspect(name: str) -> Facts | BadFile:
        path = Path(files[name].path)
        try:
            return facts_of(read_frames(path, job.T, job.about.sensor))
        except DataError as error:
            return BadFile(path, str(error), name)

    for name, found in zip(left, job.in_threads(inspect, left, "checking frames"), strict=True):
        if isinstance(found, BadFile):
            job.bad.append(found)
        else:
            job.facts[name] = found
    record = {name: (files[name].stamp, sources[name], job.facts[name]) for name in files if name in job.facts}
    if record != known and job.writable:
        write_record(job.record, record)
    job.bad += job.frames.without_samples()
    job.counts[f"files of {job.T} frames"] = len(files)


def split(job: Job) -> None:
    """Divide all samples, leave the bad ones out, and write the split down."""
    about, files = job.about, job.frames.files
    if not files:
        return
    # The bad ones are divided, too: leaving one out does not move the others.
    names = sorted({*files, *job.bad_samples})
    if about.has_split:
        train, test = (tuple(name for name in files if name.startswith(f"{part}/")) for part in about.parts)
        divided = Split("own", train, test)
    else:
        divided = make_split(job.rule, names, job.seed) if job.rule in RULES else read_split(Path(job.rule), names)
    if job.val and divided.val:
        raise UserError(f"--val {job.val:g}: the split file {job.rule} has val lines already; give --val 0")
    if job.val:
        divided = divided.holding_out(job.val)
    job.bad += _contradictions(divided, job)
    if not job.change:
        return
    job.refuse()
    if job.bad:
        print(f"left out: {len(job.bad)} bad files{listing(job.bad)}", flush=True)
    job.split = divided.without(job.bad_samples)
    # Sorted as text ("10" before "2"), as torchvision's DatasetFolder does: the labels of the released weights.
    job.classes = sorted({name.split("/")[-2] for name in files})
    labels = {name: label for label, name in enumerate(job.classes)}
    job.labels = {name: labels[name.split("/")[-2]] for name in files}
    for part, samples in {"training": job.split.train, "test": job.split.test}.items():
        if not samples:
            raise UserError(f"{job.frames.path} has no {part} samples; check the contents of {job.data_dir}")
    if job.val and not job.split.val:
        raise UserError(
            f"--val {job.val:g} holds out none of the {len(job.split.train)} training samples; give a larger fraction"
        )
    if job.writable:
        _write_split(job, job.split)


def _contradictions(divided: Split, job: Job) -> list[BadFile]:
    """Samples that are another than the split file says, and training samples that are in the test set, too."""
    files, facts = job.frames.files, job.facts
    bad = [
        BadFile(
            Path(files[name].path), f"has the checksum {facts[name].content} and {wanted} is in the split file", name
        )
        for name, wanted in divided.checksums.items()
        if name in facts and facts[name].content != wanted
    ]
    test = {facts[name].content: name for name in divided.test if name in facts}
    bad += [
        BadFile(Path(files[name].path), f"has the same events as the test sample {test[facts[name].content]}", name)
        for name in divided.train
        if name in facts and facts[name].content in test
    ]
    return bad


def _write_split(job: Job, divided: Split) -> None:
    """Write the split's file; one that other samples wrote stays, and theirs goes beside it."""
    checksums = {name: facts.content for name, facts in job.facts.items()}
    text = divided.manifest(job.about.title, checksums)
    path = job.data_dir / "splits" / f"{divided.file_name}.txt"
    before = read_text(path)
    if before is not None and before != text:
        other = path.with_name(f"{divided.file_name}_{hashlib.sha256(text.encode()).hexdigest()[:8]}.txt")
        if not other.exists():
            different = changes(before, text)
            print(
                f"{len(different)} samples have changed since {path} was written ({'; '.join(different[:3])} ...)",
                flush=True,
            )
        path = other
    write_text(path, text)


# Frames to packed frames ----------------------------------------------------------------------------------------------


def _packed_path(job: Job, split: Split, part: str) -> Path:
    """Where the packed frames of one part of the split lie."""
    (height, width), sensor = job.frame_size, job.about.sensor
    to = "" if job.frame_size == sensor else f"_to_{height}x{width}"
    return job.data_dir / f"packed_T{job.T}_{sensor[0]}x{sensor[1]}{to}" / f"{split.file_name}_{part}.b2nd"


def pack(job: Job) -> None:
    """Pack the frames of both parts where they are not packed yet; not at all where the folder cannot be written to.

    What is held out is a part of the training frames, so that the files are the same for any ``--val``.
    """
    if not job.packed:
        return
    whole = replace(job.split, val=())
    for part, names in {"train": whole.train, "test": whole.test}.items():
        path = _packed_path(job, whole, part)
        lines = [f"{name} {job.labels[name]} {job.facts[name].frames}" for name in names]
        checksum = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
        counts = count_type(max(job.facts[name].largest for name in names)).name
        dtype = counts if job.frame_size == job.about.sensor else "float32"
        contents = Contents(job.T, *job.frame_size, part, whole.fingerprint, len(names), checksum, dtype)
        store = open_store(path, contents)
        if store is None and not job.writable:
            print(f"{job.data_dir} cannot be written to: frames are read from the .npz files", flush=True)
            job.stores = {}
            return
        if store is None:
            print(f"packing the {part} frames into {path} ...", flush=True)
            for leftover in path.parent.glob(".*.partial"):  # of a killed process: this one has the lock
                leftover.unlink()
            write_store(path, contents, _encoded(job, names, contents))
            store = open_store(path, contents)
        if store is None:
            raise OSError(f"packed frames {path} are not what was written")
        job.stores[part] = store


def _encoded(job: Job, names: Sequence[str], contents: Contents) -> Iterator[bytes]:
    """The packed frames of samples, a number of them in memory at a time."""

    def work(name: str) -> bytes:
        frames = read_frames(Path(job.frames.files[name].path), job.T, job.about.sensor)
        if contents.dtype == "float32":
            frames = resized(frames, (contents.height, contents.width)).numpy()
        return encode(frames, contents.dtype)

    for start in range(0, len(names), _AT_A_TIME):
        yield from job.in_threads(work, names[start : start + _AT_A_TIME], f"packing {contents.part}")


STAGES = (find, unpack, convert, integrate, check, split, pack)

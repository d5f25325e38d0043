"""Prepare an event data set in one command: find, check and unpack the archives, make events and frames, split, pack.

    python tools/prepare_data.py dvs128 --data-dir data/dvs128
    python tools/prepare_data.py cifar10dvs -T 10 --split tebn
    python tools/prepare_data.py ncaltech101 --check               read what is there, change nothing, list what is bad
    python tools/prepare_data.py folder --data-dir DIR             your own recordings, DIR/<class>/<recording>

Put the archives into DIR/download, into DIR or beside it. After a kill at any moment the same command goes on, and
where nothing is missing it changes nothing. Training does the same at its first start.

Your own recordings may be .npz, .npy, .bin, .aedat, .aedat4, .raw or .dat; with DIR/train/<class>/ and
DIR/test/<class>/ that is the split. The size of the camera is found. Every event script then trains on --data-dir DIR.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file: the modules of the repository are one folder up
    sys.path.insert(0, str(ROOT))

from utils.args import size, whole  # noqa: E402
from utils.data.events import EventData, check_event_data, load_event_data  # noqa: E402
from utils.data.folders import listing  # noqa: E402
from utils.errors import SentenceParser, StopRequested, UserError, exit_with_sentence  # noqa: E402
from utils.facts import split_in_words  # noqa: E402
from utils.files import writing  # noqa: E402
from utils.prepare.datasets import DATA_SETS, DataSet  # noqa: E402
from utils.prepare.own import describe_recordings, own_data_set  # noqa: E402

_OWN = "folder"


def prepare(args: argparse.Namespace, about: DataSet) -> None:
    """Prepare, and print what there is now."""
    began = time.monotonic()
    data = load_event_data(
        args.data_set if args.data_set in DATA_SETS else "dvs128",
        args.data_dir,
        args.timesteps,
        split=args.split,
        split_seed=args.seed,
        sensor_size=args.sensor_size,
        frames=args.frames,
        on_bad_sample=args.on_bad_sample,
        workers=args.workers,
        any_archive=args.any_archive,
    )
    print_table(data, time.monotonic() - began)
    count = len(data.train) + len(data.test)
    if about.is_own:
        return
    if len(data.classes) != about.num_classes or count != (about.samples or count):
        official = f"{about.samples} in " if about.samples else ""
        print(f"{count} samples in {len(data.classes)} classes; {about.title} has {official}{about.num_classes}")


def print_table(data: EventData, seconds: float) -> None:
    """Classes, samples and bytes of each part, and the time that it took."""
    print(f"{data.title}, split: {split_in_words(asdict(data.info))}")
    print(f"{'part':8}{'classes':>9}{'samples':>9}{'bytes of .npz':>16}{'bytes packed':>15}")
    for part, frames in (("train", data.train), ("test", data.test)):
        npz = sum(path.stat().st_size for path, _ in frames.files)
        packed = frames.store.path.stat().st_size if frames.store is not None else "-"
        classes = len({label for _, label in frames.files})
        print(f"{part:8}{classes:>9}{len(frames):>9}{npz:>16}{packed:>15}")
    print(f"{seconds:.1f} s")


def check(args: argparse.Namespace, about: DataSet) -> None:
    """Read what is there for T; raise UserError with the list of what is bad."""
    if args.sensor_size is not None:
        about = replace(about, sensor=tuple(args.sensor_size))
    bad, counts = check_event_data(
        about,
        args.data_dir,
        args.timesteps,
        split=args.split,
        split_seed=args.seed,
        workers=args.workers,
        any_archive=args.any_archive,
    )
    read = ", ".join(f"{count} {what}" for what, count in counts.items())
    if bad:
        raise UserError(f"{len(bad)} bad of {read} in --data-dir {args.data_dir}:{listing(bad)}")
    print(f"all whole: {read}")


def make_parser() -> argparse.ArgumentParser:
    """The parser of this tool's command line."""
    parser = SentenceParser(description=__doc__)
    add = parser.add_argument
    add("data_set", choices=[*DATA_SETS, _OWN], help="what to prepare")
    add("--data-dir", type=Path, metavar="DIR", help="folder of the data set (default: data/<data set>)")
    add("-T", "--timesteps", type=whole(1), metavar="T", help="frames per sample (default: the recipe's)")
    add("--split", metavar="random|first90|tebn|FILE", help="of CIFAR10-DVS and N-Caltech101 (default: random 90/10 in "
        "each class; DVS128 Gesture has its own)")  # fmt: skip
    add("--seed", type=whole(0), metavar="S", help="of the random split (default: the recipe's)")
    add("--workers", type=whole(1), metavar="N", help="threads (default: the cores)")
    add("--frames", choices=("packed", "npz"), default="packed", help="npz: do not pack (default: packed)")
    add("--sensor-size", type=size(1), metavar="HxW", help="of another camera (default: the data set's)")
    add(
        "--any-archive",
        action="store_true",
        help="other recordings in the same layout: any MD5",
    )
    add("--on-bad-sample", choices=("stop", "skip"), default="stop", help="damaged samples (default: stop)")
    add("--check", action="store_true", help="read archives, recordings, events, frames for T; list what is bad")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = make_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    try:
        run(args)
    except (KeyboardInterrupt, StopRequested) as stop:
        number = getattr(stop, "number", signal.SIGINT)
        name = signal.Signals(number).name
        print(
            f"\nprepare_data.py: stopped by {name}; what is whole stays, and the same command goes on", file=sys.stderr
        )
        sys.exit(128 + number)


def run(args: argparse.Namespace) -> None:
    """Prepare or check what the command line says."""
    if args.data_set == _OWN:
        about = _own(args)
    else:
        about = DATA_SETS[args.data_set]
        args.data_dir = args.data_dir or Path("data") / args.data_set
    if about.has_split and args.split is not None:
        raise UserError(f"--split {args.split}: {about.title} has its own training and test clips; leave it out")
    args.split = args.split or "random"
    args.seed = about.split_seed if args.seed is None else args.seed
    args.timesteps = args.timesteps or about.timesteps
    if args.check:
        check(args, about)
        return
    if args.data_set != _OWN:
        print(
            f"preparing {about.title} in {args.data_dir}; if another process does so already, this one waits",
            flush=True,
        )
    prepare(args, about)


def _own(args: argparse.Namespace) -> DataSet:
    """The data set of the user's recordings, converted to events."""
    if args.data_dir is None:
        raise UserError("folder needs --data-dir DIR, the folder of the recordings")
    if not args.check:
        skip = args.on_bad_sample == "skip"
        with writing(f"--data-dir {args.data_dir}"):
            return describe_recordings(args.data_dir, args.sensor_size, args.workers, skip)
    about = own_data_set(args.data_dir)
    if about is None:
        raise UserError(f"--data-dir {args.data_dir} is not prepared; leave --check out")
    return about


def _stop(number: int, _: object) -> None:
    raise StopRequested(number)


if __name__ == "__main__":
    exit_with_sentence(main)

"""The sub-command ``data`` of tools/benchmark.py: event frames, packed against SpikingJelly's ``.npz`` files."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.args import whole
from utils.data.events import EventFrames, load_event_data
from utils.errors import UserError
from utils.prepare.datasets import DATA_SETS
from utils.prepare.spikingjelly_data import load_npz_frames

__all__ = ["add_data_arguments", "benchmark_data"]

SENSOR = (128, 128)
EVENTS = (20_000, 100_000, 400_000, 1_000_000)  # of a generated recording
SECONDS = 6.0


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the sub-command, without those that all have."""
    parser.add_argument("--data-set", choices=DATA_SETS, default="dvs128", help="of --data-dir; default: dvs128")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="prepared data; default: generated recordings")
    parser.add_argument("-T", "--timesteps", type=whole(1), default=16, metavar="T", help="frames; default: 16")
    parser.add_argument("--count", type=whole(1), default=50, metavar="N", help="samples in a run; default: 50")


def benchmark_data(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Samples per second and core from SpikingJelly's .npz files and from the packed frames, and their bytes."""
    torch.set_num_threads(1)
    rows = []
    if args.data_dir is not None:
        return _rows(str(args.data_dir), args.data_set, args.data_dir, args)
    for events in EVENTS:
        with tempfile.TemporaryDirectory() as scratch:
            write_recordings(Path(scratch), events, args.count)
            rows += _rows(f"generated, {events} events", "dvs128", Path(scratch), args)
    return rows


def _rows(title: str, data_set: str, data_dir: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    data = load_event_data(data_set, data_dir, args.timesteps).train
    step = max(1, len(data) // args.count)
    chosen = range(0, len(data), step)[: args.count]
    npz = sum(data.files[index][0].stat().st_size for index in chosen)
    packed = data.store.path.stat().st_size * len(chosen) // len(data) if data.store is not None else 0
    paths: dict[str, tuple[Callable[[int], Any], int]] = {
        "SpikingJelly .npz": (lambda index: load_npz_frames(data.files[index][0]), npz),
        "packed, float32": (lambda index: data[index][0], packed),
        "packed, as sent to the device": (lambda index: data.__getitems__([index])[0][0], packed),
    }
    with tempfile.TemporaryDirectory() as scratch:
        paths |= _with_h5py(data, chosen, Path(scratch))
        expected = {index: paths["SpikingJelly .npz"][0](index) for index in chosen}
        for read, _ in paths.values():
            for index in chosen:
                if not np.array_equal(read(index), expected[index]):
                    raise UserError(f"sample {data.files[index][0]} differs between its paths; report this")
        tasks: dict[str, Callable[[], float]] = {n: partial(_seconds, r, chosen) for n, (r, _) in paths.items()}
        seconds = _alternate(tasks, args.runs)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "frames": title if name.startswith("Spiking") else "",
            "path": name,
            "samples/s and core": len(chosen) / medians[name],
            "from": len(chosen) / max(seconds[name]),
            "to": len(chosen) / min(seconds[name]),
            "speed-up": medians["SpikingJelly .npz"] / medians[name],
            "bytes/sample": size // len(chosen),
            "bytes, ratio": size / npz,
        }
        for name, (_, size) in paths.items()
    ]


def _with_h5py(data: EventFrames, chosen: range, folder: Path) -> dict[str, tuple[Callable[[int], Any], int]]:
    """The same samples in HDF5 (gzip 4, Fletcher-32, a chunk a sample), for comparison, where h5py is installed."""
    try:
        import h5py  # only for this comparison
    except ImportError:
        return {}
    frames = np.stack([data.__getitems__([index])[0][0].numpy() for index in chosen])
    options = {"chunks": (1, *frames.shape[1:]), "compression": "gzip", "fletcher32": True}
    with h5py.File(folder / "frames.h5", "w") as file:
        file.create_dataset("frames", data=frames, **options)
    stored = h5py.File(folder / "frames.h5")["frames"]
    place = {index: number for number, index in enumerate(chosen)}
    return {"h5py, for comparison": (lambda index: stored[place[index]], (folder / "frames.h5").stat().st_size)}


def _seconds(read: Callable[[int], Any], chosen: range) -> float:
    began = time.process_time()
    for index in chosen:
        read(index)
    return time.process_time() - began


def _alternate(tasks: dict[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    for task in tasks.values():
        task()
    values: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(runs):
        for name, task in tasks.items():
            values[name].append(task())
    return values


def write_recordings(root: Path, events: int, count: int) -> None:
    """Event files of a spot that goes in circles before noise of a tenth of the events, one class."""
    for number in range(count + 1):
        rng = np.random.default_rng(number)
        t = np.sort(rng.integers(0, int(SECONDS * 1e6), events))
        phase = t / 1e6 * rng.uniform(2, 8)
        places = np.stack([64 + 25 * f(phase) + rng.normal(0, 12, events) for f in (np.cos, np.sin)])
        noise = rng.random(events) < 0.1
        places[:, noise] = rng.uniform(0, 128, (2, noise.sum()))
        path = root / f"events_np/{'test' if number == count else 'train'}/0/{number:05}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        x, y = np.clip(places, 0, 127).astype(np.int64)
        np.savez(path, t=t, x=x, y=y, p=rng.integers(0, 2, events))

"""What several test files use: tiny data sets in SpikingJelly's layouts, and scripts run as a user runs them."""

import csv
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.errors import exit_with_sentence

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores (pyproject.toml)
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined, so before models is imported

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "dvs128": ROOT / "vgg8_dvs128_SMA.py",
    "cifar10dvs": ROOT / "vgg8_cifar10dvs_SMA.py",
    "ncaltech101": ROOT / "vgg8_NCaltech101_SMA.py",
    "imagenet": ROOT / "train_amp.py",
}
# The smallest network and input that the scripts take: a training step takes milliseconds.
SMALL = ["-T", "4", "--width", "0.125", "--frame-size", "32", "--device", "cpu", "--num-workers", "0", "-b", "4"]


def write_events(path, seed, height=128, width=128, count=400):
    """An event file as SpikingJelly writes it: random events, the same for the same seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    np.savez(
        path,
        t=np.sort(rng.integers(0, 1_000_000, count)),
        x=rng.integers(0, width, count),
        y=rng.integers(0, height, count),
        p=rng.integers(0, 2, count),
    )


def rows(output):
    """``metrics.csv`` of a run but for the seconds."""
    with (output / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def same_weights(a, b):
    """Whether two files hold the same weights, to the last bit."""
    from utils.checkpoint import read_weights  # see parse

    a, b = read_weights(a)[0], read_weights(b)[0]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="session")
def gesture_data(tmp_path_factory):
    """A data set in the layout of DVS128 Gesture: 11 classes, 22 training and 11 test samples."""
    root = tmp_path_factory.mktemp("gesture")
    for label in range(11):
        for number in range(2):
            write_events(root / f"events_np/train/{label}/user01_{number}.npz", seed=100 * label + number)
        write_events(root / f"events_np/test/{label}/user24_0.npz", seed=100 * label + 50)
    return root


@pytest.fixture(scope="session")
def folder_data(tmp_path_factory):
    """A data set in the layout of N-Caltech101: 3 classes of 10 samples."""
    root = tmp_path_factory.mktemp("folders")
    for label, name in enumerate(("ant", "bass", "crab")):
        for number in range(10):
            write_events(root / f"events_np/{name}/image_{number:04}.npz", 1000 + 100 * label + number, 180, 240)
    return root


def load_script(name):
    """A script as a module."""
    path = SCRIPTS[name]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(name, *arguments):
    """The settings of a script for a command line: ``parse("dvs128", "-N", 7)``."""
    from utils.event_args import parse_event_args  # not above: models must not be imported before the lines there
    from utils.image_args import parse_image_args

    module, argv = load_script(name), list(map(str, arguments))
    if name == "imagenet":
        return parse_image_args(module.SETTINGS, module.__doc__, argv)
    return parse_event_args(module.SETTINGS, module.__doc__, module.DATA_SET, argv)


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a script's main in this process: ``script("dvs128", "--lr", "0.1")`` gives (exit code, stdout, stderr)."""

    def run(name, *arguments):
        path = SCRIPTS[name]
        module = load_script(name)
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        handler = signal.getsignal(signal.SIGTERM)
        try:
            exit_with_sentence(module.main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:  # a run that failed leaves SIGTERM ignored, and so would the children of this process
            signal.signal(signal.SIGTERM, handler)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def pytest_collection_modifyitems(items):
    """Tests that start real processes are slow."""
    for item in items:
        if "launch" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def launch():
    """Start a real process; ``launch([...])`` gives the finished process with its text output."""

    def run(command, timeout=300, **environment):
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env={**clean, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run

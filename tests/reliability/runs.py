"""What a run survives: kills, signals, damaged files, divergence, full disks, lost processes, long evaluations.

Each function measures one row of the table in docs/reliability.md. Real processes run the scripts on the built-in demo
data, on the CPU, one thread a process. They are started by fork, from a process that never computed with torch:
``python -m tests.reliability.runs ROW FOLDER DATA`` measures one row in an empty folder and prints it as JSON.
"""

from __future__ import annotations

import csv
import ctypes
import errno
import gc
import io
import itertools
import json
import math
import os
import pickle
import random
import resource
import runpy
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import utils.losses
from models import VGG8
from tools._forked import ROOT, Run, end_all, in_child, launch, start
from utils.analysis.operations import OperationCounter
from utils.checked import read_checked
from utils.checkpoint import Checkpoints, load_weights, read_weights
from utils.data.demo import write_demo
from utils.data.demo_images import write_demo_images
from utils.distributed import Process
from utils.engine import Progress, evaluate, train_one_epoch
from utils.errors import UserError
from utils.losses import mse_of_mean
from utils.prepare.datasets import DATA_SETS

__all__ = ["ROWS", "damages", "hostile_files"]

SCRIPTS = {
    "AdamW": ("vgg8_dvs128_SMA.py", "dvs128"),
    "Adam": ("vgg8_cifar10dvs_SMA.py", "cifar10dvs"),
    "NAdam": ("vgg8_NCaltech101_SMA.py", "ncaltech101"),
    "SGD": ("train_amp.py", "imagenet"),
    "SGD + EMA": ("train_amp.py", "imagenet"),
}
EVENTS = ["-T", "4", "--width", "0.125", "--RCR", "4", "--frame-size", "32"]
IMAGES = ["-T", "2", "--width", "0.125", "--image-size", "32", "--mixup", "--micro-batches", "2", "--warm-up", "1"]
TIMEOUT = 5  # seconds, of the runs that lose a process
ALONE = Process(0, 0, 1, torch.device("cpu"))
Found = tuple[int, int, str]  # cases tried, cases held, and of what kind


@dataclass(frozen=True)
class Row:
    """A row of the table: what must hold, and the function that tries it in an empty folder with the demo data."""

    what: str
    measure: Callable[[Path, Path], Found]


def saves(work: Path, data: Path) -> Found:
    """kill -9 during back-to-back saves of 25 MB."""
    folder, saved, rng, count = work / "run", work / "saved", random.Random(0), 30
    folder.mkdir()

    def save_for_ever() -> None:
        net = nn.Linear(1024, 2048)
        optimizer = torch.optim.Adam(net.parameters())
        net(torch.ones(1, 1024)).sum().backward()
        optimizer.step()
        checkpoints = Checkpoints(folder, {}, ALONE, net, Progress(ALONE.device), optimizer=optimizer)
        epoch = checkpoints.resume("auto")
        while True:
            epoch += 1
            checkpoints.save(epoch, 0.0)
            saved.touch()

    bad = newest = 0
    for _ in range(count):
        saved.unlink(missing_ok=True)
        run = launch(save_for_ever, work)
        _until_exists(saved, run)
        run.wait(rng.uniform(0.0, 0.5))
        run.end()
        epoch = in_child(lambda: _epoch_of(folder / "last.pt"))
        bad += epoch is None or epoch < newest
        newest = epoch or newest
    return count, count - bad, "kills, each inside or between saves of 25 MB"


def training(work: Path, data: Path) -> Found:
    """kill -9 of a training, the same command again, until it is through."""
    count, rng, small = 10, random.Random(1), _small("AdamW", 1, data)
    options = [*small.options, "--epochs", 8]
    began = time.monotonic()
    _finish(start(small.script, [*options, "--output-dir", work / "whole"], work))
    most = 3 * (time.monotonic() - began) / count  # so that the kills are spread over the whole training
    folders, saved, kills, lost = [work / "killed_0"], 0, 0, 0
    while kills < count:
        run = start(small.script, [*options, "--output-dir", folders[-1]], work)
        if run.wait(rng.uniform(0.0, most)):
            _finish(run)
            folders.append(work / f"killed_{len(folders)}")
            saved = 0
            continue
        run.end()
        kills += 1
        epoch = in_child(lambda: _epoch_of(folders[-1] / "last.pt")) or 0
        lost += max(0, saved - epoch)
        saved = epoch
    _finish(start(small.script, [*options, "--output-dir", folders[-1]], work))
    same = sum(not in_child(lambda folder=folder: _differences(work / "whole", folder)) for folder in folders)
    return len(folders), same if lost == 0 else 0, f"trainings, {kills} kills in all; {lost} saved epochs lost"


def resume(work: Path, data: Path) -> Found:
    """Stop between epochs, inside one and at its last step; continue; compare everything to the bit."""
    equal = tried = 0
    for name in SCRIPTS:
        for processes in (1, 2):
            small, here = _small(name, processes, data), work / f"{name}_{processes}"
            options = [*small.options, "--epochs", 3, "--output-dir"]
            _finish(start(small.script, [*options, here / "whole"], here, processes))
            for kind, at in [("epoch", 1), ("step", small.steps // 2), ("step", 2 * small.steps)]:
                folder = here / f"{kind}_{at}"
                stopping = _kill_after_epoch(at) if kind == "epoch" else _sigterm_at_step(at, processes - 1)
                run = start(small.script, [*options, folder], here, processes, stopping)
                run.wait()
                if run.codes[0] != (-signal.SIGKILL if kind == "epoch" else 128 + signal.SIGTERM):
                    raise RuntimeError(f"{name}, stopped at {kind} {at}, ended with {run.codes}: {run.text()[-2000:]}")
                _finish(start(small.script, [*options, folder], here, processes))
                tried += 1
                equal += not in_child(lambda a=here / "whole", b=folder: _differences(a, b))
    return tried, equal, f"{', '.join(SCRIPTS)}; 1 and 2 processes"


def stop(work: Path, data: Path) -> Found:
    """SIGTERM at random moments of a training."""
    first, rng, seconds, count, small = work / "first", random.Random(2), [], 5, _small("AdamW", 1, data)
    for _ in range(count):
        first.unlink(missing_ok=True)
        options = [*small.options, "--epochs", 999, "--output-dir", work / "run"]
        run = start(small.script, options, work, prelude=lambda: _on_step(lambda _: first.touch()))
        _until_exists(first, run)
        run.wait(rng.uniform(0.0, 1.0))
        began = time.monotonic()
        run.send(signal.SIGTERM)
        run.wait()
        if run.codes == [128 + signal.SIGTERM] and "every step is saved" in run.text():
            seconds.append(time.monotonic() - began)
    return count, sum(one < 5 for one in seconds), f"{max(seconds, default=math.inf):.1f} s at most"


def damaged(work: Path, data: Path) -> Found:
    """Damage last.pt in every way, and continue."""

    def count() -> tuple[int, int]:
        net = nn.Linear(64, 64)
        checkpoints = Checkpoints(work, {}, ALONE, net, Progress(ALONE.device))
        for epoch in (1, 2):
            checkpoints.save(epoch, 0.0)
        used = tried = 0
        for content in damages((work / "last.pt").read_bytes()):
            (work / "last.pt").unlink()  # previous.pt may be the same file
            (work / "last.pt").write_bytes(content)
            tried += 1
            told = io.StringIO()
            with redirect_stderr(told):
                epoch = Checkpoints(work, {}, ALONE, net, Progress(ALONE.device)).resume("auto")
            used += epoch == 1 and f"file {work / 'last.pt'} is" in told.getvalue()
        return used, tried

    used, tried = in_child(count)
    return tried, used, "10 truncations, 20 changed bytes, zeros, empty, HTML"


def hostile(work: Path, data: Path) -> Found:
    """Load files that run code when they are unpickled, as weights and as the checkpoint to continue."""
    marker, executed, refused, tried = work / "executed", 0, 0, 0
    for name, content in in_child(lambda: list(hostile_files(marker))):
        folder = work / name
        folder.mkdir()
        file = folder / ("elsewhere" if name == "symlink" else "last.pt")
        file.write_bytes(content)
        if name == "symlink":
            (folder / "last.pt").symlink_to(file)
        for attempt in (_load_as_weights, _load_as_checkpoint):
            tried += 1
            refused += in_child(lambda attempt=attempt, folder=folder: _is_refused(attempt, folder))
            executed += marker.exists()
            marker.unlink(missing_ok=True)
    return tried, refused if executed == 0 else 0, f"{executed} ran code"


def nan(work: Path, data: Path) -> Found:
    """Spoil one step of a training."""
    rng, stopped, tried, steps = random.Random(3), 0, 0, work / "steps"
    for processes in (1, 2):
        small = _small("AdamW", processes, data)
        for what in ("loss", "gradient", "input"):
            for number in range(3):
                at, folder = rng.randrange(2, small.steps + 4), work / f"{what}_{processes}_{number}"
                options = [*small.options, "--epochs", 2, "--output-dir", folder]
                run = start(small.script, options, work, processes, _poison(what, at, processes - 1, steps))
                run.wait()
                epoch, step = divmod(at - 1, small.steps)
                text = run.text()
                told = f"epoch {epoch + 1}, step {step + 1}, at learning rate" in text and _is_one_message(text)
                finite = in_child(lambda path=folder / "last.pt": _is_finite(path))
                tried += 1
                stopped += set(run.codes) == {2} and told and finite and steps.read_text() == str(at - 1)
    return tried, stopped, "loss, gradient, input; 1 and 2 processes"


def disk(work: Path, data: Path) -> Found:
    """After the first epoch no file may grow beyond 50 kB, or metrics.csv cannot be written, as on a full disk."""
    held = 0
    for processes, what in itertools.product((1, 2), ("checkpoint", "log")):
        small, folder = _small("AdamW", processes, data), work / f"{what}_{processes}"
        options = [*small.options, "--epochs", 3, "--output-dir", folder]
        prelude = _no_room_for_checkpoints if what == "checkpoint" else _no_room_for_metrics
        run = start(small.script, options, work, processes, prelude)
        run.wait()
        text, epoch = run.text(), in_child(lambda folder=folder: _epoch_of(folder / "last.pt"))
        said = str(folder) in text and "cannot be written" in text and _is_one_message(text)
        held += set(run.codes) == {2} and said and epoch == 1
    return 4, held, "checkpoint, log; 1 and 2 processes"


def lost(work: Path, data: Path) -> Found:
    """Kill one of two processes, or let it stand still."""
    small, figures, held = _small("AdamW", 2, data), [], 0
    for rank, number in [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)]:
        folder = work / f"{number.name}_{rank}"
        options = [*small.options, "--epochs", 999, "--timeout", TIMEOUT, "--output-dir", folder]
        run = start(small.script, options, folder, 2)
        _until_exists(folder / "last.pt", run)
        began, other = time.monotonic(), 1 - rank
        run.send(number, rank)
        while run.codes[other] is None and time.monotonic() - began < 60:
            run.wait(0.02)
        seconds, code = time.monotonic() - began, run.codes[other]
        run.end()
        held += code == 3 and seconds < TIMEOUT + 5 and _is_one_message(run.text())
        figures.append(f"{number.name} to rank {rank} {seconds:.1f} s")
    return 3, held, f"{', '.join(figures)} (time-out {TIMEOUT} s; gloo)"


def potential(work: Path, data: Path) -> Found:
    """Look at the neurons wherever a batch starts."""
    left, looked_at = in_child(_count_potential)
    return looked_at, looked_at - left, "neuron layers at the start of a batch"


def memory(work: Path, data: Path) -> Found:
    """Resident memory after 30 evaluations and after 50 more, with every firing rate counted."""
    before, after = in_child(_memory_of_evaluations)
    growth = 100 * (after / before - 1)
    return 1, int(growth < 1), f"{growth:.2f} % of {before / 1024:.0f} MiB"


ROWS = {
    "saves": Row("`kill -9` while checkpoints are saved: `last.pt` is readable and no older than before", saves),
    "training": Row("`kill -9` of a training, the same command again: weights and metrics as without", training),
    "resume": Row("stopped between epochs, inside one, at its last step; continued: all as in an undisturbed run, to "
                  "the bit", resume),
    "stop": Row("SIGTERM: saved inside the epoch and ended within 5 s, exit code 143", stop),
    "damaged": Row("damaged `last.pt`: named, and the checkpoint before it is used", damaged),
    "hostile": Row("files that run code when they are unpickled, as weights and as checkpoint: refused", hostile),
    "nan": Row("NaN in a random step: stopped before the optimiser's step, with epoch, step and learning rate", nan),
    "disk": Row("disk full: the last checkpoint is intact, all processes stop with one message, exit code 2", disk),
    "lost": Row("one of two processes lost: the other ends with one message and exit code 3", lost),
    "potential": Row("no membrane potential reaches the next batch, after exceptions and evaluations, too", potential),
    "memory": Row("memory grows by less than 1 % over 50 evaluations with firing rates counted", memory),
}  # fmt: skip


def damages(whole: bytes) -> Iterator[bytes]:
    """33 ways in which a file comes to grief."""
    rng = random.Random(0)
    for _ in range(10):
        yield whole[: rng.randrange(1, len(whole))]
    for place in [len(whole) - 70, len(whole) - 72, *(rng.randrange(len(whole)) for _ in range(18))]:
        yield whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]
    yield bytes(len(whole))
    yield b""
    yield b"<!DOCTYPE html><html>quota exceeded</html>"


class _Calls:
    """Unpickling it calls a function."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


class _Module(nn.Module):
    """A whole module whose unpickling runs code."""

    def __init__(self, marker: Path):
        super().__init__()
        self.weights, self.marker = nn.Linear(2, 2), str(marker)

    def __setstate__(self, state: dict) -> None:
        Path(state["marker"]).touch()
        super().__setstate__(state)


def hostile_files(marker: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of files that make the file ``marker`` when they are unpickled without care."""
    weights = nn.Linear(2, 2).state_dict()
    by_system = _Calls(os.system, f"touch {marker}")
    by_eval = _Calls(eval, f"open({str(marker)!r}, 'w').close()")
    yield "system", _saved({"model": weights, "extra": by_system})
    yield "eval", _saved({"model": weights, "extra": by_eval})
    yield (
        "nested",
        _saved({"model": {"weight": _Calls(list, [_Calls(getattr, _Calls(__import__, "os"), "sep"), by_eval])}}),
    )
    yield "module", _saved(_Module(marker))
    yield "symlink", _saved({"model": weights, "extra": by_system})
    yield "old_format", _saved({"model": weights, "extra": by_system}, _use_new_zipfile_serialization=False)
    tar = io.BytesIO()  # as torch saved before 0.1.10, with a link that leads out of the archive
    with tarfile.open(fileobj=tar, mode="w") as archive:
        pickled = _pickled(by_system)
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(pickled)
            archive.addfile(entry, io.BytesIO(pickled))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(marker.parent)
        archive.addfile(link)
    yield "tar", tar.getvalue()


def _saved(content: object, **keywords: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **keywords)
    return file.getvalue()


def _pickled(content: object) -> bytes:
    return pickle.dumps(content, protocol=2)


@dataclass(frozen=True)
class _Small:
    """A training that takes seconds."""

    script: str
    options: list
    steps: int  # of an epoch


def _small(name: str, processes: int, data: Path) -> _Small:
    """The script with the optimiser ``name``, with about six steps an epoch."""
    script, kind = SCRIPTS[name]
    folder, count = _demo_data(kind, data, classes=3)
    options: list = ["--data-dir", folder, "--device", "cpu", "--num-workers", 0]
    if kind == "imagenet":
        parts = 2 * processes  # as --accumulate says
        batch = count // (6 * parts) * parts
        options += [*IMAGES, "-b", batch, *(["--ema", "0.9"] if "EMA" in name else [])]
        return _Small(script, options, count // batch)
    batch = count // (6 * processes)
    options += [*EVENTS, "-b", batch]
    if not DATA_SETS[kind].has_split:
        options += ["--split", folder / "split.csv"]
    return _Small(script, options, count // (batch * processes))


def _demo_data(kind: str, data: Path, classes: int | None = None) -> tuple[Path, int]:
    """The demo data of a script (events: of so many classes), made once, and the number of training samples."""

    def make() -> tuple[Path, int]:
        if kind == "imagenet":
            return _fewer_images(write_demo_images(data), data / "fewer")
        about = DATA_SETS[kind]
        layout = "gesture" if about.has_split else "folders"
        folder = write_demo(data, layout, about.sensor, classes or about.demo_classes)
        if about.has_split:
            return folder, len(list((folder / "events_np" / "train").glob("*/*.npz")))
        return folder, (folder / "split.csv").read_text().count("train,")

    return in_child(make)


def _fewer_images(whole: Path, fewer: Path) -> tuple[Path, int]:
    """Links to the first images of three classes, and the number of training images."""
    counts = {"train": 24, "test": 8}
    for part, count in counts.items():
        for folder in sorted((whole / part).iterdir())[:3]:
            (fewer / part / folder.name).mkdir(parents=True, exist_ok=True)
            for image in sorted(folder.iterdir())[:count]:
                with suppress(FileExistsError):
                    (fewer / part / folder.name / image.name).symlink_to(image)
    return fewer, 3 * counts["train"]


def _demo_settings(script: str) -> list:
    """What ``--demo`` stands for, as arguments: the data are shared between the runs here."""
    settings: list = []
    for name, value in in_child(lambda: runpy.run_path(str(ROOT / script))["DEMO"]).items():
        settings.append(f"--{name.replace('_', '-')}")
        if value is not True:
            settings.append("x".join(map(str, value)) if isinstance(value, list) else value)
    return [*settings, "--device", "cpu", "--num-workers", 0]


def _finish(run: Run) -> None:
    """Wait for a run that must succeed."""
    if not run.wait() or any(run.codes):
        run.end()
        raise RuntimeError(f"a run that should succeed ended with {run.codes}: {run.text()[-2000:]}")


def _until_exists(path: Path, run: Run, most: float = 120.0) -> None:
    """Wait until a run has made a file, or has ended; ``most`` seconds."""
    end = time.monotonic() + most
    while not path.exists() and not run.wait(0.02):
        if time.monotonic() > end:
            run.end()
            raise RuntimeError(f"a run did not come as far as {path.name} in {most:g} s: {run.text()[-2000:]}")


def _epoch_of(path: Path) -> int | None:
    """The epochs done of a whole checkpoint; None where it is damaged or missing."""
    try:
        state, checksum = read_checked(path)
    except UserError:
        return None
    return state["epoch"] if checksum else None


def _is_finite(path: Path) -> bool:
    return not path.exists() or all(value.isfinite().all() for value in read_weights(path)[0].values())


def _differences(a: Path, b: Path) -> list[str]:
    """Where the last checkpoints and the metrics of two runs differ."""
    first, second = (read_checked(folder / "last.pt")[0] for folder in (a, b))
    found = list(_different(first, second, "last.pt"))
    if _rows(a) != _rows(b):
        found.append("metrics.csv")
    return found


def _different(a: object, b: object, name: str) -> Iterator[str]:
    if isinstance(a, Mapping) and isinstance(b, Mapping) and a.keys() == b.keys():
        for key in a:
            yield from _different(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from _different(one, other, f"{name}.{number}")
    elif not (torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b):
        yield name


def _rows(folder: Path) -> list[dict[str, str]]:
    """``metrics.csv`` but for the seconds."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def _is_one_message(text: str) -> bool:
    return text.count("error:") == 1 and "Traceback" not in text


def _load_as_weights(folder: Path) -> None:
    load_weights(nn.Linear(2, 2), folder / "last.pt")


def _load_as_checkpoint(folder: Path) -> None:
    Checkpoints(folder, {}, ALONE, nn.Linear(2, 2), Progress(ALONE.device)).resume("auto")


def _is_refused(load: Callable[[Path], None], folder: Path) -> bool:
    try:
        load(folder)
    except UserError:
        return True
    return False


# What follows runs in the processes of a run, before its script.


def _is_rank(rank: int) -> bool:
    return int(os.environ.get("RANK", "0")) == rank


def _on_step(do: Callable[[int], None]) -> None:
    """Call ``do`` with the number of the optimiser's step, from 1, after each."""
    numbers = itertools.count(1)
    register_optimizer_step_post_hook(lambda *_: do(next(numbers)))


def _sigterm_at_step(at: int, rank: int) -> Callable[[], None]:
    def send(step: int) -> None:
        if step == at and _is_rank(rank):
            os.kill(os.getpid(), signal.SIGTERM)

    return lambda: _on_step(send)


def _after_save(do: Callable[[int], None]) -> None:
    """Call ``do`` with the epoch after every save of the first process."""
    original = Checkpoints.save

    def save(self: Checkpoints, epoch: int, acc1: float) -> None:
        original(self, epoch, acc1)
        if _is_rank(0):
            do(epoch)

    Checkpoints.save = save


def _kill_after_epoch(at: int) -> Callable[[], None]:
    return lambda: _after_save(lambda epoch: os.kill(os.getpid(), signal.SIGKILL) if epoch == at else None)


def _no_room_for_checkpoints() -> None:
    _after_save(lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY)))


def _no_room_for_metrics() -> None:
    def fill(_: int) -> None:
        original = os.replace

        def replace(source: Path, target: Path) -> None:
            if Path(target).name == "metrics.csv":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(source, target)

        os.replace = replace

    _after_save(fill)


def _poison(what: str, at: int, rank: int, steps: Path) -> Callable[[], None]:
    """Make the loss, the gradient or the input of training step ``at`` not finite, and write down the steps taken."""

    numbers = itertools.count(1)

    def now() -> bool:
        return next(numbers) == at and _is_rank(rank)

    def prelude() -> None:
        if _is_rank(0):
            steps.write_text("0")
            _on_step(lambda step: steps.write_text(str(step)) and None)
        if what == "loss":
            original = utils.losses.mse_of_mean
            utils.losses.mse_of_mean = lambda *given: (
                original(*given) * (math.nan if torch.is_grad_enabled() and now() else 1.0)
            )
        elif what == "gradient":
            scale = torch.amp.GradScaler.scale
            torch.amp.GradScaler.scale = lambda self, loss: scale(self, loss) * (math.nan if now() else 1.0)
        else:

            def spoil(module: nn.Module, inputs: tuple) -> tuple | None:
                if not isinstance(module, VGG8) or not module.training or not now():
                    return None
                frames = inputs[0].clone()
                frames[0, 0, 0, 0, 0] = math.nan
                return (frames, *inputs[1:])

            torch.nn.modules.module.register_module_forward_pre_hook(spoil)

    return prelude


def _count_potential() -> tuple[int, int]:
    """Neuron layers with a potential at the start of a batch, and how many were looked at."""
    torch.manual_seed(0)
    net = VGG8(T=4, num_classes=3, width=0.125, AZO=True, RCR=4, RTR=2)
    neurons = [module for module in net.modules() if hasattr(module, "v")]
    frames = torch.poisson(torch.full((12, 4, 2, 32, 32), 0.5))
    batches = list(zip(frames.split(4), torch.randint(3, (12,)).split(4), strict=True))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    device, found, failing = torch.device("cpu"), [], [False]

    def look(*_: object) -> None:
        found.extend(isinstance(neuron.v, Tensor) and bool(neuron.v.any()) for neuron in neurons)

    def fail(*_: object) -> None:
        if failing[0]:
            raise InterruptedError

    def train(batches: Iterable) -> None:
        train_one_epoch(net, batches, mse_of_mean, optimizer, scaler, device)

    def with_evaluation() -> Iterator:
        for batch in batches:
            evaluate(net, batches, mse_of_mean, device)
            net.train()
            yield batch

    def that_fail() -> Iterator:
        yield batches[0]
        failing[0] = True
        yield batches[1]

    net.register_forward_pre_hook(look)
    net.block4.register_forward_pre_hook(fail)  # the neurons before it have their potential then
    net(batches[0][0].transpose(0, 1))
    net(batches[0][0].transpose(0, 1))
    if not any(found):
        raise RuntimeError("two batches without a reset leave no potential: this row measures nothing")
    found.clear()
    for run in (train, lambda some: evaluate(net, some, mse_of_mean, device)):
        run(batches)
        with suppress(InterruptedError):
            run(that_fail())
        failing[0] = False
        run(batches)
    train(with_evaluation())
    return sum(found), len(found)


def _memory_of_evaluations() -> tuple[int, int]:
    """Resident memory in KiB after the first 30 evaluations, and after 50 more."""
    net = VGG8(T=4, num_classes=3, width=0.25)
    frames = torch.poisson(torch.full((24, 4, 2, 32, 32), 0.5))
    batches = list(zip(frames.split(8), torch.randint(3, (24,)).split(8), strict=True))
    resident = []
    with OperationCounter(net) as counter:
        for _ in range(80):
            evaluate(net, batches, mse_of_mean, torch.device("cpu"))
            resident.append(_resident_kib())
    if not any(layer.nonzero for layer in counter.result() if layer.kind == "neuron"):
        raise RuntimeError("no spikes were counted: this row measures nothing")
    return resident[29], resident[-1]


def _resident_kib() -> int:
    """Memory that is in use. What the C library keeps back of freed memory comes and goes and would hide a leak."""
    gc.collect()
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux: the largest so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)
    return int(next(line for line in status.read_text().splitlines() if line.startswith("VmRSS")).split()[1])


if __name__ == "__main__":
    row, folder, data = sys.argv[1:]
    try:
        found = ROWS[row].measure(Path(folder), Path(data))
    finally:
        end_all()
    print(json.dumps(found))

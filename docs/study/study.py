"""What attention is worth: variants in one place of SMA-VGG8, on three small data sets of events.

    python docs/study/study.py run --data-dir DIR     train what has no row yet, one row a run; then the tables
    python docs/study/study.py table                  tables and figures from the rows that are there

A killed study goes on with the same command. What DIR holds, and what was decided when,
is in README.md next to this file.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import itertools
import multiprocessing
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: the modules of the repository are two folders up
    sys.path.insert(0, str(ROOT))

from docs.study.camera import SIDE, record_folder  # noqa: E402
from models import SMA, SMA_L, VGG8  # noqa: E402
from models.fast import equations_only  # noqa: E402
from models.neurons import (  # noqa: E402
    multi_dimensional_attention,
    reset_net,
    spikingjelly_version,
    temporal_wise_attention,
)
from utils.analysis.attention import watch_attention  # noqa: E402
from utils.analysis.changes import CHANGES, ChangedFrames  # noqa: E402
from utils.analysis.energy import summary  # noqa: E402
from utils.analysis.operations import OperationCounter  # noqa: E402
from utils.args import whole  # noqa: E402
from utils.data.events import EventData, load_event_data  # noqa: E402
from utils.data.loaders import make_loaders, set_epoch  # noqa: E402
from utils.distributed import Process  # noqa: E402
from utils.engine import evaluate, time_first, train_one_epoch  # noqa: E402
from utils.errors import SentenceParser, UserError, exit_with_sentence  # noqa: E402
from utils.files import replacing  # noqa: E402
from utils.losses import mse_of_mean  # noqa: E402
from utils.prepare.own import describe_recordings, own_data_set  # noqa: E402
from utils.signals import in_worker  # noqa: E402

__all__ = [
    "BASELINE",
    "DATA",
    "VARIANTS",
    "Task",
    "chosen_rates",
    "make_parser",
    "parts",
    "put_after_convolutions",
    "read_rows",
]

BASELINE = "no attention"
BLOCKS = (2, 3)  # where the published network has SMA
REDUCTION = 4  # of time and channels, in every attention
RATES = (1e-3, 3e-3)
CHOICE, TEST = "choice", "test"  # a run that chooses the learning rate sees no test sample
DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """Of one data set; stored in every row."""

    epochs: int
    T: int = 4
    width: float = 0.25
    batch_size: int = 8


DATA = {
    "N-MNIST": Settings(epochs=8),
    "N-MNIST-longer": Settings(epochs=24),
    "objects": Settings(epochs=8),
    "photographs": Settings(epochs=16),
}
AGAIN = {"N-MNIST-longer": "N-MNIST"}  # the same samples and learning rates, at most 5 seeds
EVERYWHERE = ("N-MNIST", "objects", "photographs")
LONGER = (*EVERYWHERE, "N-MNIST-longer")


def _sma(cls: type = SMA, **keywords: Any) -> Callable[[int, int], nn.Module]:
    return lambda T, C: cls(C, T, C_reduction=REDUCTION, T_reduction=REDUCTION, **keywords)


def _azo(times: int = 1) -> dict[str, Any]:
    return {"AZO": True, "RCR": 4 // times, "RTR": 4 // times}


@dataclass(frozen=True)
class Variant:
    """What stands behind the convolutions of blocks 2 and 3.

    Attributes:
        make: (T, channels) to the attention.
        seeds: how many there are of it, at most.
        data: where it is trained.
        width: of the network, times that of the others.
        rate_of: the variant whose learning rate it takes; its own is chosen where this is empty.
        equations: SMA runs its equations, and neurons are SpikingJelly's.
    """

    make: Callable[[int, int], nn.Module]
    seeds: int = 5
    data: tuple[str, ...] = EVERYWHERE
    width: float = 1.0
    rate_of: str = ""
    equations: bool = False


OBJECTS = ("objects",)
VARIANTS = {
    BASELINE: Variant(lambda T, C: nn.Identity(), 10, LONGER),
    "SMA": Variant(_sma(), 10, LONGER),
    "SMA + AZO": Variant(_sma(**_azo()), 10),
    "SMA, ReLU": Variant(_sma(activation="relu")),
    "SMA-L": Variant(_sma(SMA_L)),
    "SMA, depthwise": Variant(_sma(groups="channel")),
    "temporal-wise": Variant(lambda T, C: temporal_wise_attention(T, REDUCTION)),
    "multi-dimensional": Variant(lambda T, C: multi_dimensional_attention(T, C, REDUCTION)),
    # Why SMA loses on another day: as many weights without attention, small kernels alone, more AZO.
    "no attention, wider": Variant(lambda T, C: nn.Identity(), 5, OBJECTS, width=1.205, rate_of=BASELINE),
    "SMA, kernels 1 and 3": Variant(_sma(kernels=(1, 3)), 5, OBJECTS, rate_of="SMA"),
    "SMA + AZO, twice": Variant(_sma(**_azo(2)), 5, OBJECTS, rate_of="SMA + AZO"),
    # The published form against ours.
    "SMA + AZO, equations": Variant(_sma(**_azo()), 10, ("N-MNIST",), rate_of="SMA + AZO", equations=True),
}


@dataclass(frozen=True)
class Task:
    """What makes a run another than all others; stored in its row."""

    data: str
    variant: str
    seed: int
    lr: float
    kind: str  # CHOICE or TEST


COLUMNS = (
    *Task.__annotations__, *Settings.__annotations__, "split", "epoch", "train_acc1", "held_out_correct",
    "held_out_count", "held_out_loss", "correct", "count", "reversed", "mean_step", "train_curve", "held_out_curve",
    "scale_weights", "time_weight", "energy_uj", "firing_rate", "parameters", "cpu_seconds", "torch", "spikingjelly",
)  # fmt: skip
COST_COLUMNS = ("data", "variant", "steps", "cpu_ms", "ratio")


# Data and networks ---------------------------------------------------------------------------------------------------


def prepare(name: str, data_dir: Path) -> None:
    """Make, once, what :func:`load` reads."""
    folder = _folder(name, data_dir)
    if name == "photographs":
        record_folder(data_dir / "imagenette_subset", folder)
    if name != "objects" and own_data_set(folder) is None:
        describe_recordings(folder, (SIDE, SIDE) if name == "photographs" else None, None, False)
    load(name, data_dir)


def _folder(name: str, data_dir: Path) -> Path:
    return data_dir / AGAIN.get(name, name).replace("N-MNIST", "nmnist")


def load(name: str, data_dir: Path) -> EventData:
    """The data with their own split; a training that reads them starts with :func:`parts`."""
    folder, T = _folder(name, data_dir), DATA[name].T
    if name == "objects":
        return load_event_data("dvs128", folder, T, frame_size=(32, 32))
    return load_event_data("ncaltech101", folder, T)


def parts(name: str, data: EventData) -> tuple[Dataset, Dataset, Dataset]:
    """Training, held-out and test samples, by the place of a training sample in its class.

    Of 20 training samples, 4 of the objects are held out: their test samples are of another day. Of N-MNIST and the
    photographs 3 are held out and 5 join the test samples, which are few.
    """
    places: dict[str, list[int]] = {"train": [], "held out": [], "test": []}
    seen: dict[int, int] = {}
    for index, (_, label) in enumerate(data.train.files):
        place = seen[label] = seen.get(label, -1) + 1
        if name == "objects":
            to = "held out" if place % 5 == 4 else "train"
        else:
            to = "train" if place % 20 < 12 else "held out" if place % 20 < 15 else "test"
        places[to].append(index)
    train, held_out, more = (Subset(data.train, indices) for indices in places.values())
    return train, held_out, ConcatDataset([data.test, more]) if places["test"] else data.test


def put_after_convolutions(net: VGG8, make: Callable[[int, int], nn.Module]) -> VGG8:
    """Put an attention ``make(T, channels)`` behind the convolution of blocks 2 and 3 of a network without any."""
    for number in BLOCKS:
        block = getattr(net, f"block{number}")
        block.insert(1, make(net.T, block[0][0].out_channels))
    return net


def build(variant: Variant, settings: Settings, classes: int, seed: int) -> VGG8:
    """The network of a variant; of one seed all have the same first weights outside their attention."""
    torch.manual_seed(seed)
    plain = VGG8(settings.T, classes, settings.width * variant.width, sma_blocks=())
    net = put_after_convolutions(plain, variant.make)
    return equations_only(net) if variant.equations else net


def optimizer_of(net: nn.Module, lr: float) -> torch.optim.Optimizer:
    """That of the recipe for DVS128 Gesture, whose loss is taken, too."""
    return torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-3)


# A run ---------------------------------------------------------------------------------------------------------------


def train(task: Task, data_dir: Path) -> dict[str, Any]:
    """One run in this process, on one thread: a row of the study."""
    torch.set_num_threads(1)
    began = time.process_time()
    settings, data = DATA[task.data], load(task.data, data_dir)
    training, held_out, test = parts(task.data, data)
    net = build(VARIANTS[task.variant], settings, len(data.classes), task.seed)
    batches, _, watched = _loaders(training, held_out, task)
    optimizer = optimizer_of(net, task.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.epochs)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    torch.manual_seed(task.seed)  # attention drew numbers: dropout is the same in all variants
    best, state, curves = (-1.0, 0.0), {}, ([], [])
    row: dict[str, Any] = {}
    for epoch in range(1, settings.epochs + 1):
        set_epoch(batches, epoch)
        trained = train_one_epoch(net, batches, mse_of_mean, optimizer, scaler, DEVICE)
        scheduler.step()
        found = evaluate(net, watched, mse_of_mean, DEVICE)
        for curve, value in zip(curves, (trained["acc1"], found["acc1"]), strict=True):
            curve.append(f"{value:.2f}")
        if (found["correct"], -found["loss"]) > best:
            best, state = (found["correct"], -found["loss"]), copy.deepcopy(net.state_dict())
            row = {"epoch": epoch, "train_acc1": f"{trained['acc1']:.6g}", "held_out_correct": found["correct"],
                   "held_out_count": found["count"], "held_out_loss": f"{found['loss']:.6g}"}  # fmt: skip
    if task.kind == TEST:
        net.load_state_dict(state)
        row |= _tested(task, net, test)
    return {
        **dict.fromkeys(COLUMNS, ""), **asdict(task), **asdict(settings), **row, "split": data.info.fingerprint,
        "train_curve": " ".join(curves[0]), "held_out_curve": " ".join(curves[1]),
        "parameters": sum(p.numel() for p in net.parameters()), "cpu_seconds": f"{time.process_time() - began:.1f}",
        "torch": torch.__version__, "spikingjelly": spikingjelly_version(),
    }  # fmt: skip


def _loaders(training: Dataset | None, tested: Dataset, task: Task) -> Any:
    both: Any = SimpleNamespace(train=training, val=None, test=tested)
    return make_loaders(both, DATA[task.data].batch_size, 0, task.seed, Process(0, 0, 1, DEVICE))


def _tested(task: Task, net: VGG8, test: Any) -> dict[str, Any]:
    """What a row says of the test samples, by the weights of the chosen epoch."""

    def on(samples: Dataset) -> dict[str, float]:
        return evaluate(net, _loaders(None, samples, task)[-1], mse_of_mean, DEVICE)

    found = on(test)
    row: dict[str, Any] = {"correct": found["correct"], "count": found["count"]}
    if task.data == "objects":
        changes = {"reversed": "steps reversed", "mean_step": "mean of the steps at all steps"}
        row |= {column: on(ChangedFrames(test, name, CHANGES[name]))["correct"] for column, name in changes.items()}
    some = Subset(test, range(0, len(test), 4))
    seen: list[tuple[Tensor, Tensor]] = []  # of every SMA and batch: mean channel weights, distance of the time weights

    def see(_name: str, w_time: Tensor, w_channel: Tensor) -> None:
        seen.append((w_channel.flatten(1).mean(1), (w_time - 1 / len(w_time)).abs().mean()))

    with OperationCounter(net) as counter:
        watch_attention(net, _loaders(None, some, task)[-1], time_first, DEVICE, see)
    if seen:
        scales, distances = (torch.stack(values).mean(0) for values in zip(*seen, strict=True))
        row["scale_weights"] = " ".join(f"{value:.4f}" for value in scales.tolist())
        row["time_weight"] = f"{distances:.4f}"
    total = summary(counter.result(), len(some), "usual", 4.6, 0.9)
    return {
        **row, "energy_uj": f"{total['total']['energy_uj']:.6g}", "firing_rate": f"{total['firing_rate']:.6g}"
    }  # fmt: skip


def measure_costs(data_dir: Path, names: Sequence[str], steps: int = 15) -> list[dict[str, Any]]:
    """CPU time of a training step of every variant, in turn, in this process alone: medians and ratios of medians."""
    torch.set_num_threads(1)
    rows = []
    for name in names:
        settings, data = DATA[name], load(name, data_dir)
        samples = torch.stack([data.train[i][0] for i in range(settings.batch_size)])
        labels = torch.tensor([data.train[i][1] for i in range(settings.batch_size)])
        tasks = {}
        for title, variant in VARIANTS.items():
            if name in variant.data:
                net = build(variant, settings, len(data.classes), seed=0)
                tasks[title] = net, optimizer_of(net, RATES[0])
        spent: dict[str, list[float]] = {title: [] for title in tasks}
        for _ in range(steps + 1):
            for title, (net, optimizer) in tasks.items():
                began = time.process_time()
                inputs, targets = time_first(samples, labels)
                optimizer.zero_grad(set_to_none=True)
                mse_of_mean(net(inputs), targets).backward()
                optimizer.step()
                reset_net(net)
                spent[title].append(time.process_time() - began)
        medians = {title: statistics.median(values[1:]) for title, values in spent.items()}  # one to warm up
        rows += [
            {"data": name, "variant": title, "steps": steps, "cpu_ms": f"{1000 * median:.1f}",
             "ratio": f"{median / medians[BASELINE]:.3f}"}
            for title, median in medians.items()
        ]  # fmt: skip
    return rows


# The study -----------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Train what has no row yet, measure the cost of a step, and write tables and figures."""
    for name in args.data:
        prepare(name, args.data_dir)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn"), in_worker, (0,)) as pool:
        try:
            _train_missing(pool, args, list(_choices(args.data)))
            _train_missing(pool, args, list(_tests(args.data, chosen_rates(read_rows(args.rows, COLUMNS)))))
        except BrokenProcessPool as error:
            raise UserError(
                f"a process of the study was killed (--processes {args.processes}: is there memory for them?); "
                f"finished runs are in {args.rows}, and the same command does the rest"
            ) from error
        except (KeyboardInterrupt, SystemExit) as stop:
            for child in multiprocessing.active_children():
                child.kill()
            print(f"\nstopped; finished runs are in {args.rows}, and the same command does the rest", file=sys.stderr)
            sys.exit(stop.code if isinstance(stop, SystemExit) else 128 + signal.SIGINT)
    costs = costs_file(args.rows)
    measured = read_rows(costs, COST_COLUMNS)
    if missing := [name for name in args.data if name not in {*AGAIN, *(row["data"] for row in measured)}]:
        write_rows(costs, COST_COLUMNS, [*measured, *measure_costs(args.data_dir, missing)])
    table(args)


def _choices(names: Sequence[str]) -> Iterator[Task]:
    of = dict.fromkeys(AGAIN.get(name, name) for name in names)
    for name, (title, variant), lr in itertools.product(of, VARIANTS.items(), RATES):
        if name in variant.data and not variant.rate_of:
            yield Task(name, title, 0, lr, CHOICE)


def _tests(names: Sequence[str], rates: dict[tuple[str, str], float]) -> Iterator[Task]:
    """All data and variants of a seed before the next seed."""
    most = max(variant.seeds for variant in VARIANTS.values())
    for seed, name, (title, variant) in itertools.product(range(1, most + 1), names, VARIANTS.items()):
        if name in variant.data and seed <= (min(variant.seeds, 5) if name in AGAIN else variant.seeds):
            lr = rates[AGAIN.get(name, name), variant.rate_of or title]
            yield Task(name, title, seed, lr, TEST)


def _train_missing(pool: ProcessPoolExecutor, args: argparse.Namespace, tasks: Sequence[Task]) -> None:
    """Train the tasks that have no row yet, and write each row as it comes."""
    done = {_task_of(row) for row in read_rows(args.rows, COLUMNS)}
    todo = [task for task in tasks if task not in done]
    print(f"{tasks[0].kind}: {len(tasks) - len(todo)} runs are there, {len(todo)} to do", flush=True)
    futures = [pool.submit(train, task, args.data_dir) for task in todo]
    for number, future in enumerate(as_completed(futures), 1):
        row = future.result()
        _append(args.rows, row)
        print(
            f"{number}/{len(todo)}  {row['data']}, {row['variant']}, seed {row['seed']}, lr {row['lr']:g}: held out "
            f"{row['held_out_correct']}/{row['held_out_count']} in epoch {row['epoch']}, {row['cpu_seconds']} s",
            flush=True,
        )


def _task_of(row: dict[str, str]) -> Task:
    return Task(row["data"], row["variant"], int(row["seed"]), float(row["lr"]), row["kind"])


def chosen_rates(rows: Sequence[dict[str, str]]) -> dict[tuple[str, str], float]:
    """(data set, variant) to the learning rate with the most correct held-out samples; of equals the lower loss."""
    best: dict[tuple[str, str], tuple[int, float, float]] = {}
    for row in rows:
        if row["kind"] == CHOICE:
            which = row["data"], row["variant"]
            found = int(row["held_out_correct"]), -float(row["held_out_loss"]), float(row["lr"])
            best[which] = max(best.get(which, found), found)
    return {which: lr for which, (*_, lr) in best.items()}


def table(args: argparse.Namespace) -> None:
    """Write tables and figures from the rows alone."""
    from docs.study.tables import write

    if not read_rows(args.rows, COLUMNS):
        raise UserError(
            f"--rows {args.rows} holds no rows yet; make them by: python docs/study/study.py run --data-dir DIR"
        )
    write(args.rows)


# Rows ----------------------------------------------------------------------------------------------------------------


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a file of the study; none where there is no file. A row that a kill cut off is left out.

    Raises:
        UserError: the file is another, or of other settings.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise UserError(f"--rows {path} is no file; give a .csv file of the study, or a name that is free")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(columns):
            raise UserError(f"file {path} is not of this study: its columns differ; give another --rows")
        rows = [row for row in reader if None not in row.values() and None not in row]
    for row in rows if "seed" in columns else ():
        expected = {name: str(value) for name, value in asdict(DATA[row["data"]]).items()}
        if any(row[name] != value for name, value in expected.items()):
            raise UserError(f"file {path} has runs of other settings ({row['data']}); give another --rows")
    return rows


def _append(path: Path, row: dict[str, Any]) -> None:
    """Add a row, flushed to the disk; what is there is kept, without a line that a kill cut off."""
    write_rows(path, COLUMNS, [*read_rows(path, COLUMNS), row])


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write all rows of a file; a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text.detach()


def costs_file(rows: Path) -> Path:
    """The file with the cost of a step, next to the file of the rows."""
    return rows.with_name(f"{rows.stem}_cost.csv")


def make_parser() -> argparse.ArgumentParser:
    """The parser of this tool's command line."""
    parser = SentenceParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    study = commands.add_parser("run", help=run.__doc__)
    study.add_argument("--data-dir", type=Path, required=True, metavar="DIR", help="holds the data sets")
    study.add_argument("--processes", type=whole(1), default=2, metavar="N", help="of one thread each; default: 2")
    study.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="default: all")
    shown = commands.add_parser("table", help=table.__doc__)
    for command in (study, shown):
        command.add_argument(
            "--rows", type=Path, default=ROOT / "docs" / "study" / "study.csv", help="default: docs/study/study.csv"
        )
    study.set_defaults(function=run)
    shown.set_defaults(function=table)
    return parser


def main() -> None:
    """Do what the command says."""
    args = make_parser().parse_args()
    args.function(args)


if __name__ == "__main__":
    exit_with_sentence(main)

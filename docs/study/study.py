"""What attention is worth: seven variants in one place of SMA-VGG8, on two small data sets of real events.

    python docs/study/study.py run --data-dir DIR     train what is not there yet, one row a run; then table and figure
    python docs/study/study.py table                  table and figure from the rows that are there

DIR/nmnist holds N-MNIST as extract/Caltech101/<digit>/*.bin and split.csv (lines train,<digit>/<sample> and
test,<digit>/<sample>: its own Train and Test); DIR/objects holds DVS128 recordings as extract/DvsGesture. A killed
study goes on with the same command. Seeds vary the first weights, dropout and the order; of one seed all variants share
the first weights outside their attention. The learning rate of every variant is the better of two on a fifth of the
training samples, held out from a run of its own (seed 0); reported is the final epoch. The test samples choose nothing.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import multiprocessing
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: the modules of the repository are one folder up
    sys.path.insert(0, str(ROOT))

from models import SMA, SMA_L, VGG8  # noqa: E402
from models.neurons import (  # noqa: E402
    multi_dimensional_attention,
    reset_net,
    spikingjelly_version,
    temporal_wise_attention,
)
from utils.args import whole  # noqa: E402
from utils.data.events import EventData, load_event_data  # noqa: E402
from utils.data.loaders import make_loaders, set_epoch  # noqa: E402
from utils.distributed import Process  # noqa: E402
from utils.engine import evaluate, time_first, train_one_epoch  # noqa: E402
from utils.errors import SentenceParser, UserError, exit_with_sentence  # noqa: E402
from utils.files import replacing  # noqa: E402
from utils.losses import mse_of_mean, tet  # noqa: E402
from utils.signals import in_worker  # noqa: E402

__all__ = [
    "SETTINGS",
    "VARIANTS",
    "Task",
    "chosen_rates",
    "make_parser",
    "put_after_convolutions",
    "summary",
    "to_markdown",
]

BASELINE = "no attention"
BLOCKS = (2, 3)  # where the published network has SMA
REDUCTION = 4  # of time and channels, in every attention
AZO = {"AZO": True, "RCR": 4, "RTR": 4}

# (T, channels) to the attention behind a convolution.
VARIANTS: dict[str, Callable[[int, int], nn.Module]] = {
    BASELINE: lambda T, C: nn.Identity(),
    "SMA": lambda T, C: SMA(C, T, C_reduction=REDUCTION, T_reduction=REDUCTION),
    "SMA + AZO": lambda T, C: SMA(C, T, C_reduction=REDUCTION, T_reduction=REDUCTION, **AZO),
    "SMA-L": lambda T, C: SMA_L(C, T, C_reduction=REDUCTION, T_reduction=REDUCTION),
    "SMA, depthwise": lambda T, C: SMA(C, T, C_reduction=REDUCTION, T_reduction=REDUCTION, groups="channel"),
    "temporal-wise": lambda T, C: temporal_wise_attention(T, REDUCTION),
    "multi-dimensional": lambda T, C: multi_dimensional_attention(T, C, REDUCTION),
}


@dataclass(frozen=True)
class Settings:
    """Of one data set; stored in every row."""

    epochs: int
    T: int = 4
    width: float = 0.25
    batch_size: int = 16


@dataclass(frozen=True)
class Task:
    """What makes a run another than all others; stored in its row."""

    data: str
    variant: str
    seed: int
    lr: float
    measured_on: str  # one of the two below


TEST, HELD_OUT = "test", "held out"  # the test samples; every fifth training sample, on which the run did not train
SETTINGS = {"N-MNIST": Settings(epochs=10), "DVS128 objects": Settings(epochs=15)}
RATES = (1e-3, 3e-3)
COLUMNS = (
    *Task.__annotations__, *Settings.__annotations__, "split", "acc1", "correct", "count", "loss", "train_acc1",
    "parameters", "scale_weights", "scale_largest", "time_weight_untrained", "time_weight_trained",
    "time_weight_over_samples", "cpu_seconds", "torch", "spikingjelly",
)  # fmt: skip
COST_COLUMNS = ("data", "variant", "steps", "cpu_ms", "ratio")


def put_after_convolutions(net: VGG8, make: Callable[[int, int], nn.Module]) -> VGG8:
    """Put an attention ``make(T, channels)`` behind the convolution of blocks 2 and 3 of a network without any."""
    for number in BLOCKS:
        block = getattr(net, f"block{number}")
        block.insert(1, make(net.T, block[0][0].out_channels))
    return net


def _build(variant: str, settings: Settings, classes: int, seed: int) -> VGG8:
    torch.manual_seed(seed)
    return put_after_convolutions(VGG8(settings.T, classes, settings.width, sma_blocks=()), VARIANTS[variant])


def _load(name: str, data_dir: Path) -> EventData:
    """The data with their fixed split, in memory."""
    T = SETTINGS[name].T
    if name == "N-MNIST":
        split = data_dir / "nmnist" / "split.csv"
        return load_event_data("ncaltech101", data_dir / "nmnist", T, split=str(split), sensor_size=(34, 34))
    return load_event_data("dvs128", data_dir / "objects", T, frame_size=(32, 32))


def _recipe(name: str, net: nn.Module, lr: float) -> tuple[torch.optim.Optimizer, Callable[[Tensor, Tensor], Tensor]]:
    """Optimiser and loss of the published recipe in whose layout the data lie."""
    if name == "N-MNIST":
        return torch.optim.NAdam(net.parameters(), lr=lr, momentum_decay=1e-3), tet
    return torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-3), mse_of_mean


def train(task: Task, data_dir: Path) -> dict[str, Any]:
    """One run in this process, on one thread: a row of the study."""
    torch.set_num_threads(1)
    began = time.process_time()
    settings, device = SETTINGS[task.data], torch.device("cpu")
    data = _load(task.data, data_dir)
    if task.measured_on == HELD_OUT:
        data = _without_test(data)
    net = _build(task.variant, settings, len(data.classes), task.seed)
    batches, _, test_batches = make_loaders(data, settings.batch_size, 0, task.seed, Process(0, 0, 1, device))
    optimizer, criterion = _recipe(task.data, net, task.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.epochs)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    torch.manual_seed(task.seed)  # attention drew numbers: dropout is the same in all variants
    seen = _Weights(net)
    evaluate(net, test_batches, criterion, device)
    untrained, trained = seen.take(), {}
    for epoch in range(1, settings.epochs + 1):
        set_epoch(batches, epoch)
        trained = train_one_epoch(net, batches, criterion, optimizer, scaler, device)
        scheduler.step()
    seen.take()
    result = evaluate(net, test_batches, criterion, device)
    found = seen.take()
    return {
        **asdict(task), **asdict(settings), "split": data.info.fingerprint,
        "acc1": f"{result['acc1']:.6g}", "correct": result["correct"], "count": result["count"],
        "loss": f"{result['loss']:.6g}", "train_acc1": f"{trained['acc1']:.6g}",
        "parameters": sum(p.numel() for p in net.parameters()),
        "scale_weights": found["scale_weights"], "scale_largest": found["scale_largest"],
        "time_weight_untrained": untrained["time_weight"], "time_weight_trained": found["time_weight"],
        "time_weight_over_samples": found["over_samples"], "cpu_seconds": f"{time.process_time() - began:.1f}",
        "torch": torch.__version__, "spikingjelly": spikingjelly_version(),
    }  # fmt: skip


def _without_test(data: EventData) -> EventData:
    """Every fifth training sample in the place of the test samples."""
    held_out = range(0, len(data.train), 5)  # the samples are sorted by class
    rest = sorted(set(range(len(data.train))) - set(held_out))
    return replace(data, train=Subset(data.train, rest), test=Subset(data.train, held_out))


class _Weights:
    """Watches the weights of all SMA of a network."""

    def __init__(self, net: nn.Module):
        self.seen: list[list[tuple[Tensor, Tensor]]] = []  # of every SMA, of every pass
        for module in net.modules():
            if isinstance(module, SMA):
                of_module: list[tuple[Tensor, Tensor]] = []
                self.seen.append(of_module)
                module.observer = lambda w_time, w_channel, _, to=of_module: to.append((w_time, w_channel))

    def take(self) -> dict[str, str]:
        """What was seen since the last call, means over the SMA; empty where there are none.

        Returns:
            ``scale_weights``: the mean channel weight of every scale. ``scale_largest``: in which share of the channels
            (over samples and steps) it is the largest. ``time_weight``: mean distance of the time weights from the
            uniform one. ``over_samples``: their mean standard deviation over the samples.
        """
        names = ("scale_weights", "scale_largest", "time_weight", "over_samples")
        if not self.seen:
            return dict.fromkeys(names, "")
        values: dict[str, list[Tensor]] = {name: [] for name in names}
        for of_module in self.seen:
            w_time = torch.cat([time for time, _ in of_module], -1)  # [S, T, samples]
            w_channel = torch.cat([channel for _, channel in of_module], -2).flatten(1)
            scales = len(w_time)
            values["scale_weights"].append(w_channel.mean(1))
            values["scale_largest"].append(w_channel.argmax(0).bincount(minlength=scales) / w_channel.shape[1])
            values["time_weight"].append((w_time - 1 / scales).abs().mean()[None])
            values["over_samples"].append(w_time.std(-1).mean()[None])
            of_module.clear()
        means = {name: torch.stack(of_modules).mean(0).tolist() for name, of_modules in values.items()}
        return {name: " ".join(f"{value:.4f}" for value in of_scales) for name, of_scales in means.items()}


def measure_costs(data_dir: Path, names: Sequence[str], steps: int = 15) -> list[dict[str, Any]]:
    """CPU time of a training step of every variant, in turn, in this process alone: medians and ratios of medians."""
    torch.set_num_threads(1)
    rows = []
    for name in names:
        settings, data = SETTINGS[name], _load(name, data_dir)
        samples = torch.stack([data.train[i][0] for i in range(settings.batch_size)])
        labels = torch.tensor([data.train[i][1] for i in range(settings.batch_size)])
        tasks = {}
        for variant in VARIANTS:
            net = _build(variant, settings, len(data.classes), seed=0)
            tasks[variant] = (net, *_recipe(name, net, RATES[0]))
        spent: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for _ in range(steps + 1):
            for variant, (net, optimizer, criterion) in tasks.items():
                began = time.process_time()
                inputs, targets = time_first(samples, labels)
                optimizer.zero_grad(set_to_none=True)
                criterion(net(inputs), targets).backward()
                optimizer.step()
                reset_net(net)
                spent[variant].append(time.process_time() - began)
        medians = {variant: statistics.median(values[1:]) for variant, values in spent.items()}  # one to warm up
        rows += [
            {
                "data": name, "variant": variant, "steps": steps, "cpu_ms": f"{1000 * median:.1f}",
                "ratio": f"{median / medians[BASELINE]:.3f}",
            }
            for variant, median in medians.items()
        ]  # fmt: skip
    return rows


def run(args: argparse.Namespace) -> None:
    """Train what has no row yet, measure the cost of a step, and write table and figure."""
    for name in args.data:
        _load(name, args.data_dir)  # makes the frames once, before the processes start
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn"), in_worker, (0,)) as pool:
        try:
            trials = itertools.product(args.data, args.variants, RATES)
            _train_missing(pool, args, [Task(name, variant, 0, lr, HELD_OUT) for name, variant, lr in trials])
            chosen = chosen_rates(read_rows(args.rows, COLUMNS))
            runs = itertools.product(range(1, args.seeds + 1), args.data, args.variants)  # all variants of a seed first
            tasks = [Task(name, variant, seed, chosen[name, variant], TEST) for seed, name, variant in runs]
            _train_missing(pool, args, tasks)
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
    costs = _costs_file(args.rows)
    measured = read_rows(costs, COST_COLUMNS)
    if missing := [name for name in args.data if name not in {row["data"] for row in measured}]:
        _write(costs, COST_COLUMNS, [*measured, *measure_costs(args.data_dir, missing)])
    table(args)


def _train_missing(pool: ProcessPoolExecutor, args: argparse.Namespace, tasks: Sequence[Task]) -> None:
    """Train the tasks that have no row yet, and write each row as it comes."""
    done = {_task_of(row) for row in read_rows(args.rows, COLUMNS)}
    todo = [task for task in tasks if task not in done]
    print(
        f"measured on {tasks[0].measured_on} samples: {len(tasks) - len(todo)} runs are there, {len(todo)} to do",
        flush=True,
    )
    futures = [pool.submit(train, task, args.data_dir) for task in todo]
    for number, future in enumerate(as_completed(futures), 1):
        row = future.result()
        _append(args.rows, row)
        print(
            f"{number}/{len(todo)}  {row['data']}, {row['variant']}, seed {row['seed']}, lr {row['lr']:g}: "
            f"{row['acc1']} % ({row['correct']}/{row['count']}), {row['cpu_seconds']} s",
            flush=True,
        )


def _task_of(row: dict[str, str]) -> Task:
    return Task(row["data"], row["variant"], int(row["seed"]), float(row["lr"]), row["measured_on"])


def chosen_rates(rows: Sequence[dict[str, str]]) -> dict[tuple[str, str], float]:
    """(data set, variant) to the learning rate with the most correct held-out samples; of equals the lower loss."""
    best: dict[tuple[str, str], tuple[int, float, float]] = {}
    for row in rows:
        if row["measured_on"] == HELD_OUT:
            which, found = (row["data"], row["variant"]), (int(row["correct"]), -float(row["loss"]), float(row["lr"]))
            best[which] = max(best.get(which, found), found)
    return {which: lr for which, (*_, lr) in best.items()}


def table(args: argparse.Namespace) -> None:
    """Print the table of the rows, and draw their figure."""
    rows = read_rows(args.rows, COLUMNS)
    if not rows:
        raise UserError(
            f"--rows {args.rows} holds no rows yet; make them by: python docs/study/study.py run --data-dir DIR"
        )
    lines = summary(rows, read_rows(_costs_file(args.rows), COST_COLUMNS))
    print(f"{to_markdown(lines)}\n\n{findings(rows)}")
    figure = args.figure or args.rows.with_suffix(".png")
    draw(lines, figure)
    print(f"\nfigure: {figure}")


def summary(rows: Sequence[dict[str, str]], costs: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """One line for each data set and variant: mean, deviation, and the difference from no attention over the seeds."""
    rows = [row for row in rows if row["measured_on"] == TEST]
    ratio = {(row["data"], row["variant"]): float(row["ratio"]) for row in costs}
    lines = []
    for name, variant in itertools.product(SETTINGS, VARIANTS):
        own = [row for row in rows if (row["data"], row["variant"]) == (name, variant)]
        if not own:
            continue
        values = [float(row["acc1"]) for row in own]
        difference, half = (None, None) if variant == BASELINE else _paired(rows, name, variant, BASELINE)
        lines.append(
            {
                "data": name, "variant": variant, "n": len(values), "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "difference": difference, "half": half,
                "cost": ratio.get((name, variant)), "parameters": int(own[0]["parameters"]),
                "count": int(own[0]["count"]), "lr": float(own[0]["lr"]),
            }
        )  # fmt: skip
    return lines


def _paired(rows: Sequence[dict[str, str]], name: str, variant: str, base: str) -> tuple[float | None, float | None]:
    """Mean difference of two variants over the seeds that both have, and half of its 95 % interval of Student's t."""
    from scipy.stats import t as student  # a dependency of SpikingJelly

    accuracy = {(row["variant"], row["seed"]): float(row["acc1"]) for row in rows if row["data"] == name}
    seeds = [seed for which, seed in accuracy if which == variant and (base, seed) in accuracy]
    pairs = [accuracy[variant, seed] - accuracy[base, seed] for seed in seeds]
    if len(pairs) < 2:
        return (pairs[0] if pairs else None), None
    half = student.ppf(0.975, len(pairs) - 1) * statistics.stdev(pairs) / len(pairs) ** 0.5
    return statistics.fmean(pairs), half


def findings(rows: Sequence[dict[str, str]]) -> str:
    """What AZO adds to SMA, and what SMA's weights do: second table of docs/results.md and its text."""
    rows = [row for row in rows if row["measured_on"] == TEST]
    text = []
    for name in SETTINGS:
        difference, half = _paired(rows, name, "SMA + AZO", "SMA")
        if difference is not None:
            text.append(f"{name}: SMA + AZO minus SMA {_with_interval(difference, half)} points")
    text += [
        "",
        "| data | variant | mean weight of 1x1, 3x3, 5x5, 7x7 | largest in, % of the channels | time weights from 1/S: "
        "untrained, trained | their deviation over samples |",
        "|---|---|---|---|---|---|",
    ]
    for name, variant in itertools.product(SETTINGS, VARIANTS):
        own = [row for row in rows if (row["data"], row["variant"]) == (name, variant) and row["scale_weights"]]
        if own:
            columns = ("scale_weights", "scale_largest", "time_weight_untrained", "time_weight_trained",
                       "time_weight_over_samples")  # fmt: skip
            weights, largest, untrained, trained, over_samples = (_mean_of(own, column) for column in columns)
            cells = (
                name, variant, ", ".join(f"{value:.2f}" for value in weights),
                ", ".join(f"{100 * value:.0f}" for value in largest), f"{untrained[0]:.3f}, {trained[0]:.3f}",
                f"{over_samples[0]:.4f}",
            )  # fmt: skip
            text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def _mean_of(rows: Sequence[dict[str, str]], column: str) -> list[float]:
    """The mean over the rows of a column that holds one number, or one a scale."""
    return [statistics.fmean(values) for values in zip(*(map(float, row[column].split()) for row in rows), strict=True)]


def to_markdown(lines: Sequence[dict[str, Any]]) -> str:
    """The first table of docs/results.md."""
    text = [
        "| data | variant | lr | accuracy, % | seeds | difference, points (95 % interval) | step, times | parameters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        std = "" if line["std"] is None else f" ± {line['std']:.2f}"
        difference = "" if line["difference"] is None else _with_interval(line["difference"], line["half"])
        cost = "" if line["cost"] is None else f"{line['cost']:.2f}"
        cells = (
            line["data"],
            line["variant"],
            f"{line['lr']:g}",
            f"{line['mean']:.2f}{std}",
            line["n"],
            difference,
            cost,
        )
        text.append("| " + " | ".join(map(str, (*cells, f"{line['parameters'] / 1e6:.3f} M"))) + " |")
    return "\n".join(text)


def _with_interval(difference: float, half: float | None) -> str:
    interval = "" if half is None else f" ({difference - half:+.2f} to {difference + half:+.2f})"
    return f"{difference:+.2f}{interval}"


def draw(lines: Sequence[dict[str, Any]], output: Path) -> None:
    """Differences from no attention with their intervals, beside the cost of a training step; 7 inches wide."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    looks = {"N-MNIST": ("#0072B2", "o", -0.14), "DVS128 objects": ("#D55E00", "s", 0.14)}  # Okabe & Ito (2008)
    variants = [name for name in VARIANTS if name != BASELINE]
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 8.0}):
        figure = Figure(figsize=(7.0, 2.8), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.6, 1))
        for name, (colour, marker, shift) in looks.items():
            own = {line["variant"]: line for line in lines if line["data"] == name}
            shown = [v for v in variants if v in own and own[v]["difference"] is not None]
            y = [variants.index(v) + shift for v in shown]
            left.errorbar(
                [own[v]["difference"] for v in shown], y, xerr=[own[v]["half"] or 0.0 for v in shown],
                fmt=marker, color=colour, markersize=4, capsize=2.5, linewidth=1.2, label=name,
            )  # fmt: skip
            timed = [v for v in variants if v in own and own[v]["cost"] is not None]
            right.plot(
                [own[v]["cost"] for v in timed], [variants.index(v) + shift for v in timed], marker, color=colour,
                markersize=4,
            )  # fmt: skip
        left.axvline(0, color="#777777", linewidth=0.8)
        right.axvline(1, color="#777777", linewidth=0.8)
        left.set(yticks=range(len(variants)), yticklabels=variants, ylim=(len(variants) - 0.5, -0.5))
        left.set_xlabel("accuracy, difference from no attention, points\n(95 % interval over paired seeds)")
        right.set_xlabel("CPU time of a training step,\nno attention = 1")
        right.set_xlim(left=0)
        for ax in (left, right):
            ax.grid(axis="x", linewidth=0.3, color="#CCCCCC")
            ax.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(output, format="png")
        except OSError as error:
            raise UserError(f"--figure {output} cannot be written ({error}); give a .png file of yours") from error


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
        expected = {name: str(value) for name, value in asdict(SETTINGS[row["data"]]).items()}
        if any(row[name] != value for name, value in expected.items()):
            raise UserError(f"file {path} has runs of other settings ({row['data']}); give another --rows")
    return rows


def _append(path: Path, row: dict[str, Any]) -> None:
    """Add a row, flushed to the disk; what is there is kept, without a line that a kill cut off."""
    _write(path, COLUMNS, [*read_rows(path, COLUMNS), row])


def _write(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text.detach()


def _costs_file(rows: Path) -> Path:
    return rows.with_name(f"{rows.stem}_cost.csv")


def make_parser() -> argparse.ArgumentParser:
    """The parser of this tool's command line."""
    parser = SentenceParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    study = commands.add_parser("run", help=run.__doc__)
    study.add_argument("--data-dir", type=Path, required=True, metavar="DIR", help="holds nmnist/ and objects/")
    study.add_argument("--seeds", type=whole(1), default=5, metavar="N", help="1 to N; default: 5")
    study.add_argument("--processes", type=whole(1), default=2, metavar="N", help="of one thread each; default: 2")
    study.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    study.add_argument("--data", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: both")
    shown = commands.add_parser("table", help=table.__doc__)
    for command in (study, shown):
        command.add_argument(
            "--rows", type=Path, default=ROOT / "docs" / "study" / "study.csv", help="default: docs/study/study.csv"
        )
        command.add_argument("--figure", type=Path, metavar="FILE", help="default: beside the rows, as .png")
    study.set_defaults(function=run)
    shown.set_defaults(function=table)
    return parser


def main() -> None:
    """Do what the command says."""
    args = make_parser().parse_args()
    args.function(args)


if __name__ == "__main__":
    exit_with_sentence(main)

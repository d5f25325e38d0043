"""Compare finished runs: mean, standard deviation and n over seeds, and whether a difference means anything.

    python tools/compare.py output/azo_seed1 output/azo_seed2 output/no_azo_seed1 output/no_azo_seed2

Runs that differ only in the seed are one group. Two yardsticks for a difference d of two mean accuracies p and q:

- sampling error of the test set, SE = sqrt(p (1 - p) / N + q (1 - q) / N) with N test samples: how far accuracies would
  scatter on another test set of that size. N is not multiplied by the seeds, which share the test set. Both groups are
  tested on the same samples, and what they share cancels: the true error is smaller as a rule.
- seed-to-seed error, sqrt(s^2 / n + t^2 / m) from the standard deviations s, t (n - 1) over n, m seeds.

A difference counts as larger than an error where |d| > 1.96 times it (5 % by chance, for many samples or seeds). The
best epoch is selected on the test set and therefore too good; the final one is not. A run with --val has one accuracy:
that of the epoch which is best on held-out training samples.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the modules of the repository are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.analysis.runs import read_metrics, read_run_file
from utils.analysis.tables import markdown_table
from utils.args import words
from utils.errors import SentenceParser, UserError, exit_with_sentence
from utils.files import check_fields, write_text, writing
from utils.logger import check_output

__all__ = [
    "Group",
    "Run",
    "differences",
    "group_runs",
    "make_parser",
    "read_run",
    "sampling_error",
    "to_markdown",
    "what_differs",
]

Z = 1.96
# Which epoch an accuracy on the test set may be of, and the head of its column.
EPOCHS = {"final": "final epoch, %", "best": "best epoch, %", "val": "epoch chosen on held-out samples, %"}
# What a result does not depend on, or what is compared by itself (the data, in words).
_IGNORED = {
    "seed", "data_dir", "output_dir", "log_dir", "resume", "keep_every", "device", "local_rank", "gpu", "num_workers",
    "evaluate", "backend", "decoder", "timeout", "deterministic", "record_azo", "tracker", "split", "split_seed",
    "recompute",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One finished run; accuracies in percent of ``count`` test samples."""

    path: Path
    settings: dict[str, Any]
    seed: int
    data: str  # its title, which names the folder of data that are not the published ones
    layout: str  # the data set of that layout
    split: str  # fingerprint
    contents: str  # of the frames, so of T, too
    count: int
    accuracies: dict[str, float]  # on the test set, by the key of EPOCHS: final and best, or val
    best_epoch: int


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed."""

    name: str
    runs: list[Run]

    def mean(self, which: str) -> float:
        """Mean over the seeds of the accuracy of an epoch, a key of ``EPOCHS``, percent."""
        return statistics.fmean(run.accuracies[which] for run in self.runs)

    def std(self, which: str) -> float | None:
        """Its standard deviation (n - 1); None for one seed."""
        values = [run.accuracies[which] for run in self.runs]
        return statistics.stdev(values) if len(values) > 1 else None


def read_run(path: Path) -> Run:
    """Read the output directory of a finished run.

    Raises:
        UserError: something of it is missing, or it is not finished.
    """
    described, metrics = read_run_file(path, "args.json"), read_metrics(path)
    check_fields(described["args"], {"epochs": int, "seed": int}, path / "args.json", "a finished run")
    evaluation = read_run_file(path, "evaluation.json")
    selected = evaluation["selection"]
    try:
        settings = {**described["args"], "global batch": described["batch"]["global"]}
        done, epochs = int(metrics["epoch"][-1]), settings["epochs"]
        if done != epochs or selected not in ("final", "val"):
            raise UserError(f"run {path} is not finished: {done} of {epochs} epochs; the same command continues it")
        curve = metrics["test_acc1" if selected == "final" else "val_acc1"]
        best = max(range(len(curve)), key=curve.__getitem__)
        on_test = {"final": curve[-1], "best": curve[best]}
        return Run(
            path=path,
            settings={name: value for name, value in settings.items() if name not in _IGNORED},
            seed=settings["seed"],
            data=described["data"]["title"],
            layout=described["data"]["name"],
            split=described["split"]["fingerprint"],
            contents=described["split"]["contents"],
            count=evaluation["count"],
            accuracies=on_test if selected == "final" else {"val": evaluation["acc1"]},
            best_epoch=int(metrics["epoch"][best]),
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"run {path} is not as a run of this program writes it (args.json or evaluation.json: {error}); give a "
            "finished run"
        ) from error


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Put runs that differ only in the seed together, in the order given.

    Raises:
        UserError: a run is there twice.
    """
    together: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([run.settings, run.layout, run.contents, run.count, sorted(run.accuracies)], sort_keys=True)
        together.setdefault(key, []).append(run)
    for alike in together.values():
        for a, b in itertools.combinations(alike, 2):
            if a.seed == b.seed:
                raise UserError(f"runs {a.path} and {b.path} have the same settings and seed {a.seed}; leave one out")
    groups = list(together.values())
    names = sorted({name for run in runs for name in run.settings})
    several_data = _data_differ([group[0] for group in groups])
    changing = [name for name in names if len({json.dumps(g[0].settings.get(name)) for g in groups}) > 1]

    def name_of(run: Run) -> str:
        changed = ", ".join(f"{name} {words(run.settings.get(name)) or 'unset'}" for name in changing)
        changed = ", ".join(part for part in (run.data if several_data else "", changed) if part)
        return changed or (run.path.resolve().name if len(groups) > 1 else "all runs")

    return [Group(name_of(alike[0]), alike) for alike in groups]


def sampling_error(p: float, q: float, count: int, other_count: int) -> float:
    """Binomial standard error of the difference of two accuracies in percent, in points."""
    p, q = p / 100, q / 100
    return 100 * math.sqrt(p * (1 - p) / count + q * (1 - q) / other_count)


def differences(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Every pair of groups, every epoch that both have: the difference in points and its two errors."""
    rows = []
    for a, b in itertools.combinations(groups, 2):
        for which in (which for which in _epochs(a.runs) if which in _epochs(b.runs)):
            d = b.mean(which) - a.mean(which)
            error = sampling_error(a.mean(which), b.mean(which), a.runs[0].count, b.runs[0].count)
            s, t = a.std(which), b.std(which)
            seeds = None if s is None or t is None else math.sqrt(s**2 / len(a.runs) + t**2 / len(b.runs))
            rows.append(
                {
                    "from": a.name, "to": b.name, "epoch": which, "difference": d, "sampling_error": error,
                    "above_sampling_error": abs(d) > Z * error, "seed_error": seeds,
                    "above_seed_error": None if seeds is None else abs(d) > Z * seeds,
                }
            )  # fmt: skip
    return rows


def _epochs(runs: Sequence[Run]) -> list[str]:
    """Which of ``EPOCHS`` runs have an accuracy of."""
    return [which for which in EPOCHS if any(which in run.accuracies for run in runs)]


def what_differs(groups: Sequence[Group]) -> list[str]:
    """In which of data, split and number of test samples the groups differ, in words."""
    runs = [group.runs[0] for group in groups]
    found = {"split": {run.split for run in runs}, "test samples": {str(run.count) for run in runs}}
    if _data_differ(runs):
        titles = {run.data for run in runs}
        found = {"data": titles if len(titles) > 1 else {run.contents for run in runs}, **found}
    return [f"{title} ({' / '.join(sorted(values))})" for title, values in found.items() if len(values) > 1]


def _data_differ(runs: Sequence[Run]) -> bool:
    """Whether the data of runs differ; frames of two T cannot be compared, so there the names of the samples decide."""
    return any(
        a.layout != b.layout
        or (a.contents != b.contents and a.settings.get("timesteps") == b.settings.get("timesteps"))
        for a, b in itertools.combinations(runs, 2)
    )


def to_markdown(groups: Sequence[Group], unlike: Sequence[str]) -> str:
    """Both tables with what is needed to read them."""
    shown = _epochs([run for group in groups for run in group.runs])
    table = [["group", "n", "seeds", "test samples", *(EPOCHS[which] for which in shown), "best epochs"]]
    for group in groups:
        seeds, epochs = (", ".join(str(getattr(run, what)) for run in group.runs) for what in ("seed", "best_epoch"))
        spread = [_mean_and_std(group, which) for which in shown]
        table.append([group.name, str(len(group.runs)), seeds, str(group.runs[0].count), *spread, epochs])
    lines = [
        f"data: {groups[0].runs[0].data}; split: fingerprint {groups[0].runs[0].split}",
        "",
        markdown_table(table),
        "",
    ]
    if unlike:
        lines[0] = f"**Not the same {', '.join(unlike)}: the differences below compare unlike things.**"
    on_test = "The best epoch is selected on the test set." if "best" in shown else ""
    on_val = "Held-out samples are training samples; the test set was evaluated once." if "val" in shown else ""
    lines.append(" ".join(filter(None, ("Mean ± standard deviation (n - 1) over seeds.", on_test, on_val))))
    if any(len(group.runs) == 1 for group in groups):
        lines.append("A group of one seed has no standard deviation: another seed may give another order.")
    rows = differences(groups)
    if rows:
        head = ["from", "to", "epoch", "difference, points", "sampling error", "larger", "seed error", "larger"]
        table = [head]
        for row in rows:
            seeds = "" if row["seed_error"] is None else f"{row['seed_error']:.2f}"
            verdicts = [_yes(row["above_sampling_error"]), seeds, _yes(row["above_seed_error"])]
            numbers = [f"{row['difference']:+.2f}", f"{row['sampling_error']:.2f}"]
            table.append([row["from"], row["to"], row["epoch"], *numbers, *verdicts])
        lines += ["", markdown_table(table), ""]
        lines += [
            f"Larger: |difference| > {Z} x error. Sampling error: sqrt(p (1 - p) / N + q (1 - q) / N), N test samples. "
            "Seed error: sqrt(s^2 / n + t^2 / m) over n and m seeds."
        ]
    return "\n".join(lines) + "\n"


def to_csv(groups: Sequence[Group]) -> str:
    """One row a group."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    shown = _epochs([run for group in groups for run in group.runs])
    names = [f"{which}_{value}" for which in shown for value in ("mean", "std")]
    writer.writerow(["group", "n", "seeds", "test_samples", *names, "best_epochs", "runs"])
    for group in groups:
        values = [
            value(group, which) if which in _epochs(group.runs) else None
            for which in shown
            for value in (Group.mean, Group.std)
        ]
        seeds, epochs, paths = (
            " ".join(str(getattr(run, what)) for run in group.runs) for what in ("seed", "best_epoch", "path")
        )
        numbers = ["" if value is None else f"{value:.10g}" for value in values]
        writer.writerow([group.name, len(group.runs), seeds, group.runs[0].count, *numbers, epochs, paths])
    return text.getvalue()


def _mean_and_std(group: Group, which: str) -> str:
    if which not in _epochs(group.runs):
        return ""
    std = group.std(which)
    return f"{group.mean(which):.2f}" + ("" if std is None else f" ± {std:.2f}")


def _yes(value: bool | None) -> str:
    return {None: "one seed", True: "yes", False: "no"}[value]


def make_parser() -> argparse.ArgumentParser:
    """The parser of this tool's command line."""
    parser = SentenceParser(description=__doc__)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="output directories of finished runs")
    add("--unlike", action="store_true", help="compare although data, split or test samples differ; the table says so")
    add("--csv", action="store_true", help="write compare.csv, too")
    add("--output-dir", type=Path, metavar="DIR", help="for compare.md (default: the folder that holds all runs)")
    return parser


def main() -> None:
    """Read, compare, print and write."""
    args = make_parser().parse_args()
    groups = group_runs([read_run(path) for path in args.runs])
    unlike = what_differs(groups)
    if unlike and not args.unlike:
        raise UserError(f"these runs differ in {', '.join(unlike)}; compare like with like, or give --unlike")
    parents = [path.resolve().parent for path in args.runs]
    output = args.output_dir or Path(os.path.relpath(os.path.commonpath(parents)))
    check_output(output)
    text = to_markdown(groups, unlike)
    print(text)
    with writing(f"--output-dir {output}"):
        write_text(output / "compare.md", text)
        if args.csv:
            write_text(output / "compare.csv", to_csv(groups))
    print(f"written to {output / 'compare.md'}" + (" and compare.csv" if args.csv else ""))


if __name__ == "__main__":
    exit_with_sentence(main, "the same command starts again")

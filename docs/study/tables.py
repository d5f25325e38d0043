"""Tables and figures of the study, from its rows alone. The tables go into the pages next to this file."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from docs.study.study import (
    AGAIN,
    BASELINE,
    COLUMNS,
    COST_COLUMNS,
    DATA,
    EVERYWHERE,
    TEST,
    VARIANTS,
    costs_file,
    read_rows,
)
from utils.analysis.figures import COLOURS, LINES, new_figure, save, style
from utils.analysis.tables import between, markdown_table
from utils.files import read_text, write_text

__all__ = ["Difference", "paired", "put", "write"]

Rows = Sequence[dict[str, str]]
TITLES = {"N-MNIST": "N-MNIST", "N-MNIST-longer": "N-MNIST, 24 epochs", "objects": "five objects",
          "photographs": "photographs"}  # fmt: skip
WHY = (BASELINE, "no attention, wider", "SMA", "SMA, kernels 1 and 3", "SMA + AZO", "SMA + AZO, twice")


@dataclass(frozen=True)
class Difference:
    """Of two variants in percentage points, over the seeds that both have: mean, and half of its interval."""

    seeds: int
    mean: float
    half: float | None

    def __str__(self) -> str:
        if self.half is None:
            return f"{self.mean:+.2f}"
        return f"{self.mean:+.2f} ({self.mean - self.half:+.2f} to {self.mean + self.half:+.2f})"


def paired(rows: Rows, data: str, variant: str, base: str, comparisons: int = 1) -> Difference | None:
    """The difference of two variants with its 95 % interval of Student's t, or None where they share no seed.

    Args:
        rows: of :func:`docs.study.study.read_rows`.
        data: the data set.
        variant, base: what is compared with what.
        comparisons: how many intervals are looked at together. All of them hold with 95 % (Bonferroni).
    """
    from scipy.stats import t as student  # a dependency of SpikingJelly

    of = {(row["variant"], row["seed"]): _accuracy(row) for row in rows if row["data"] == data and row["kind"] == TEST}
    pairs = [value - of[base, seed] for (which, seed), value in of.items() if which == variant and (base, seed) in of]
    if not pairs:
        return None
    n, half = len(pairs), None
    if n > 1:
        half = float(student.ppf(1 - 0.025 / comparisons, n - 1)) * statistics.stdev(pairs) / n**0.5
    return Difference(n, statistics.fmean(pairs), half)


def write(rows_file: Path) -> None:
    """Write the tables into README.md and objects.md, and the two figures, all next to the file of the rows."""
    rows = [row for row in read_rows(rows_file, COLUMNS) if row["kind"] == TEST]
    costs = {(row["data"], row["variant"]): row["ratio"] for row in read_rows(costs_file(rows_file), COST_COLUMNS)}
    put(
        rows_file.with_name("README.md"),
        f"{_main_table(rows, costs)}\n\n{_pairs_table(rows)}\n\n{_weights_table(rows)}",
    )
    put(rows_file.with_name("objects.md"), _objects_table(rows))
    with style():
        save(_draw_differences(rows, costs), rows_file.with_name("study.png"))
        save(_draw_objects(rows), rows_file.with_name("objects.png"))


def put(page: Path, text: str) -> None:
    """Replace what a page has between its two marks.

    Raises:
        UserError: it has not both.
    """
    begin, end = "<!-- written by docs/study/study.py table -->", "<!-- end -->"
    write_text(page, between(read_text(page) or "", begin, end, text, page))


def _accuracy(row: dict[str, str]) -> float:
    return 100 * int(row["correct"]) / int(row["count"])


def _of(rows: Rows, data: str, variant: str) -> Rows:
    return [row for row in rows if (row["data"], row["variant"]) == (data, variant)]


def _mean(rows: Rows, column: str, of: str = "") -> float:
    """The mean of a column, or in percent of another one."""
    return statistics.fmean(float(row[column]) / (float(row[of]) / 100 if of else 1) for row in rows)


def _compared(rows: Rows, data: str) -> list[str]:
    """The variants that are compared with no attention."""
    return [
        title for title, one in VARIANTS.items() if title != BASELINE and not one.equations and _of(rows, data, title)
    ]


def _main_table(rows: Rows, costs: dict[tuple[str, str], str]) -> str:
    lines = [["data", "variant", "lr", "seeds", "accuracy, %", "difference from no attention, points", "step, times",
              "energy, µJ", "weights"]]  # fmt: skip
    for data in DATA:
        compared = _compared(rows, data)
        for variant in [BASELINE, *compared]:
            own = _of(rows, data, variant)
            if not own:
                continue
            values = [_accuracy(row) for row in own]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            found = "" if variant == BASELINE else str(paired(rows, data, variant, BASELINE, len(compared)) or "")
            ratio = costs.get((AGAIN.get(data, data), variant))
            lines.append(
                [TITLES[data], variant, f"{float(own[0]['lr']):g}", str(len(own)),
                 f"{statistics.fmean(values):.2f}{spread}", found, f"{float(ratio):.2f}" if ratio else "",
                 f"{_mean(own, 'energy_uj'):.0f}", f"{int(own[0]['parameters']) / 1e6:.3f} M"]
            )  # fmt: skip
    return markdown_table(lines)


def _pairs_table(rows: Rows) -> str:
    lines = [["data", "what is compared", "seeds", "difference, points (95 % interval)"]]
    pairs = [("SMA + AZO", "SMA"), ("SMA, ReLU", "SMA"), ("SMA + AZO, equations", "SMA + AZO")]
    for data, (variant, base) in itertools.product(DATA, pairs):
        found = paired(rows, data, variant, base)
        if found is not None:
            lines.append([TITLES[data], f"{variant} against {base}", str(found.seeds), str(found)])
    return markdown_table(lines)


def _weights_table(rows: Rows) -> str:
    lines = [
        ["data", "variant", "mean weight of the scales 1x1, 3x3, 5x5, 7x7", "distance of the time weights from 1/4"]
    ]
    for data, variant in itertools.product(DATA, VARIANTS):
        own = [row for row in _of(rows, data, variant) if len(row["scale_weights"].split()) == 4]
        if own and not VARIANTS[variant].equations:
            scales = zip(*(map(float, row["scale_weights"].split()) for row in own), strict=True)
            weights = ", ".join(f"{statistics.fmean(values):.3f}" for values in scales)
            lines.append([TITLES[data], variant, weights, f"{_mean(own, 'time_weight'):.3f}"])
    return markdown_table(lines)


def _objects_table(rows: Rows) -> str:
    head = ["variant", "seeds", "weights", "training samples, %", "held out, same day, %", "test, another day, %"]
    lines = [[*head, "test, steps reversed, %", "test, mean step at all steps, %", "test, from no attention"]]
    compared = _compared(rows, "objects")
    for variant in VARIANTS:
        own = _of(rows, "objects", variant)
        if own:
            difference = (
                "" if variant == BASELINE else str(paired(rows, "objects", variant, BASELINE, len(compared)) or "")
            )
            numbers = [_mean(own, "train_acc1"), _mean(own, "held_out_correct", "held_out_count"),
                       *(_mean(own, column, "count") for column in ("correct", "reversed", "mean_step"))]  # fmt: skip
            cells = [variant, str(len(own)), f"{int(own[0]['parameters']) / 1e6:.3f} M"]
            lines.append([*cells, *(f"{value:.2f}" for value in numbers), difference])
    return markdown_table(lines)


def _draw_differences(rows: Rows, costs: dict[tuple[str, str], str]) -> Figure:
    """Left: differences from no attention, with their intervals. Right: what a training step costs."""
    variants = [v for v, one in VARIANTS.items() if v != BASELINE and {*EVERYWHERE} <= {*one.data}]
    figure = new_figure(3.4)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.6, 1))
    for number, data in enumerate(DATA):
        shift, colour, marker = 0.19 * (number - 1.5), COLOURS[number], "oDs^"[number]
        m = len(_compared(rows, data))
        found = {y: one for y, v in enumerate(variants) if (one := paired(rows, data, v, BASELINE, m)) is not None}
        if not found:
            continue
        left.errorbar(
            [one.mean for one in found.values()], [y + shift for y in found],
            xerr=[one.half or 0.0 for one in found.values()], fmt=marker, color=colour, markersize=4, capsize=2.5,
            label=TITLES[data],
        )  # fmt: skip
        timed = {y: float(costs[data, v]) for y, v in enumerate(variants) if (data, v) in costs}
        right.plot([*timed.values()], [y + shift for y in timed], marker, color=colour, markersize=4)
    left.axvline(0, color="#777777", linewidth=0.8)
    right.axvline(1, color="#777777", linewidth=0.8)
    left.set(yticks=range(len(variants)), yticklabels=variants, ylim=(len(variants) - 0.5, -0.5))
    left.set_xlabel("accuracy, difference from no attention, points\n(95 % intervals, corrected for their number)")
    right.set_xlabel("CPU time of a training step,\nno attention = 1")
    right.set_xlim(left=0)
    for ax in (left, right):
        ax.grid(axis="x", linewidth=0.3, color="#CCCCCC")
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def _draw_objects(rows: Rows) -> Figure:
    """Held-out accuracy of the training day by epoch, and for each run the test accuracy of another day."""
    figure = new_figure(3.0)
    left, right = figure.subplots(1, 2)
    for number, variant in enumerate(WHY):
        own = _of(rows, "objects", variant)
        if not own:
            continue
        colour = COLOURS[number]
        curves = zip(*(map(float, row["held_out_curve"].split()) for row in own), strict=True)
        means = [statistics.fmean(values) for values in curves]
        left.plot(range(1, len(means) + 1), means, color=colour, linestyle=LINES[number % len(LINES)], label=variant)
        values = [_accuracy(row) for row in own]
        right.plot(values, [number] * len(values), "o", color=colour, markersize=3.5, alpha=0.6, markeredgewidth=0)
        right.plot(statistics.fmean(values), number, "|", color=colour, markersize=14, markeredgewidth=2)
    left.set(xlabel="epoch", ylabel="accuracy on held-out samples\nof the training day, %, mean of the seeds")
    right.set(yticks=range(len(WHY)), yticklabels=WHY, ylim=(len(WHY) - 0.5, -0.5))
    right.set_xlabel("accuracy on the test day, %\n(a point for each seed, a bar for their mean)")
    if left.lines:
        left.legend(frameon=False, loc="lower right")
    for ax in (left, right):
        ax.grid(linewidth=0.3, color="#CCCCCC")
        ax.spines[["top", "right"]].set_visible(False)
    return figure

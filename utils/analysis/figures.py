"""Figures for papers: frames, spikes, attention weights, what AZO replaced, learning curves.

Every function returns a matplotlib figure that knows no window; :func:`save` writes it. A figure is as wide as a page
of two columns (7 inches) at most, its text has 7 points or more at that width, its colours are safe for the
colour-blind, and it has one colour scale.
"""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator

from utils.errors import UserError
from utils.files import replacing, writing
from utils.pictures import colours

__all__ = [
    "draw_attention",
    "draw_azo",
    "draw_changes",
    "draw_confusion",
    "draw_curves",
    "draw_frames",
    "draw_rates",
    "draw_spikes",
    "new_figure",
    "save",
    "style",
    "svg",
]

WIDTH = 7.0  # inches
DPI = 200
# Okabe & Ito, "Color Universal Design" (2008).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
MAP = "viridis"
# The same figure gives the same bytes: no date.
_FORMATS: dict[str, dict[str, Any]] = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
_MOST_LETTERS = 60  # of a line in a legend
_MOST_STEPS, _FITTING_STEPS = 8, 24  # of a figure: where nobody chooses them, and where somebody does


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The settings of all figures, inside the block only."""
    settings: Any = {  # matplotlib types the keys one by one
        "font.family": "DejaVu Sans", "font.size": 8.0, "axes.titlesize": 8.0, "axes.labelsize": 8.0,
        "xtick.labelsize": 7.0, "ytick.labelsize": 7.0, "legend.fontsize": 7.0, "figure.titlesize": 9.0,
        "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5,
        "ytick.major.size": 2.5, "lines.linewidth": 1.3, "pdf.fonttype": 42, "svg.hashsalt": "sma",
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        yield


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, PDF and SVG, each whole or not at all.

    Args:
        path: of the PNG; the others lie next to it.

    Raises:
        UserError: it cannot be written there.
    """
    with style(), writing(f"figure {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        for suffix, facts in _FORMATS.items():
            with replacing(path.with_suffix(suffix)) as file:
                figure.savefig(file, format=suffix[1:], dpi=DPI, metadata=facts)


def svg(figure: Figure) -> str:
    """A figure as SVG, for a page."""
    text = io.StringIO()
    with style():
        figure.savefig(text, format="svg", dpi=DPI, metadata=_FORMATS[".svg"])
    return text.getvalue()


def new_figure(height: float, width: float = WIDTH, compress: bool = False) -> Figure:
    """An empty figure of this size in inches; ``compress`` keeps pictures in it close together."""
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.04, compress=compress)  # inches
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)  # draws without a window, whatever backend is set
    return figure


def _colour_bar(figure: Figure, axes: Iterable[Axes], largest: float, label: str, alpha: float = 1.0) -> Normalize:
    """The one colour scale of a figure, from 0 to ``largest``."""
    scale = Normalize(0, largest or 1.0)
    bar = figure.colorbar(
        ScalarMappable(scale, MAP), ax=list(axes), label=label, fraction=0.04, pad=0.015, aspect=30, alpha=alpha
    )
    bar.outline.set_linewidth(0.6)
    return scale


def _only_picture(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set_visible(False)


def draw_frames(x: np.ndarray, title: str, full: float = 1.0) -> Figure:
    """A strip of the frames ``[T, 2, H, W]`` of one sample, at most eight in a row."""
    with style():
        pictures = colours(x, full=full)
        columns = min(8, len(pictures))
        rows = -(-len(pictures) // columns)
        side = WIDTH / columns
        figure = new_figure(rows * ((side - 0.12) * x.shape[2] / x.shape[3] + 0.24) + 0.3)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for t, ax in enumerate(axes):
            _only_picture(ax)
            if t < len(pictures):
                ax.imshow(pictures[t], interpolation="nearest")
                ax.set_title(f"step {t + 1}", pad=2)
        height, width = x.shape[2:]
        figure.suptitle(f"{title}: {height} x {width} pixels; green: polarity 0, blue: polarity 1")
    return figure


def draw_spikes(
    frames: np.ndarray,
    rates: Mapping[str, np.ndarray],
    title: str,
    shade: bool = True,
    steps: Sequence[int] | None = None,
) -> Figure:
    """Heat maps of spikes over the input: a row a layer, a column a time step, the input in the first row.

    Args:
        frames: input in grey, ``[T, H, W]``, 0 (background) to 1.
        rates: label of a layer to the share of its channels that spike, ``[T, h, w]``, spread over the input.
        shade: lay the map over the input; False shows the map alone.
        steps: numbers of the time steps to show, from 1; None: all, of more than eight eight, evenly spread.

    Raises:
        UserError: there is no such step.
    """
    alpha = 0.75 if shade else 1.0
    T = len(frames)
    for step in steps or ():
        if not 1 <= step <= T:
            raise UserError(f"--steps {step} is none of the {T} time steps; give numbers from 1 to {T}")
    shown = np.unique(np.linspace(1, T, min(_MOST_STEPS, T)).round().astype(int) if steps is None else steps) - 1
    if len(shown) > _FITTING_STEPS:
        raise UserError(f"--steps names {len(shown)} steps and {_FITTING_STEPS} fit on a page; give fewer")
    extent = (0, frames.shape[2], frames.shape[1], 0)
    with style():
        labels = {name: _two_lines(name) for name in ["input", *rates]}
        margins = 0.065 * max(len(line) for label in labels.values() for line in label.split("\n")) + 1.0  # inches
        side = min((WIDTH - margins) / len(shown) - 0.06, 5.2 / (len(rates) + 1), 1.1)
        height = side * frames.shape[1] / frames.shape[2]
        size = (len(rates) + 1) * (height + 0.08) + 0.55, len(shown) * (side + 0.06) + margins
        figure = new_figure(*size, compress=True)  # the pictures keep their proportions and stay close together
        axes = figure.subplots(len(rates) + 1, len(shown), squeeze=False)
        scale = _colour_bar(
            figure, axes.ravel(), max(float(rate[shown].max()) for rate in rates.values()),
            "channels that spike, share", alpha,
        )  # fmt: skip
        for row, (name, values) in enumerate([("input", None), *rates.items()]):
            for ax, t in zip(axes[row], shown, strict=True):
                _only_picture(ax)
                if values is None or shade:
                    darkest = (
                        1.2 if values is None else 3.0
                    )  # faint under a map, whose colours must stay those of the bar
                    ax.imshow(frames[t], cmap="gray_r", vmin=0, vmax=darkest, extent=extent, interpolation="nearest")
                if values is not None:
                    ax.imshow(
                        values[t], cmap=MAP, norm=scale, extent=extent, interpolation="nearest",
                        alpha=alpha,
                    )  # fmt: skip
            axes[row, 0].set_ylabel(labels[name], rotation=0, ha="right", va="center")
        many = len(shown) > _MOST_STEPS  # no room for the word in every column
        for ax, t in zip(axes[0], shown, strict=True):
            ax.set_title(f"{t + 1}" if many else f"step {t + 1}", pad=2)
        figure.suptitle(f"{title}, numbers: time steps" if many else title)
    return figure


def _two_lines(label: str, most: int = 14) -> str:
    """A label, broken at the space nearest to its middle where it is long."""
    spaces = [position for position, letter in enumerate(label) if letter == " "]
    if len(label) <= most or not spaces:
        return label
    cut = min(spaces, key=lambda position: abs(position - len(label) / 2))
    return f"{label[:cut]}\n{label[cut + 1 :]}"


def draw_attention(
    time: np.ndarray, spread: np.ndarray, channel: np.ndarray, kernels: Sequence[int], title: str
) -> Figure:
    """The weights of one SMA, averaged over samples.

    Args:
        time: mean time weights ``[S, T]``.
        spread: their standard deviation over the samples, ``[S, T]``.
        channel: mean channel weights ``[S, T, C]``.
        kernels: kernel size of every scale.
    """
    scales, steps, channels = channel.shape
    with style():
        figure = new_figure(4.6)
        above, below = np.ravel(figure.subfigures(2, 1, height_ratios=(1.0, 1.25), squeeze=False))
        ax = above.subplots()
        x = np.arange(1, steps + 1)
        for s, kernel in enumerate(kernels):
            look = {"color": COLOURS[s % len(COLOURS)], "linestyle": LINES[s % len(LINES)]}
            ax.plot(x, time[s], label=f"{kernel} x {kernel}", marker="o", markersize=2.5, **look)
            ax.fill_between(x, time[s] - spread[s], time[s] + spread[s], color=look["color"], alpha=0.15, linewidth=0)
        ax.axhline(1 / scales, color="#777777", linewidth=0.6)
        ax.set(xlabel="time step", ylabel="time weight, share")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        above.legend(
            loc="outside upper center", ncols=scales, frameon=False,
            title="scale; band: standard deviation over the samples", title_fontsize=7,
        )  # fmt: skip
        axes = below.subplots(1, scales, sharey=True, squeeze=False)[0]
        scale = _colour_bar(below, axes, float(channel.max()), "channel weight, share")
        for ax, values, kernel in zip(axes, channel, kernels, strict=True):
            ax.imshow(
                values.T, cmap=MAP, norm=scale, aspect="auto", interpolation="nearest",
                extent=(0.5, steps + 0.5, channels - 0.5, -0.5),
            )  # fmt: skip
            ax.set(title=f"{kernel} x {kernel}", xlabel="time step")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes[0].set_ylabel("channel")
        figure.suptitle(title)
    return figure


def draw_azo(epochs: Sequence[int], shares: np.ndarray, kernels: Sequence[int], title: str) -> Figure:
    """Which steps and channels AZO replaced in every epoch, of one SMA: above the steps, below the channels.

    Args:
        epochs: their numbers, rising; what lies between and is missing stays white.
        shares: share of the batches in which a (step, channel) was replaced, ``[epochs, S, T, C]``.
        kernels: kernel size of every scale.
    """
    steps, channels = shares.shape[2:]
    every = np.full((epochs[-1] - epochs[0] + 1, *shares.shape[1:]), np.nan)
    every[np.asarray(epochs) - epochs[0]] = shares
    of_step = every.mean(3) * 100  # [epochs, S, T]
    of_channel = every.mean(2) * 100
    if np.isnan(every).any():
        title = f"{title}; white: no record"
    with style():
        figure = new_figure(4.2)
        axes = figure.subplots(2, len(kernels), sharex=True, sharey="row", squeeze=False)
        scale = _colour_bar(figure, axes.ravel(), max(np.nanmax(of_step), np.nanmax(of_channel)), "values replaced, %")
        first, last = epochs[0] - 0.5, epochs[-1] + 0.5
        for s, kernel in enumerate(kernels):
            look = {"cmap": MAP, "norm": scale, "aspect": "auto", "interpolation": "nearest"}
            axes[0, s].imshow(of_step[:, s].T, extent=(first, last, steps + 0.5, 0.5), **look)
            axes[1, s].imshow(of_channel[:, s].T, extent=(first, last, channels - 0.5, -0.5), **look)
            axes[0, s].set_title(f"{kernel} x {kernel}")
            axes[1, s].set_xlabel("epoch")
            axes[1, s].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=5))
            axes[0, s].yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes[0, 0].set_ylabel("time step")
        axes[1, 0].set_ylabel("channel")
        figure.suptitle(title)
    return figure


def draw_curves(runs: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Learning curves: accuracy and loss over the epochs, test or held-out samples solid, training dashed.

    Args:
        runs: name of a run to its columns (``epoch``, ``train_loss``, ``train_acc1``, ``test_loss``, ``test_acc1``, or
            ``val_loss``, ``val_acc1``).

    Raises:
        UserError: there are more runs than colours.
    """
    if len(runs) > len(COLOURS):
        raise UserError(f"{len(runs)} runs are more than can be told apart; give at most {len(COLOURS)}")
    with style():
        names = [textwrap.fill(name, _MOST_LETTERS, break_on_hyphens=False) for name in runs]
        widths = [TextPath((0, 0), line, size=7).get_extents().width for name in names for line in name.split("\n")]
        in_a_row = max(1, min(3, int((WIDTH - 0.2) / (max(widths) / 72 + 0.5))))  # half an inch for the line beside it
        figure = new_figure(2.6 + 0.16 * -(-(len(widths) + 2) // in_a_row))
        axes = figure.subplots(1, 2)
        parts: dict[str, str] = {}  # that solid lines are of
        for name, columns, colour in zip(names, runs.values(), COLOURS, strict=False):
            dot = {"marker": "o", "markersize": 3} if len(columns["epoch"]) == 1 else {}
            part = "val" if "val_acc1" in columns else "test"
            parts[part] = {"val": "held-out", "test": "test"}[part]
            for ax, value in zip(axes, ("acc1", "loss"), strict=True):
                ax.plot(columns["epoch"], columns[f"train_{value}"], color=colour, linestyle="--", linewidth=0.9, **dot)
                ax.plot(columns["epoch"], columns[f"{part}_{value}"], color=colour, label=name, **dot)
        for ax, label in zip(axes, ("accuracy, %", "loss"), strict=True):
            ax.set(xlabel="epoch", ylabel=label)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            ax.grid(linewidth=0.3, color="#CCCCCC")
            ax.spines[["top", "right"]].set_visible(False)
        handles, _ = axes[0].get_legend_handles_labels()
        (dashed,) = axes[0].plot([], [], color="#555555", linestyle="--", linewidth=0.9)
        (solid,) = axes[0].plot([], [], color="#555555")
        figure.legend(
            [*handles, solid, dashed], [*names, " or ".join(parts.values()), "training"], loc="outside lower center",
            ncols=in_a_row, frameon=False,
        )  # fmt: skip
    return figure


def draw_confusion(matrix: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """A confusion matrix: the share of the samples of a true class (row) that were predicted as another (column).

    Args:
        matrix: samples, ``[K, K]``. Up to 20 classes they are written into the cells.
        classes: their names; above 40 every few are written.
    """
    count = len(classes)
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    with style():
        figure = new_figure(5.6, 6.4)
        ax = figure.subplots()
        names = [name if len(name) <= 20 else f"{name[:19]}…" for name in classes]
        scale = Normalize(0, 100)
        ax.imshow(shares, cmap="Blues", norm=scale, interpolation="nearest")
        shown = np.arange(0, count, -(-count // 40))
        size = 7.0 if len(shown) <= 25 else 5.5
        ax.set_xticks(shown, [names[i] for i in shown], fontsize=size)
        ax.set_yticks(shown, [names[i] for i in shown], fontsize=size)
        if max(map(len, names)) > 2:
            ax.tick_params("x", rotation=90)
        if count <= 20:
            for (row, column), number in np.ndenumerate(matrix):
                if number:
                    dark = shares[row, column] > 55
                    ax.text(column, row, f"{number}", ha="center", va="center", fontsize=7,
                            color="white" if dark else "black")  # fmt: skip
        ax.set(xlabel="predicted class", ylabel="true class")
        bar = figure.colorbar(
            ScalarMappable(scale, "Blues"), ax=ax, label="share of the true class, %", fraction=0.04, pad=0.015
        )
        bar.outline.set_linewidth(0.6)
        figure.suptitle(title)
    return figure


def draw_rates(rates: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Firing rate of every layer (row) at every time step (column).

    Args:
        rates: label of a layer to its firing rate at every step, 0 to 1.
    """
    values = 100 * np.array(list(rates.values()))
    rows, steps = values.shape
    with style():
        figure = new_figure(min(9.2, 0.17 * rows + 1.1), 6.4)
        ax = figure.subplots()
        scale = _colour_bar(figure, [ax], float(values.max()), "firing rate, %")
        ax.imshow(values, cmap=MAP, norm=scale, aspect="auto", interpolation="nearest",
                  extent=(0.5, steps + 0.5, rows - 0.5, -0.5))  # fmt: skip
        shown = np.arange(0, rows, -(-rows // 50))
        ax.set_yticks(shown, [list(rates)[i] for i in shown])
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.set_xlabel("time step")
        if rows <= 50 and steps <= 16:
            for (row, step), rate in np.ndenumerate(values):
                bright = rate > 0.6 * values.max()
                ax.text(step + 1, row, f"{rate:.1f}", ha="center", va="center", fontsize=6.5 if steps <= 10 else 5.5,
                        color="black" if bright else "white")  # fmt: skip
        figure.suptitle(title)
    return figure


def draw_changes(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Accuracy under changes of the input: a point with its 95 % interval for each, the unchanged input as a line.

    Args:
        rows: ``name``, ``acc1``, ``low``, ``high`` in percent; the first is the unchanged input.
    """
    with style():
        figure = new_figure(0.2 * len(rows) + 0.9, 5.6)
        ax = figure.subplots()
        places = np.arange(len(rows))
        middle, low, high = (np.array([row[name] for row in rows]) for name in ("acc1", "low", "high"))
        ax.axvline(middle[0], color="#777777", linewidth=0.8, linestyle="--")
        ax.errorbar(
            middle, places, xerr=[middle - low, high - middle], fmt="o", markersize=3.5, color=COLOURS[0],
            elinewidth=1.0, capsize=2,
        )  # fmt: skip
        ax.set_yticks(places, [row["name"] for row in rows])
        ax.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, 100), xlabel="accuracy, %; bar: 95 % interval")
        ax.grid(axis="x", linewidth=0.3, color="#CCCCCC")
        ax.spines[["top", "right"]].set_visible(False)
        figure.suptitle(title)
    return figure

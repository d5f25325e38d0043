"""Draw the README figure: the SMA block (a) and what Attention ZoneOut does to one scale (b).

Panel (b) is not a sketch: it shows values before and after a call of ``models.sma.attention_zoneout``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: the modules of the repository are one folder up
    sys.path.insert(0, str(ROOT))

from models.sma import attention_zoneout, zoneout_choice  # noqa: E402
from utils.errors import SentenceParser, UserError, exit_with_sentence  # noqa: E402

# Okabe & Ito, "Color Universal Design" (2008).
SCALE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
VERMILLION = "#D55E00"
INK = "#222222"
GREY = "#9A9A9A"

WIDTH, HEIGHT, DPI = 10.0, 8.0, 200  # inches, inches, pixels per inch: 2000 x 1600 pixels
FONT, SMALL, HEADING, SYMBOL = 10.0, 9.5, 12.0, 16.0
LINE = 1.3

KERNELS = (1, 3, 5, 7)
STEPS, CHANNELS, BATCH, RTR, RCR = 12, 8, 4, 4, 4
# With this seed the chosen steps hold step 0 (which stays) and two neighbours (which show that AZO reads the values
# from before any replacement): the two cases that need a picture.
SEED = 17


class Zoneout(NamedTuple):
    """One scale of a real AZO call: values ``[T, C]``, the two summed weights, and what was chosen."""

    before: np.ndarray
    after: np.ndarray
    time_sum: np.ndarray
    channel_sum: np.ndarray
    steps: np.ndarray
    channels: np.ndarray
    replaced: np.ndarray


def run_zoneout(seed: int = SEED) -> Zoneout:
    """Put random features and weights of ``len(KERNELS)`` scales through AZO; keep the first scale and sample."""
    rng = torch.Generator().manual_seed(seed)
    scales = len(KERNELS)
    z = torch.rand(scales, STEPS, BATCH, CHANNELS, 1, 1, generator=rng)
    w_time = torch.randn(scales, STEPS, BATCH, generator=rng).softmax(0)
    w_channel = torch.randn(scales, STEPS, BATCH, CHANNELS, generator=rng).softmax(0)
    after = attention_zoneout(z, w_time, w_channel, RTR=RTR, RCR=RCR)
    replaced = zoneout_choice(w_time, w_channel, RTR, RCR)[0]
    time_sum = w_time.sum(2)[0]
    steps = torch.zeros(STEPS, dtype=torch.bool).scatter_(0, time_sum.topk(STEPS // RTR, largest=False).indices, True)
    return Zoneout(
        before=z[0, :, 0, :, 0, 0].numpy(),
        after=after[0, :, 0, :, 0, 0].numpy(),
        time_sum=time_sum.numpy(),
        channel_sum=w_channel[0, steps].sum((0, 1)).numpy(),
        steps=steps.numpy(),
        channels=replaced.any(0).numpy(),
        replaced=replaced.numpy(),
    )


def box(ax: Axes, left: float, low: float, right: float, high: float, text: str = "", **style: object) -> None:
    """A rounded box with its text in the middle."""
    look = {"facecolor": "white", "edgecolor": INK, "linewidth": LINE} | {
        key: value for key, value in style.items() if key not in ("size", "weight")
    }
    shape = FancyBboxPatch((left, low), right - left, high - low, boxstyle="round,pad=0,rounding_size=0.06", **look)
    ax.add_patch(shape)
    size, weight = style.get("size", FONT), style.get("weight", "normal")
    middle = ((left + right) / 2, (low + high) / 2)
    ax.text(*middle, text, ha="center", va="center", size=size, weight=weight, linespacing=1.25)


def path(ax: Axes, *points: tuple[float, float], colour: str = INK, head: bool = True) -> None:
    """A line through ``points`` (horizontal and vertical pieces), with an arrow head at the last one."""
    line = np.array(points)
    if head:
        end, direction = line[-1].copy(), np.sign(line[-1] - line[-2])
        style = {"arrowstyle": "-|>,head_width=0.22,head_length=0.42", "color": colour, "linewidth": LINE}
        style |= {"shrinkA": 0, "shrinkB": 0, "mutation_scale": 12}
        ax.annotate("", end, end - 0.06 * direction, arrowprops=style, zorder=5)
        line[-1] -= 0.05 * direction  # the line ends inside the head, not at its tip
    ax.plot(*line.T, color=colour, linewidth=LINE, solid_capstyle="butt", solid_joinstyle="miter")


def label(ax: Axes, x: float, y: float, text: str, **style: object) -> None:
    """Free text, centred unless told otherwise."""
    ax.text(x, y, text, **({"ha": "center", "va": "center", "size": FONT, "color": INK} | style))


def draw_block(ax: Axes) -> None:
    """Panel (a): the data flow of SMA between its convolution and BatchNorm."""
    label(ax, 0.12, 7.72, "(a)  Spiking Multiscale Attention (SMA)", ha="left", size=HEADING, weight="bold")
    box(ax, 1.14, 3.42, 8.72, 7.48, facecolor="#F3F3F3", edgecolor="none")
    label(ax, 1.3, 7.25, "SMA", ha="left", weight="bold")
    label(ax, 1.3, 6.9, "S scales, T steps,\nB batch, C channels", ha="left", size=SMALL, linespacing=1.25)
    rows = [5.32 - 0.48 * s for s in range(len(KERNELS))]
    low, high = rows[-1] - 0.19, rows[0] + 0.19
    middle = (low + high) / 2

    # Input, branches, weighting, AZO, sum.
    box(ax, 0.12, middle - 0.21, 0.86, middle + 0.21, "Conv2d")
    label(ax, 0.12, middle - 0.4, "[T,B,C,H,W]", size=SMALL, ha="left")
    path(ax, (0.86, middle), (1.36, middle), head=False)
    for s, (kernel, y, colour) in enumerate(zip(KERNELS, rows, SCALE_COLOURS, strict=True), start=1):
        text = rf"Conv {kernel}$\times${kernel}, BN, LIF"
        path(ax, (1.36, middle), (1.36, y), (1.64, y))
        box(ax, 1.64, y - 0.17, 3.14, y + 0.17, text, edgecolor=colour, linewidth=2)
        path(ax, (3.14, y), (6.95, y), colour=colour)
        path(ax, (7.33, y), (7.72, y), colour=colour)
        path(ax, (8.2, y), (8.38, y), colour=colour)
        label(ax, 5.1, y + 0.13, f"$f_{s}$")
        label(ax, 7.48, y + 0.13, f"$z_{s}$")
    box(ax, 6.95, low, 7.33, high, r"$\times$", size=SYMBOL)
    label(ax, 7.33, low - 0.17, r"$z_s = w_{\mathrm{T},s}\, w_{\mathrm{C},s}\, f_s$", ha="right")
    box(ax, 7.72, low, 8.2, high, "AZO", edgecolor=VERMILLION, linewidth=2, linestyle="--", weight="bold")
    label(ax, 7.96, low - 0.17, "training only")
    box(ax, 8.38, low, 8.64, high, r"$\Sigma_s$", size=HEADING)

    # Out of the block.
    box(ax, 8.94, middle - 0.21, 9.34, middle + 0.21, "BN")
    box(ax, 9.5, middle - 0.21, 9.9, middle + 0.21, "LIF")
    path(ax, (8.64, middle), (8.94, middle))
    path(ax, (9.34, middle), (9.5, middle))
    label(ax, 9.9, middle - 0.4, "[T,B,C,H,W]", size=SMALL, ha="right")

    # Squeeze.
    bus = 3.38
    for y in rows:
        ax.add_patch(Circle((bus, y), 0.045, facecolor=INK, edgecolor="none", zorder=3))
    centres = (6.79, 5.95)
    squeeze = sum(centres) / 2
    box(ax, bus - 0.44, squeeze - 0.46, bus + 0.44, squeeze + 0.46, "$g$ = mean\nover H, W\nof " + r"$\Sigma_s\, f_s$")
    path(ax, (bus, rows[-1]), (bus, squeeze - 0.46))

    # Attention weights.
    columns = ((4.08, 5.22), (5.38, 6.1), (6.26, 6.92))
    fork = 3.92
    path(ax, (bus + 0.44, squeeze), (fork, squeeze), head=False)
    r_c, r_t = r"$r_\mathrm{C}$", r"$r_\mathrm{T}$"
    for y, name, texts, end in (
        (
            centres[0],
            r"channel weights $w_\mathrm{C}$  [S,T,B,C]",
            (f"C → C/{r_c}\nReLU", f"C/{r_c} → C\nper scale", "softmax\nover $s$"),
            7.23,
        ),
        (
            centres[1],
            r"time weights $w_\mathrm{T}$  [S,T,B]",
            (f"mean over C\nT → T/{r_t}, ReLU", f"T/{r_t} → T\nper scale", "softmax\nover $s$"),
            7.05,
        ),
    ):
        label(ax, columns[0][0], y + 0.36, name, ha="left")
        for (left, right), text in zip(columns, texts, strict=True):
            box(ax, left, y - 0.22, right, y + 0.22, text, size=SMALL)
        path(ax, (fork, squeeze), (fork, y), (columns[0][0], y))
        for (_, left), (right, _) in pairwise(columns):
            path(ax, (left, y), (right, y))
        path(ax, (columns[-1][1], y), (end, y), (end, high))


def draw_zoneout(ax: Axes, azo: Zoneout) -> None:
    """Panel (b): values of one scale before and after AZO, and the weights that decide."""
    label(ax, 0.12, 3.07, "(b)  Attention ZoneOut (AZO) on one scale", ha="left", size=HEADING, weight="bold")
    cell, low = 0.23, 0.52
    top = low + CHANNELS * cell
    before, after = 1.5, 4.98
    blues = matplotlib.colormaps["Blues"]

    def square(left: float, t: float, c: float, inset: float = 0.0, **style: object) -> None:
        low_left, side = (left + t * cell + inset, top - (c + 1) * cell + inset), cell - 2 * inset
        ax.add_patch(Rectangle(low_left, side, side, **({"linewidth": 1.0} | style)))

    def centre(left: float, t: float, c: float) -> tuple[float, float]:
        return left + (t + 0.5) * cell, top - (c + 0.5) * cell

    # The values.
    stays = {"inset": 0.025, "facecolor": "none", "edgecolor": INK, "linewidth": 1.3, "linestyle": (0, (2, 1.2))}
    swap = {"inset": 0.025, "facecolor": "none", "edgecolor": VERMILLION, "linewidth": 1.8, "zorder": 4}
    for left, values, name in ((before, azo.before, "before"), (after, azo.after, "after")):
        for t in range(STEPS):
            label(ax, centre(left, t, 0)[0], low - 0.12, str(t), size=SMALL)
            for c in range(CHANNELS):
                square(left, t, c, facecolor=blues(0.06 + 0.6 * float(values[t, c])), edgecolor="white")
        for c in range(CHANNELS):
            label(ax, left - 0.1, centre(left, 0, c)[1], str(c), size=SMALL)
        label(ax, left + STEPS * cell / 2, low - 0.33, f"step $t$,  $z_s$ {name} AZO")
    for t, c in np.argwhere(azo.replaced):
        path(ax, centre(before, t - 0.82, c), centre(before, t - 0.16, c), colour=VERMILLION)
        source = np.flatnonzero(azo.before[:, c] == azo.after[t, c])
        square(after, t, c, **swap)
        label(ax, *centre(after, t, c), str(source[0]), size=SMALL - 0.5, weight="bold")
    for c in np.flatnonzero(azo.channels & azo.steps[0]):
        square(before, 0, c, **stays)
        square(after, 0, c, **stays)

    # The weights.
    for t, (weight, chosen) in enumerate(zip(azo.time_sum / azo.time_sum.max(), azo.steps, strict=True)):
        colour = VERMILLION if chosen else GREY
        ax.add_patch(Rectangle((before + (t + 0.18) * cell, top + 0.05), 0.64 * cell, 0.36 * weight, color=colour))
    for c, (weight, chosen) in enumerate(zip(azo.channel_sum / azo.channel_sum.max(), azo.channels, strict=True)):
        length, y = 0.6 * weight, top - (c + 0.82) * cell
        colour = VERMILLION if chosen else GREY
        ax.add_patch(Rectangle((before - 0.22 - length, y), length, 0.64 * cell, color=colour))
    label(ax, before - 0.08, top + 0.2, r"$w_\mathrm{T}$, sum over B", ha="right", size=SMALL)
    label(ax, before - 0.68, low - 0.22, r"$w_\mathrm{C}$, sum over B" + "\nand chosen $t$", size=SMALL)
    label(ax, 0.42, (low + top) / 2, "channel $c$", rotation=90)

    # From one to the other.
    gap = (before + STEPS * cell + 0.12, after - 0.26)
    path(ax, (gap[0], (low + top) / 2), (gap[1], (low + top) / 2))
    label(ax, sum(gap) / 2, (low + top) / 2 + 0.14, "AZO", weight="bold")

    # Legend.
    left, text = 7.92, 8.24
    ys = [top - 0.12 - 0.5 * i for i in range(4)]
    notes = (
        "least attended T // RTR\nsteps, C // RCR channels",
        "takes the value that step\n$t-1$ has before AZO",
        "replaced (the number is\nthe step of the value)",
        "step 0: chosen, but stays,\nas it has no step before",
    )
    for y, note in zip(ys, notes, strict=True):
        label(ax, text, y, note, ha="left", size=SMALL, linespacing=1.2)
    ax.add_patch(Rectangle((left + 0.04, ys[0] - 0.1), 0.15, 0.2, color=VERMILLION))
    path(ax, (left, ys[1]), (left + 0.25, ys[1]), colour=VERMILLION)
    for y, look in ((ys[2], swap), (ys[3], stays)):
        square(left, 0, (top - y) / cell - 0.5, **look)
    label(ax, left + cell / 2, ys[2], "5", size=SMALL - 0.5, weight="bold")


def draw(output: Path) -> None:
    """Draw both panels and write ``output`` as PNG."""
    settings = {"font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans", "text.color": INK}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        ax.axis("off")
        draw_block(ax)
        draw_zoneout(ax, run_zoneout())
        canvas = FigureCanvasAgg(figure)  # without a window, on any machine
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    # A palette makes the file a third of what savefig writes. Pillow is there: matplotlib writes PNG with it.
    picture = Image.fromarray(pixels).quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        picture.save(output, optimize=True)
    except (OSError, ValueError) as error:  # ValueError: a suffix that is no picture
        raise UserError(
            f"--output {output} cannot be written ({error}); give a .png file in a folder of yours"
        ) from error


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = SentenceParser(
        description="Draw the README figure of SMA and Attention ZoneOut.",
        epilog="example: python docs/figures/draw_sma.py --output docs/figures/sma_azo.png",
    )
    default = ROOT / "docs" / "figures" / "sma_azo.png"
    parser.add_argument("--output", type=Path, default=default, help="PNG file (default: docs/figures/sma_azo.png)")
    draw(parser.parse_args(argv).output)


if __name__ == "__main__":
    exit_with_sentence(main)

"""A report as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from utils.analysis.azo_record import read_azo_record
from utils.analysis.changes import change_table
from utils.analysis.figures import draw_azo, draw_curves, draw_frames, draw_spikes
from utils.analysis.inspection import Inspected
from utils.analysis.labels import layer_labels, sma_label
from utils.analysis.page import figure_html, list_html, page, section, table_html, tiles
from utils.analysis.predictions import Predictions, sample_path
from utils.analysis.report_text import (
    ABOUT_TIME,
    OF_ACCURACY,
    class_lines,
    convention_lines,
    explanation,
    formulas,
    part_lines,
)
from utils.analysis.runs import read_metrics
from utils.analysis.spikes import in_grey, spike_maps
from utils.distributed import Process
from utils.prepare.datasets import sample_name

__all__ = ["to_html"]

_AZO = "Share of the values that AZO replaced in every epoch; step 1 has no step before it and stays."


def to_html(
    report: dict[str, Any], predictions: Predictions, inspected: Inspected, figures: Mapping[str, Figure],
    process: Process, run: Path,
) -> str:  # fmt: skip
    """The report as one page.

    Args:
        figures: that :func:`write_report` gives.
        run: where the learning curves and the record of AZO lie, if there are any.
    """
    facts, found, latency = report["facts"], report["evaluation"], report["latency"]
    epoch = "; ".join(f"{name} {facts[name]}" for name in OF_ACCURACY)
    about = [[name, words] for name, words in facts.items()]
    about += [[name, version] for name, version in report["versions"].items()] + [["machine", report["machine"]]]
    numbers = tiles(
        [
            (f"{found['acc1']:.2f} %", f"accuracy, {found['correct']} of {found['count']}"),
            (f"{found['acc1_low']:.1f} to {found['acc1_high']:.1f} %", "its 95 % interval (Wilson)"),
            (f"{report['parameters'] / 1e6:.2f} M", "parameters"),
            (f"{100 * report['firing_rate']:.2f} %", "mean firing rate"),
            (f"{report['total']['energy_uj']:.4g} uJ", "energy a sample, by input"),
            (f"{1e3 * latency['median_s']:.1f} ms", "latency of a sample"),
        ]
    )
    sections = [numbers, f'<p class="faint">The accuracy is of epoch {escape(epoch.removeprefix("epoch "))}.</p>']
    if (run / "metrics.csv").exists():
        curves = draw_curves({run.resolve().name: read_metrics(run)})
        sections.append(section("Training", figure_html(curves, "Accuracy and loss over the epochs.")))
    sections.append(
        section(
            "Classes", figure_html(figures["confusion"], "Confusion matrix; the numbers are samples."),
            table_html(class_lines(report["classes"]), [1, 2]),
        )
    )  # fmt: skip
    if "time" in report:
        sections.append(
            section(
                "Does the network use time?", figure_html(figures["time"], "Accuracy under changes of the input."),
                table_html(change_table(report["time"]), [1, 2, 3, 4, 5]), f"<p>{ABOUT_TIME}</p>",
            )
        )  # fmt: skip
    sections += [
        section(
            "Energy", table_html(convention_lines(report["conventions"]), [1, 2, 3, 4]),
            list_html(formulas(report["conventions"])),
            table_html(part_lines(report), [1, 2, 3, 4]),
            f'<p class="faint">{escape(explanation(report))}</p>',
        ),
        section("Firing rates", figure_html(figures["firing_rates"], "Firing rate of every layer at every step.")),
        section("Samples", *_samples_html(predictions, inspected, process)),
    ]  # fmt: skip
    if (run / "azo").is_dir():
        epochs, kernels, shares = read_azo_record(run)
        drawn = (figure_html(draw_azo(epochs, share, kernels, sma_label(name)), _AZO) for name, share in shares.items())
        sections.append(section("What AZO replaced in training", *drawn))
    sections.append(section("About", table_html([["fact", "value"], *about])))
    return page(f"{facts['network'].partition(',')[0]} on {facts['data']}", f"{facts['weights']}", sections)


def _samples_html(predictions: Predictions, inspected: Inspected, process: Process) -> list[str]:
    """Frames and spikes of the most certain correct, the least certain and the most certain wrong prediction."""
    right, wrong = (np.flatnonzero(which) for which in (predictions.correct, ~predictions.correct))
    chosen = {"Least certain prediction": int(predictions.score.argmin())}
    if len(wrong):
        chosen["Most certain wrong prediction"] = int(wrong[predictions.score[wrong].argmax()])
    if len(right):
        chosen["Most certain correct prediction"] = int(right[predictions.score[right].argmax()])
    labels, parts = layer_labels(inspected.net), []
    for index, kind in {index: kind for kind, index in chosen.items()}.items():
        sample, label, inputs = inspected.sample(index, process.device)
        maps = {labels[name]: values for name, values in spike_maps(inspected.net, inputs, None).items()}
        name = sample_name(sample_path(inspected.test, index))
        classes = inspected.classes
        words = f"{name}; true: {classes[label]}, predicted: {classes[predictions.predicted[index]]}"
        if sample.ndim == 4:
            bright = float(np.quantile(sample[sample > 0], 0.9)) if bool((sample > 0).any()) else 1.0
            parts.append(figure_html(draw_frames(sample.numpy(), name, bright), f"{kind}: {words}; frames"))
        T = len(next(iter(maps.values())))
        parts.append(figure_html(draw_spikes(in_grey(sample, T), maps, words), f"{kind}: {words}; spikes"))
    return parts

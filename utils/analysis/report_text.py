"""A report as Markdown and CSV, and the tables that its HTML page shares."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from utils.analysis.changes import change_table
from utils.analysis.energy import CONSTANTS
from utils.analysis.tables import markdown_table

__all__ = [
    "ABOUT_TIME",
    "OF_ACCURACY",
    "class_lines",
    "convention_lines",
    "explanation",
    "formulas",
    "part_lines",
    "to_csv",
    "to_markdown",
]

OF_ACCURACY = ("epoch", "seed")  # facts that every accuracy needs
_MOST_CLASSES = 30  # in report.md; classes.csv has all
ABOUT_TIME = (
    "Changes of the accuracy are paired per sample: interval by a bootstrap over the samples (10,000 resamples), p by "
    "McNemar's exact test, not corrected for the number of tests. Events are dropped independently; noise adds events "
    "anywhere with the same probability, as a share of the sample's own. Seeds are fixed."
)


def to_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown, with every definition that its numbers need."""
    total, evaluation, latency = report["total"], report["evaluation"], report["latency"]
    facts = report["facts"]
    title = ["", "# Report", "", *(f"- {name}: {words}" for name, words in facts.items() if name not in OF_ACCURACY)]
    title += [
        f"- parameters: {report['parameters'] / 1e6:.6f} M",
        f"- accuracy: {evaluation['acc1']:.2f} % ({evaluation['correct']}/{evaluation['count']})"
        + "".join(f"; {name} {facts[name]}" for name in OF_ACCURACY),
        f"- 95 % interval of the accuracy (Wilson): {evaluation['acc1_low']:.2f} to {evaluation['acc1_high']:.2f} %",
        f"- latency: {1e3 * latency['median_s']:.1f} ms for one sample (median of {latency['runs']}, "
        f"{1e3 * latency['min_s']:.1f} to {1e3 * latency['max_s']:.1f}) on {report['machine']}",
        f"- mean firing rate: {100 * report['firing_rate']:.2f} % ({report['spikes']:.0f} spikes a sample)",
        f"- energy: {total['energy_uj']:.2f} uJ a sample = {report['mac_pj']:g} pJ x {total['mac'] / 1e6:.3f} M MAC + "
        f"{report['ac_pj']:g} pJ x {total['ac'] / 1e6:.3f} M AC",
    ]
    head = ["layer", "module", "kind", "input", "input rate", "MAC, M", "AC, M", "synaptic operations, M", "energy, uJ"]
    work, rates = [head], [["neurons", "module", "count", "firing rate", "at step 1, 2, ..."]]
    for row in report["layers"]:
        if row["kind"] == "neuron":
            steps = " ".join(f"{100 * rate:.1f}" for rate in row["firing_rate_of_step"])
            rates.append(
                [row["label"], row["layer"], str(row["neurons"]), f"{100 * row['firing_rate']:.2f} %", f"{steps} %"]
            )
        else:
            rate = f"{100 * row['input_rate']:.1f} %" if "input" in row else ""
            exact = f"{row['synaptic_operations'] / 1e6:.3f}"
            cells = [row["label"], row["layer"], row["kind"], row.get("input", ""), rate, *_millions(row), exact]
            work.append([*cells, f"{row['energy_uj']:.3f}"])
    return "\n".join(
        [
            *title[1:], "", "## Where the energy goes", "", markdown_table(part_lines(report)), "",
            explanation(report), "",
            "## Energy by the conventions of the field", "",
            markdown_table(convention_lines(report["conventions"])), "",
            *(f"- {line}" for line in formulas(report["conventions"])), "",
            *_time_in_words(report),
            "## Accuracy of the classes", "", markdown_table(class_lines(report["classes"])), "",
            "## Operations of a sample", "", markdown_table(work), "", "## Firing rates", "", markdown_table(rates), "",
        ]
    )  # fmt: skip


def part_lines(report: dict[str, Any]) -> list[list[str]]:
    """MAC, AC and energy of the network, the branches of SMA and its gating."""
    lines = [["part", "MAC, M", "AC, M", "energy, uJ", "share"]]
    for name, part in report["parts"].items():
        if part["energy_uj"]:
            lines.append([name, *_millions(part), f"{part['energy_uj']:.2f}", f"{100 * part['share']:.2f} %"])
    total = report["total"]
    return [*lines, ["all", *_millions(total), f"{total['energy_uj']:.2f}", "100 %"]]


def convention_lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The energy by the conventions of the field; :func:`formulas` says what they are."""
    lines = [["convention", "MAC, M", "AC, M", "energy, uJ", "samples"]]
    lines += [[row["name"], *_millions(row), f"{row['energy_uj']:.2f}", str(row["samples"])] for row in rows]
    return lines


def formulas(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Formula and source of every convention, in words."""
    return [f"{row['name']}: {row['formula']}. Source: {row['source']}." for row in rows]


def class_lines(classes: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The classes with the lowest accuracies."""
    lines = [["class", "accuracy", "95 % interval (Wilson)"]]
    tested = sorted((row for row in classes if row["count"]), key=lambda row: row["acc1"])
    for row in tested[:_MOST_CLASSES]:
        accuracy = f"{row['acc1']:.2f} % ({row['correct']}/{row['count']})"
        lines.append([row["class"], accuracy, f"{row['low']:.1f} to {row['high']:.1f} %"])
    if len(tested) > _MOST_CLASSES:
        lines.append([f"and {len(tested) - _MOST_CLASSES} classes with higher accuracies in classes.csv", "", ""])
    return lines


def _time_in_words(report: dict[str, Any]) -> list[str]:
    if "time" not in report:
        return []
    return ["## Does the network use time?", "", markdown_table(change_table(report["time"])), "", ABOUT_TIME, ""]


def explanation(report: dict[str, Any]) -> str:
    """What the operations, rates and energies of a report mean."""
    sma_share = report["parts"]["SMA gating"]["share"] + report["parts"]["SMA branches"]["share"]
    sma = (
        f"SMA takes {100 * sma_share:.1f} % of the energy. Its branches read a real-valued map (the convolution before "
        "them), so they are multiply-accumulates. " if sma_share else ""
    )  # fmt: skip
    if report["count"] == "usual":
        ac = "AC = rate of the input x connections (padding included), the field's usual estimate"
    else:
        ac = "Connections one by one, those to zero padding left out"
    return (
        f"{sma}A layer whose input held only 0 and 1 over the whole test set is counted in accumulates (AC), every "
        f"other in multiply-accumulates (MAC). {ac}. The synaptic operations are counted one by one, without padding. "
        "A firing rate is spikes / (neurons x steps x samples) over the whole test set; the mean one is weighted by "
        "elements. Energy: "
        f"{report['mac_pj']:g} pJ a MAC and {report['ac_pj']:g} pJ an AC (default 4.6 and 0.9, {CONSTANTS}). "
        "Not counted: BatchNorm (folds into the layer beside it), pooling, dropout, neuron states, residual additions, "
        "softmax and memory; what is computed once for T equal inputs counts once. It is an estimate for arithmetic "
        "alone, not a measurement of a chip."
    )


def _millions(row: dict[str, float]) -> list[str]:
    return [f"{row[name] / 1e6:.3f}" for name in ("mac", "ac")]


def to_csv(report: dict[str, Any]) -> str:
    """One row a layer, in the order of the network; the rates of the steps are separated by spaces."""
    names = ["layer", "label", "kind", "part", "input", "input_rate", "mac", "ac", "synaptic_operations", "energy_uj"]
    names += ["neurons", "firing_rate", "firing_rate_of_step"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    for row in report["layers"]:
        steps = {k: " ".join(f"{rate:.10g}" for rate in v) for k, v in row.items() if k == "firing_rate_of_step"}
        writer.writerow({k: f"{v:.10g}" if isinstance(v, float) else v for k, v in row.items()} | steps)
    return text.getvalue()

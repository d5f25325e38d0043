"""Report of a trained network: parameters, accuracy, firing rates, operations, energy, latency.

    python tools/report.py --weights output/dvs128_demo/last.pt --demo
    python tools/report.py --weights output/dvs128/last.pt --data-dir data/dvs128
    torchrun --nproc_per_node 4 tools/report.py --weights output/dvs128/last.pt

Everything is counted over all test samples, exactly for any number of processes. The report and docs/analysis.md say
what is counted as an operation. It writes report.md, report.csv and report.json; classes.csv, confusion.csv and
predictions.csv; and the figures confusion and firing_rates as PNG, PDF and SVG. --time asks whether the network uses
the order of the steps, and --html gathers all of it in one page.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

if not __package__:  # run as a file: the modules of the repository are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.neurons import reset_net
from utils.analysis.azo_record import read_azo_record
from utils.analysis.changes import change_table, changed_accuracies
from utils.analysis.energy import CONSTANTS, conventions, count_by_spikingjelly, energy, operations, summary
from utils.analysis.figures import (
    draw_azo,
    draw_changes,
    draw_confusion,
    draw_curves,
    draw_frames,
    draw_rates,
    draw_spikes,
    save,
)
from utils.analysis.inspection import Inspected, add_inspection, load_inspected
from utils.analysis.labels import layer_labels
from utils.analysis.operations import OperationCounter
from utils.analysis.page import figure_html, page, section, table_html, tiles
from utils.analysis.predictions import (
    Collector,
    Predictions,
    confusion_csv,
    csv_text,
    in_order,
    predictions_csv,
    sample_path,
)
from utils.analysis.runs import read_metrics
from utils.analysis.spikes import in_grey, spike_maps
from utils.analysis.statistics import wilson
from utils.analysis.tables import markdown_table
from utils.args import not_negative, whole
from utils.distributed import Process, start
from utils.engine import evaluate
from utils.errors import SentenceParser, exit_with_sentence
from utils.files import write_text, writing
from utils.logger import check_output, progress_bar
from utils.prepare.datasets import sample_name
from utils.versions import machine, versions

__all__ = ["energy", "make_parser", "operations", "summary", "to_csv", "to_markdown"]

_OF_ACCURACY = ("epoch", "seed")  # facts that every accuracy needs
_MOST_CLASSES = 30  # in report.md; classes.csv has all
_ABOUT_TIME = (
    "Changes of the accuracy are paired per sample: interval by a bootstrap over the samples (10,000 resamples), p by "
    "McNemar's exact test, not corrected for the number of tests. Events are dropped independently; noise adds events "
    "anywhere with the same probability, as a share of the sample's own. Seeds are fixed."
)
_AZO = "Share of the values that AZO replaced in every epoch; step 1 has no step before it and stays."


def measure_latency(inspected: Inspected, process: Process, runs: int) -> dict[str, Any]:
    """Seconds from one sample on the device to its logits: median and extremes of ``runs`` after a warm-up."""
    sample, label = inspected.test[0]
    inputs, _ = inspected.prepare(sample[None].to(process.device), torch.tensor([label]))
    seconds = []
    with torch.inference_mode():
        for _ in range(runs + 1):
            began = time.perf_counter()
            inspected.net(inputs)
            if process.device.type == "cuda":
                torch.cuda.synchronize(process.device)
            seconds.append(time.perf_counter() - began)
            reset_net(inspected.net)
    seconds = seconds[1:]
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds), "runs": runs}


def to_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown, with every definition that its numbers need."""
    total, evaluation, latency = report["total"], report["evaluation"], report["latency"]
    facts = report["facts"]
    title = ["", "# Report", "", *(f"- {name}: {words}" for name, words in facts.items() if name not in _OF_ACCURACY)]
    title += [
        f"- parameters: {report['parameters'] / 1e6:.6f} M",
        f"- accuracy: {evaluation['acc1']:.2f} % ({evaluation['correct']}/{evaluation['count']})"
        + "".join(f"; {name} {facts[name]}" for name in _OF_ACCURACY),
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
            *title[1:], "", "## Where the energy goes", "", markdown_table(_part_lines(report)), "", _explanation(report), "",
            "## Energy by the conventions of the field", "", markdown_table(_convention_lines(report["conventions"])), "",
            *_time_in_words(report),
            "## Accuracy of the classes", "", markdown_table(_class_lines(report["classes"])), "",
            "## Operations of a sample", "", markdown_table(work), "", "## Firing rates", "", markdown_table(rates), "",
        ]
    )  # fmt: skip


def _part_lines(report: dict[str, Any]) -> list[list[str]]:
    lines = [["part", "MAC, M", "AC, M", "energy, uJ", "share"]]
    for name, part in report["parts"].items():
        if part["energy_uj"]:
            lines.append([name, *_millions(part), f"{part['energy_uj']:.2f}", f"{100 * part['share']:.2f} %"])
    total = report["total"]
    return [*lines, ["all", *_millions(total), f"{total['energy_uj']:.2f}", "100 %"]]


def _convention_lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    lines = [["convention", "MAC, M", "AC, M", "energy, uJ", "samples", "formula", "source"]]
    for row in rows:
        cells = [row["name"], *_millions(row), f"{row['energy_uj']:.2f}", str(row["samples"])]
        lines.append([*cells, row["formula"], row["source"]])
    return lines


def _class_lines(classes: Sequence[dict[str, Any]]) -> list[list[str]]:
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
    return ["## Does the network use time?", "", markdown_table(change_table(report["time"])), "", _ABOUT_TIME, ""]


def _explanation(report: dict[str, Any]) -> str:
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
    names = ("layer", "label", "kind", "part", "input", "input_rate", "mac", "ac", "synaptic_operations", "energy_uj")
    names += ("neurons", "firing_rate", "firing_rate_of_step")
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    for row in report["layers"]:
        steps = {k: " ".join(f"{rate:.10g}" for rate in v) for k, v in row.items() if k == "firing_rate_of_step"}
        writer.writerow({k: f"{v:.10g}" if isinstance(v, float) else v for k, v in row.items()} | steps)
    return text.getvalue()


def make_parser() -> argparse.ArgumentParser:
    """The parser of this tool's command line."""
    parser = SentenceParser(description=__doc__)
    add_inspection(parser)
    add = parser.add_argument_group("report").add_argument
    add("--mac-pj", type=not_negative, default=4.6, metavar="X", help="energy of a multiply-accumulate (default: 4.6)")
    add("--ac-pj", type=not_negative, default=0.9, metavar="X", help="energy of an accumulate (default: 0.9)")
    add("--count", choices=("usual", "exact"), default="usual",
        help="usual: input rate x connections; exact: one by one, without padding (default: usual)")  # fmt: skip
    add("--time", action="store_true", help="also test with steps shuffled, reversed, ..., events dropped, and noise")
    add("--html", action="store_true", help="also write report.html: all of it in one page that needs no network")
    add("--latency-runs", type=whole(1), default=10, metavar="N", help="forward passes of one sample (default: 10)")
    return parser


def main() -> None:
    """Count, measure and write."""
    args = make_parser().parse_args()
    output = args.output_dir or args.weights.parent
    with start(args.device, args.local_rank) as process:
        check_output(output)
        inspected = load_inspected(args, process)
        net, batches = inspected.net, progress_bar(inspected.batches, "test", process)
        collector = Collector()
        with OperationCounter(net) as counter:
            evaluation = evaluate(net, batches, collector, process.device, inspected.prepare)
        layers, predictions = counter.result(), collector.result()
        of_time = {}
        if args.time:
            rows = changed_accuracies(inspected, process, args.batch_size, args.num_workers, predictions)
            of_time = {"time": rows}
        if not process.is_first:
            return
        del evaluation["loss"]
        low, high = wilson(evaluation["correct"], evaluation["count"])
        evaluation |= {"acc1_low": 100 * low, "acc1_high": 100 * high}
        by_spikingjelly = count_by_spikingjelly(net, inspected.batches, inspected.prepare, process.device)
        report = {
            "facts": inspected.facts,
            "parameters": sum(p.numel() for p in net.parameters()),
            "evaluation": evaluation,
            "mac_pj": args.mac_pj,
            "ac_pj": args.ac_pj,
            "count": args.count,
            **summary(layers, evaluation["count"], args.count, args.mac_pj, args.ac_pj),
            "conventions": conventions(layers, evaluation["count"], args.mac_pj, args.ac_pj, by_spikingjelly),
            "classes": predictions.of_classes(inspected.classes),
            **of_time,
            "latency": measure_latency(inspected, process, args.latency_runs),
            "machine": machine(process.device),
            "versions": versions(),
        }
        labels = layer_labels(net)
        for row in report["layers"]:
            row["label"] = labels[row["layer"]]
        names, figures = write_report(report, predictions, inspected, output)
        if args.html:
            names.append("report.html")
            text = to_html(report, predictions, inspected, figures, process, args.weights.parent)
            with writing(f"--output-dir {output}"):
                write_text(output / names[-1], text)
        print(to_markdown(report).partition("## Accuracy of the classes")[0].rstrip())
        print(f"\neverything is in {output}: {', '.join(names)}")


def write_report(
    report: dict[str, Any], predictions: Predictions, inspected: Inspected, output: Path
) -> tuple[list[str], dict[str, Figure]]:
    """Write the files that the top of this file names; their names and the figures by name."""
    matrix, classes = in_order(predictions.confusion(len(inspected.classes)), inspected.classes)
    names = ("class", "count", "correct", "acc1", "low", "high")
    texts = {
        "report.md": to_markdown(report),
        "report.csv": to_csv(report),
        "report.json": json.dumps(report, indent=2) + "\n",
        "classes.csv": csv_text([names, *([row[name] for name in names] for row in report["classes"])]),
        "confusion.csv": confusion_csv(matrix, classes),
        "predictions.csv": predictions_csv(predictions, inspected.test, inspected.classes),
    }
    found, data = report["evaluation"], report["facts"]["data"]
    figures = {
        "confusion": draw_confusion(matrix, classes, f"{data}: {found['acc1']:.2f} % of {found['count']} correct"),
        "firing_rates": draw_rates(
            {row["label"]: row["firing_rate_of_step"] for row in report["layers"] if row["kind"] == "neuron"},
            f"{data}: mean firing rate {100 * report['firing_rate']:.2f} %",
        ),
    }
    if "time" in report:
        head = ("name", "acc1", "low", "high", "correct", "count", "change", "change_low", "change_high", "p")
        texts["time.csv"] = csv_text([head, *([row.get(name, "") for name in head] for row in report["time"])])
        figures["time"] = draw_changes(report["time"], f"{data}: accuracy under changes of the input")
    with writing(f"--output-dir {output}"):
        for name, text in texts.items():
            write_text(output / name, text)
    for name, figure in figures.items():
        save(figure, output / f"{name}.png")
    return [*texts, *(f"{name}.png, .pdf and .svg" for name in figures)], figures


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
    epoch = "; ".join(f"{name} {facts[name]}" for name in _OF_ACCURACY)
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
            table_html(_class_lines(report["classes"]), [1, 2]),
        )
    )  # fmt: skip
    if "time" in report:
        sections.append(
            section(
                "Does the network use time?", figure_html(figures["time"], "Accuracy under changes of the input."),
                table_html(change_table(report["time"]), [1, 2, 3, 4, 5]), f"<p>{_ABOUT_TIME}</p>",
            )
        )  # fmt: skip
    sections += [
        section(
            "Energy", table_html(_convention_lines(report["conventions"]), [1, 2, 3, 4]),
            table_html(_part_lines(report), [1, 2, 3, 4]), f'<p class="faint">{escape(_explanation(report))}</p>',
        ),
        section("Firing rates", figure_html(figures["firing_rates"], "Firing rate of every layer at every step.")),
        section("Samples", *_samples_html(predictions, inspected, process)),
    ]  # fmt: skip
    if (run / "azo").is_dir():
        epochs, kernels, shares = read_azo_record(run)
        labels = layer_labels(inspected.net)
        drawn = (figure_html(draw_azo(epochs, share, kernels, labels[name]), _AZO) for name, share in shares.items())
        sections.append(section("What AZO replaced in training", *drawn))
    sections.append(section("About", table_html([["fact", "value"], *about])))
    return page(f"{facts['network'].partition(',')[0]} on {facts['data']}", f"{facts['weights']}", sections)


def _samples_html(predictions: Predictions, inspected: Inspected, process: Process) -> list[str]:
    """Frames and spikes of the most certain correct, the least certain and the most certain wrong prediction."""
    right, wrong = (np.flatnonzero(which) for which in (predictions.correct, ~predictions.correct))
    chosen = {"least certain": int(predictions.score.argmin())}
    if len(wrong):
        chosen["most certain of the wrong ones"] = int(wrong[predictions.score[wrong].argmax()])
    if len(right):
        chosen["most certain of the correct ones"] = int(right[predictions.score[right].argmax()])
    labels, parts = layer_labels(inspected.net), []
    for index, kind in {index: kind for kind, index in chosen.items()}.items():
        sample, label = inspected.test[index]
        inputs, _ = inspected.prepare(sample[None].to(process.device), torch.tensor([label]))
        maps = {labels[name]: values for name, values in spike_maps(inspected.net, inputs, None).items()}
        name = sample_name(sample_path(inspected.test, index))
        classes = inspected.classes
        words = f"{name}; true: {classes[label]}, predicted: {classes[predictions.predicted[index]]}"
        if sample.ndim == 4:
            bright = float(np.quantile(sample[sample > 0], 0.9)) if bool((sample > 0).any()) else 1.0
            parts.append(figure_html(draw_frames(sample.numpy(), name, bright), f"Frames of the {kind}: {words}"))
        T = len(next(iter(maps.values())))
        parts.append(figure_html(draw_spikes(in_grey(sample, T), maps, words), f"Spikes of the {kind}: {words}"))
    return parts


if __name__ == "__main__":
    exit_with_sentence(main, "nothing was written; the same command starts again")

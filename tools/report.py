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
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

if not __package__:  # run as a file: the modules of the repository are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.neurons import reset_net
from utils.analysis.changes import changed_accuracies, check_time
from utils.analysis.energy import conventions, count_by_spikingjelly, energy, operations, summary
from utils.analysis.figures import draw_changes, draw_confusion, draw_rates, save
from utils.analysis.inspection import Inspected, add_inspection, load_inspected
from utils.analysis.labels import layer_labels
from utils.analysis.operations import OperationCounter
from utils.analysis.predictions import Collector, Predictions, confusion_csv, csv_text, in_order, predictions_csv
from utils.analysis.report_page import to_html
from utils.analysis.report_text import to_csv, to_markdown
from utils.analysis.statistics import wilson
from utils.args import not_negative, whole
from utils.distributed import Process, start
from utils.engine import evaluate
from utils.errors import SentenceParser, exit_with_sentence
from utils.files import write_text, writing
from utils.logger import check_output, progress_bar
from utils.versions import machine, versions

__all__ = ["energy", "make_parser", "operations", "summary", "to_csv", "to_markdown"]


def measure_latency(inspected: Inspected, process: Process, runs: int) -> dict[str, Any]:
    """Seconds from one sample on the device to its logits: median and extremes of ``runs`` after a warm-up."""
    _, _, inputs = inspected.sample(0, process.device)
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
        if args.time:
            check_time(inspected)
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
        count = int(evaluation["count"])
        low, high = wilson(int(evaluation["correct"]), count)
        evaluation |= {"acc1_low": 100 * low, "acc1_high": 100 * high}
        by_spikingjelly = count_by_spikingjelly(net, inspected.batches, inspected.prepare, process.device)
        report: dict[str, Any] = {
            "facts": inspected.facts,
            "parameters": sum(p.numel() for p in net.parameters()),
            "evaluation": evaluation,
            "mac_pj": args.mac_pj,
            "ac_pj": args.ac_pj,
            "count": args.count,
            **summary(layers, count, args.count, args.mac_pj, args.ac_pj),
            "conventions": conventions(layers, count, args.mac_pj, args.ac_pj, by_spikingjelly),
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
    head: tuple[str, ...] = ("class", "count", "correct", "acc1", "low", "high")
    texts = {
        "report.md": to_markdown(report),
        "report.csv": to_csv(report),
        "report.json": json.dumps(report, indent=2) + "\n",
        "classes.csv": csv_text([head, *([row[name] for name in head] for row in report["classes"])]),
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


if __name__ == "__main__":
    exit_with_sentence(main, "nothing was written; the same command starts again")

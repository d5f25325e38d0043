"""Report of a trained network: parameters, accuracy, firing rates, operations, energy, latency.

    python tools/report.py --weights output/dvs128_demo/last.pt --demo
    python tools/report.py --weights output/dvs128/last.pt --data-dir data/dvs128
    torchrun --nproc_per_node 4 tools/report.py --weights output/dvs128/last.pt

Everything is counted over the whole test set, exactly for any number of processes. What is counted as an operation is
told at the top of utils/analysis/operations.py, and in the report. Writes report.md, report.csv and report.json.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file: the modules of the repository are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.neurons import reset_net
from utils.analysis.inspection import Inspected, add_inspection, load_inspected
from utils.analysis.operations import LayerCount, OperationCounter
from utils.analysis.tables import markdown_table
from utils.args import not_negative, whole
from utils.distributed import Process, start
from utils.engine import evaluate
from utils.errors import SentenceParser, exit_with_sentence
from utils.files import write_text, writing
from utils.logger import check_output, progress_bar
from utils.versions import machine, versions

__all__ = ["energy", "make_parser", "operations", "summary", "to_csv", "to_markdown"]

_OF_ACCURACY = ("epoch", "seed")  # facts without which an accuracy is not told
PARTS = ("network", "SMA branches", "SMA gating")
CONSTANTS = "Horowitz, ISSCC 2014, 45 nm: 32-bit floating point, 3.7 pJ a product and 0.9 pJ an addition"


def operations(layer: LayerCount, count: str) -> tuple[float, float]:
    """MAC and AC of a layer, over all samples; ``count`` is ``"usual"`` or ``"exact"`` (utils.analysis.operations)."""
    if layer.kind == "neuron":
        return 0, 0
    return (layer.mac, layer.ac) if count == "usual" else (layer.mac_exact, layer.ac_exact)


def energy(mac: float, ac: float, mac_pj: float, ac_pj: float) -> float:
    """Energy in microjoules: ``mac * mac_pj + ac * ac_pj``."""
    return (mac * mac_pj + ac * ac_pj) * 1e-6


def summary(layers: Sequence[LayerCount], samples: int, count: str, mac_pj: float, ac_pj: float) -> dict[str, Any]:
    """Totals and one row a layer; operations and energy are those of one sample, on average.

    Args:
        layers: over all samples.
        samples: how many there were.
        count: ``"usual"`` or ``"exact"``.
        mac_pj, ac_pj: picojoules of one multiply-accumulate and of one accumulate.
    """
    rows = [_row(layer, samples, count, mac_pj, ac_pj) for layer in layers]
    by_part = {part: _total([row for row in rows if row["part"] == part]) for part in PARTS}
    total = _total(rows)
    for part in by_part.values():
        part["share"] = part["energy_uj"] / total["energy_uj"] if total["energy_uj"] else 0.0
    neurons = [layer for layer in layers if layer.kind == "neuron"]
    elements = sum(layer.inputs for layer in neurons)
    return {
        "firing_rate": sum(layer.nonzero for layer in neurons) / elements if elements else 0.0,
        "spikes": sum(layer.nonzero for layer in neurons) / samples,
        "total": total,
        "parts": by_part,
        "layers": rows,
    }


def _row(layer: LayerCount, samples: int, count: str, mac_pj: float, ac_pj: float) -> dict[str, Any]:
    row: dict[str, Any] = {"layer": layer.name, "kind": layer.kind, "part": layer.part}
    if layer.kind == "neuron":
        neurons = layer.inputs // samples // len(layer.per_step)
        return {**row, "neurons": neurons, "firing_rate": layer.rate, "firing_rate_of_step": layer.rates}
    mac, ac = (number / samples for number in operations(layer, count))
    exact = (layer.mac_exact + layer.ac_exact) / samples
    if layer.inputs:
        row |= {"input": "spikes" if layer.binary else "real", "input_rate": layer.rate}
    return {**row, "mac": mac, "ac": ac, "synaptic_operations": exact, "energy_uj": energy(mac, ac, mac_pj, ac_pj)}


def _total(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {name: sum(row.get(name, 0) for row in rows) for name in ("mac", "ac", "synaptic_operations", "energy_uj")}


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
        f"- latency: {1e3 * latency['median_s']:.1f} ms for one sample (median of {latency['runs']}, "
        f"{1e3 * latency['min_s']:.1f} to {1e3 * latency['max_s']:.1f}) on {report['machine']}",
        f"- mean firing rate: {100 * report['firing_rate']:.2f} % ({report['spikes']:.0f} spikes a sample)",
        f"- energy: {total['energy_uj']:.2f} uJ a sample = {report['mac_pj']:g} pJ x {total['mac'] / 1e6:.3f} M MAC + "
        f"{report['ac_pj']:g} pJ x {total['ac'] / 1e6:.3f} M AC",
    ]
    parts = [["part", "MAC, M", "AC, M", "energy, uJ", "share"]]
    for name, part in report["parts"].items():
        if part["energy_uj"]:
            parts.append([name, *_millions(part), f"{part['energy_uj']:.2f}", f"{100 * part['share']:.2f} %"])
    parts.append(["all", *_millions(total), f"{total['energy_uj']:.2f}", "100 %"])

    head = ["layer", "kind", "input", "input rate", "MAC, M", "AC, M", "synaptic operations, M", "energy, uJ"]
    work, rates = [head], [["neurons", "count", "firing rate", "at step 1, 2, ..."]]
    for row in report["layers"]:
        if row["kind"] == "neuron":
            steps = " ".join(f"{100 * rate:.1f}" for rate in row["firing_rate_of_step"])
            rates.append([row["layer"], str(row["neurons"]), f"{100 * row['firing_rate']:.2f} %", f"{steps} %"])
        else:
            rate = f"{100 * row['input_rate']:.1f} %" if "input" in row else ""
            exact = f"{row['synaptic_operations'] / 1e6:.3f}"
            cells = [row["layer"], row["kind"], row.get("input", ""), rate, *_millions(row), exact]
            work.append([*cells, f"{row['energy_uj']:.3f}"])
    return "\n".join(
        [
            *title[1:], "", "## Where the energy goes", "", markdown_table(parts), "", _explanation(report), "",
            "## Operations of a sample", "", markdown_table(work), "", "## Firing rates", "", markdown_table(rates), "",
        ]
    )  # fmt: skip


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
    names = ("layer", "kind", "part", "input", "input_rate", "mac", "ac", "synaptic_operations", "energy_uj")
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
        with OperationCounter(net) as counter:
            evaluation = evaluate(net, batches, _no_loss, process.device, inspected.prepare)
        layers = counter.result()
        if not process.is_first:
            return
        del evaluation["loss"]
        report = {
            "facts": inspected.facts,
            "parameters": sum(p.numel() for p in net.parameters()),
            "evaluation": evaluation,
            "mac_pj": args.mac_pj,
            "ac_pj": args.ac_pj,
            "count": args.count,
            **summary(layers, evaluation["count"], args.count, args.mac_pj, args.ac_pj),
            "latency": measure_latency(inspected, process, args.latency_runs),
            "machine": machine(process.device),
            "versions": versions(),
        }
        texts = {"md": to_markdown(report), "csv": to_csv(report), "json": json.dumps(report, indent=2) + "\n"}
        with writing(f"--output-dir {output}"):
            for suffix, text in texts.items():
                write_text(output / f"report.{suffix}", text)
        print(texts["md"].partition("## Operations")[0].rstrip())
        print(f"\neverything is in {output}: report.md, report.csv, report.json")


def _no_loss(logits: torch.Tensor, _labels: torch.Tensor) -> torch.Tensor:
    return logits.new_zeros(())


if __name__ == "__main__":
    exit_with_sentence(main, "nothing was written; the same command starts again")

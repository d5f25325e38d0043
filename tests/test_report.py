"""Numbers for a paper: intervals, predictions, conventions of energy, labels, and the files and page of a report."""

import contextlib
import csv
import io
import json
import re
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from models import VGG8, sma_ms_resnet18
from models.neurons import lif
from tests.conftest import ROOT
from tools import export, report, visualize
from utils.analysis.changes import CHANGES
from utils.analysis.energy import conventions, count_by_spikingjelly
from utils.analysis.labels import layer_labels
from utils.analysis.operations import LayerCount, OperationCounter
from utils.analysis.page import page, section, table_html
from utils.analysis.predictions import Collector, Predictions, confusion_csv, in_order
from utils.analysis.statistics import mcnemar, paired_difference, wilson
from utils.errors import exit_with_sentence


def run_as_user(main, *arguments):
    """Run a tool in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["tool", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            exit_with_sentence(main)
            code = 0
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def reported(gesture_data, tmp_path_factory):
    """The folder of a report, with --html and --time, of a small network that spikes."""
    torch.manual_seed(0)
    net = VGG8(T=4, num_classes=11, width=0.125, sma_blocks=[2])
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 20.0)
    run = tmp_path_factory.mktemp("run")
    torch.save(net.state_dict(), run / "weights.pt")
    head = "epoch,train_loss,train_acc1,test_loss,test_acc1,lr,seconds\n"
    (run / "metrics.csv").write_text(head + "1,0.1,9,0.1,9,0.1,1\n")
    common = ["--weights", run / "weights.pt", "--data-dir", gesture_data, "--frame-size", 32, "--device", "cpu"]
    code, _, err = run_as_user(report.main, *common, "--latency-runs", 1, "--html", "--time")
    assert code == 0, err
    return run, common


def table(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_wilson_is_the_solution_of_its_equation_and_stays_inside_0_to_1():
    for correct, count in ((0, 8), (3, 8), (8, 8), (282, 288)):
        low, high = wilson(correct, count)
        share = correct / count
        assert 0 <= low <= share <= high <= 1
        for end in (low, high):  # (share - p)^2 = z^2 p (1 - p) / n
            assert (share - end) ** 2 == pytest.approx(1.959963985**2 * end * (1 - end) / count, abs=1e-9)


def test_mcnemar_counts_only_the_samples_that_change():
    before = np.array([True] * 6 + [False] * 4)
    after = before.copy()
    assert mcnemar(before, after) == 1
    after[:5] = False
    assert mcnemar(before, after) == 2 / 2**5  # five lost, none won
    after[6:] = True
    assert mcnemar(before, after) == 1  # five lost, four won: the closest there is


def test_the_paired_interval_holds_the_change_and_is_the_same_in_every_run():
    rng = np.random.default_rng(1)
    before, after = rng.random(500) < 0.8, rng.random(500) < 0.6
    change, low, high = paired_difference(before, after)
    assert change == pytest.approx(after.mean() - before.mean()) and low < change < high < 0
    assert paired_difference(before, after) == (change, low, high)
    expected = 1.96 * np.std(after.astype(float) - before) / np.sqrt(500)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.05)
    assert paired_difference(before, before) == (0, 0, 0)


def test_the_collector_has_the_prediction_of_the_mean_over_t():
    logits = torch.zeros(2, 3, 4)
    logits[0, 0, 1], logits[1, 0, 2] = 1.0, 3.0  # step 1 says 1, the mean says 2
    logits[:, 1, 0] = 0.5
    logits[:, 2, 3] = 0.25
    collector = Collector()
    assert collector(logits[:, :2], torch.tensor([2, 1])) == 0
    collector(logits[:, 2:], torch.tensor([3]))
    found = collector.result()
    assert found.predicted.tolist() == [2, 0, 3] and found.score.tolist() == [1.5, 0.5, 0.25]
    assert found.correct.tolist() == [True, False, True]


def test_classes_and_confusion_add_up_to_the_samples():
    found = Predictions(np.array([0, 0, 1, 1, 1]), np.array([0, 2, 1, 1, 0]), np.zeros(5))
    matrix = found.confusion(3)
    assert matrix.tolist() == [[1, 0, 1], [1, 2, 0], [0, 0, 0]]
    first, second, third = found.of_classes(["10", "2", "3"])
    assert (first["correct"], first["count"], first["acc1"]) == (1, 2, 50) and third["acc1"] is None
    assert second["low"] < 100 * 2 / 3 < second["high"]
    ordered, names = in_order(matrix, ["10", "2", "3"])
    assert names == ["2", "3", "10"] and ordered.tolist() == [[2, 0, 1], [0, 0, 0], [0, 1, 1]]
    assert in_order(matrix, ["b", "2", "a"])[1] == ["b", "2", "a"]
    assert confusion_csv(ordered, names).splitlines()[1] == "2,2,0,1"


def test_conventions_differ_where_a_later_layer_reads_real_values():
    first = LayerCount("a", "conv", "network", inputs=10, nonzero=2, binary=False, connections=1000, reached=900)
    spikes = LayerCount("b", "conv", "network", inputs=10, nonzero=1, connections=2000, from_nonzero=150)
    branch = LayerCount(
        "c", "conv", "SMA branches", inputs=10, nonzero=10, binary=False, connections=5000, reached=4000
    )
    gating = LayerCount("s projections", "projections", "SMA gating", macs=30)
    neuron = LayerCount("n", "neuron", "network", inputs=10, nonzero=1, per_step=[1])
    by_input, exact, papers = conventions([first, spikes, neuron, branch, gating], 2, 4.6, 0.9)
    assert (by_input["mac"], by_input["ac"]) == (6030 / 2, 200 / 2)
    assert (exact["mac"], exact["ac"]) == (4930 / 2, 150 / 2)
    assert (papers["mac"], papers["ac"]) == (1030 / 2, (200 + 5000) / 2)
    assert papers["energy_uj"] == pytest.approx((515 * 4.6 + 2600 * 0.9) * 1e-6)
    *_, other = conventions([first], 2, 4.6, 0.9, by_spikingjelly=(40.0, 8.0, 4))
    assert (other["mac"], other["ac"], other["samples"]) == (10, 2, 4)
    assert all(row["formula"] and row["source"] for row in (by_input, exact, papers, other))


def test_spikingjelly_2_counts_the_convolutions_as_the_layers_do():
    pytest.importorskip("spikingjelly.activation_based.op_counter", reason="SpikingJelly 0.0.0.0.14 has no counters")
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), lif(), nn.Flatten(2)).eval()
    batches = [(torch.rand(4, 2, 6, 6), torch.zeros(4))] * 3

    def prepare(samples, labels):
        return samples, labels

    mac, _, count = count_by_spikingjelly(net[:1], batches, prepare, torch.device("cpu"), most=8)
    with torch.no_grad(), OperationCounter(net) as counter:
        net[0](batches[0][0])
    assert count == 8 and mac == 2 * counter.result()[0].mac


def test_layers_have_names_that_a_reader_knows():
    labels = layer_labels(VGG8(T=4, num_classes=3, width=0.0625))
    assert labels["block1.0.0"] == "block 1 conv" and labels["block2.3"] == "block 2 LIF"
    assert labels["block3.1.S_Convs.2.lif"] == "block 3, SMA 5 x 5 LIF"
    assert labels["block3.1 squeeze"] == "block 3, SMA squeeze" and labels["others.8"] == "head linear 3"
    labels = layer_labels(sma_ms_resnet18(T=2, num_classes=3, width=0.0625))
    assert labels["conv1.0"] == "stem conv" and labels["conv3_x.1.residual_function.1"] == "stage 2 block 2 conv 1"
    assert labels["conv3_x.0.shortcut.0"] == "stage 2 block 1 shortcut conv" and labels["fc"] == "head linear"
    assert len(set(labels.values())) == len(labels)


def test_a_report_has_every_sample_and_its_files_agree(reported):
    run, _ = reported
    found = json.loads((run / "report.json").read_text())
    head, *samples = table(run / "predictions.csv")
    assert head == ["sample", "true", "predicted", "correct", "score"] and len(samples) == 11
    assert samples[2][:2] == ["10/user24_0", "10"]  # in the order of the test set
    correct = sum(row[1] == row[2] for row in samples)
    assert correct == found["evaluation"]["correct"] == sum(int(row[3]) for row in samples)
    (_, *names), *rows = table(run / "confusion.csv")
    assert names == [str(number) for number in range(11)] == [row[0] for row in rows]
    assert all(sum(map(int, row[1:])) == 1 for row in rows)
    assert sum(int(row[1 + i]) for i, row in enumerate(rows)) == correct
    assert sum(row["correct"] for row in found["classes"]) == correct and len(table(run / "classes.csv")) == 12
    assert found["evaluation"]["acc1_low"] <= found["evaluation"]["acc1"] <= found["evaluation"]["acc1_high"]
    for name in ("confusion", "firing_rates", "time"):
        for suffix, begin in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")):
            assert (run / f"{name}{suffix}").read_bytes().startswith(begin)
    assert "arXiv 2209.13929" in (run / "report.md").read_text()


def test_the_table_is_paired_with_the_accuracy_of_the_report(reported):
    run, _ = reported
    head, first, *others = table(run / "time.csv")
    assert head[:2] == ["name", "acc1"] and first[0] == "as recorded" and [row[0] for row in others] == list(CHANGES)
    correct = sum(int(row[3]) for row in table(run / "predictions.csv")[1:])
    assert int(first[head.index("correct")]) == correct
    for row in others:
        cell = dict(zip(head, row, strict=True))
        assert float(cell["change"]) == pytest.approx(100 * (int(cell["correct"]) - correct) / 11)
        assert float(cell["change_low"]) <= float(cell["change"]) <= float(cell["change_high"])
        assert 0 < float(cell["p"]) <= 1


def test_the_page_needs_no_network_and_shows_everything(reported):
    run, _ = reported
    text = (run / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)|url\(|@import', text)
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "Training", "Classes", "Does the network use time?", "Energy", "Firing rates", "Samples", "About",
    ]  # fmt: skip
    assert "predicted:" in text and 'name="viewport"' in text and "prefers-color-scheme: dark" in text


def test_a_name_with_markup_stays_text_on_the_page():
    text = page("<b>", "a & b", [section("<i>", table_html([["<u>"], ["</td>"]]))])
    assert "<b>" not in text and "<i>" not in text and "<u>" not in text and "a &amp; b" in text
    assert text.count("</td>") == 1


def test_spike_maps_say_true_and_predicted_class(reported, monkeypatch):
    run, common = reported
    titles, labels = [], []
    draw = visualize.draw_spikes

    def seen(frames, maps, title, *more):
        titles.append(title)
        labels.extend(maps)
        return draw(frames, maps, title, *more)

    monkeypatch.setattr(visualize, "draw_spikes", seen)
    code, _, err = run_as_user(visualize.main, "spikes", *common, "--sample", 2)
    assert code == 0, err
    row = table(run / "predictions.csv")[3]
    assert titles == [f"{row[0]}; true: {row[1]}, predicted: {row[2]}"] and labels[0] == "block 1 LIF"
    assert (run / "figures/spikes_2.pdf").exists() and (run / "figures/spikes_2.svg").exists()


def test_frames_of_a_split_that_the_user_names(folder_data, tmp_path):
    split = tmp_path / "split.csv"
    split.write_text("test,crab/image_0007\ntrain,*\n")
    common = ["frames", "--data-set", "ncaltech101", "--data-dir", folder_data, "--sensor-size", "180x240", "-T", 2]
    code, _, err = run_as_user(visualize.main, *common, "--split", split, "--output-dir", tmp_path / "out")
    assert code == 0, err
    assert (tmp_path / "out/crab/image_0007/strip.svg").exists()


def test_the_commands_of_the_page_about_analysis_parse():
    page_text = (ROOT / "docs/analysis.md").read_text(encoding="utf-8")
    parsers = {"report": report.make_parser(), "visualize": visualize.make_parser(), "export": export.make_parser()}
    commands = re.findall(r"^python tools/(\w+)\.py (.*)$", page_text, flags=re.MULTILINE)
    assert {name for name, _ in commands} == set(parsers) and len(commands) >= 9
    for name, arguments in commands:
        parsers[name].parse_args(arguments.split())

"""Firing rates and operations: closed forms on small networks, and SpikingJelly 2.x's own counter."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from torch import nn

from models import SMA, VGG8, sma_ms_resnet18
from models.neurons import lif, reset_net
from tests.conftest import ROOT, SMALL
from tools import report
from utils.analysis.operations import LayerCount, OperationCounter, fan_out
from utils.errors import exit_with_sentence
from utils.facts import split_in_words, training_facts, training_in_words
from utils.prepare.datasets import DATA_SETS


class Emit(nn.Module):
    """A neuron that spikes where it is told to."""

    v_threshold = 1.0

    def forward(self, x):
        return x


def count(net, *inputs):
    net.eval()
    with torch.inference_mode(), OperationCounter(net) as counter:
        for x in inputs:
            net(x)
            reset_net(net)
    return {layer.name: layer for layer in counter.result()}


def lively(net):
    """Raise the scale of every BatchNorm, so that all layers of an untrained network spike."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 20.0)


@pytest.mark.parametrize(
    "conv, size",
    [
        (nn.Conv2d(2, 3, 3, padding=1), (5, 4)),
        (nn.Conv2d(4, 6, 7, padding=3, groups=2), (2, 2)),
        (nn.Conv2d(1, 2, 3, stride=2, padding=1, dilation=2), (9, 8)),
        (nn.Conv2d(2, 2, (1, 5), stride=(2, 1), padding=(0, 2)), (6, 6)),
    ],
)
def test_fan_out_is_how_often_an_input_is_used(conv, size):
    # The gradient of the sum of all outputs for weights of 1: one for each output that reads the pixel.
    x = torch.zeros(1, conv.in_channels, *size, requires_grad=True)
    nn.init.ones_(conv.weight)
    conv(x).sum().backward()
    assert torch.equal(fan_out(conv, size).float(), x.grad[0, 0])


def test_one_spike_costs_its_rate_times_the_connections_and_exactly_the_outputs_that_it_reaches():
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, 0] = 1  # in the corner: 4 of the 9 taps exist
    (layer,) = count(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1)), x).values()
    assert (layer.binary, layer.connections, layer.mac, layer.ac) == (True, 2 * 16 * 9, 0, 288 / 16)
    assert (layer.mac_exact, layer.ac_exact) == (0, 4 * 2)


def test_a_value_other_than_0_and_1_anywhere_makes_all_of_a_layer_multiply_accumulates():
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1))
    ones, other = torch.ones(3, 1, 4, 4), torch.ones(1, 1, 4, 4)
    assert count(net, ones)["0"].ac == 3 * 288
    other[0, 0, 2, 2] = 0.5
    layer = count(net, ones, other, ones)["0"]
    assert (layer.mac, layer.ac) == (7 * 288, 0)
    assert layer.mac_exact == 7 * 2 * (2 + 3 + 3 + 2) ** 2


def test_a_linear_layer_on_spikes_costs_one_addition_for_every_spike_and_output():
    x = torch.tensor([[[1.0, 0, 1, 1, 0]], [[0, 0, 1, 0, 0]]])  # [T, B, 5]
    layer = count(nn.Sequential(nn.Linear(5, 7)), x)["0"]
    assert (layer.ac_exact, layer.mac_exact) == (4 * 7, 0) and layer.ac == pytest.approx(4 * 7)


def test_firing_rates_are_spikes_over_all_elements_and_not_a_mean_of_batches():
    big, small = torch.zeros(2, 3, 4), torch.ones(2, 1, 4)  # [T, B, N]: 0 of 24 and 8 of 8
    big[1, 0, 0] = 1
    layer = count(nn.Sequential(Emit()), big, small)["0"]
    assert layer.rate == 9 / 32
    assert layer.rates == [4 / 16, 5 / 16]


def test_sma_is_counted_in_closed_form():
    S, T, B, C, H, W, hidden = 2, 4, 3, 8, 6, 5, 2
    net = nn.Sequential(SMA(C, T, [1, 3], C_reduction=4, T_reduction=2))
    torch.manual_seed(1)
    found = count(net, 4 * torch.randn(T, B, C, H, W))
    assert list(found) == [
        "0.S_Convs.0.conv", "0.S_Convs.0.lif", "0.S_Convs.1.conv", "0.S_Convs.1.lif",
        "0 squeeze", "0 projections", "0 weighting",
    ]  # fmt: skip
    positions = T * B * C * H * W
    assert (found["0.S_Convs.0.conv"].mac, found["0.S_Convs.1.conv"].mac) == (positions * C, positions * C * 9)
    assert found["0 projections"].mac == B * (1 + S) * (T * C * hidden + T * (T // 2))
    spikes = found["0.S_Convs.0.lif"].nonzero + found["0.S_Convs.1.lif"].nonzero
    assert 0 < spikes < S * positions
    assert (found["0 squeeze"].mac, found["0 squeeze"].ac) == (0, pytest.approx(spikes))
    # The products of the two weights, and one addition for each spike.
    assert (found["0 weighting"].mac, found["0 weighting"].ac) == (S * T * B * C, pytest.approx(spikes))
    assert {layer.part for layer in found.values()} == {"SMA branches", "SMA gating"}


def test_relu_branches_are_real_valued_and_what_is_computed_once_counts_once():
    torch.manual_seed(1)
    net = sma_ms_resnet18(T=2, num_classes=3, width=0.125)
    lively(net)
    found = count(net, torch.rand(2, 3, 32, 32))
    assert found["conv1.0"].mac == 2 * 8 * 16 * 16 * 3 * 49  # not twice
    gating = found["conv2_x.0.residual_function.2 weighting"]
    features = 4 * 2 * 2 * 8 * 8 * 8  # S, T, B, C, H, W
    assert (gating.mac, gating.ac) == (features + 4 * 2 * 2 * 8, 0)
    squeeze = found["conv2_x.0.residual_function.2 squeeze"]
    assert squeeze.mac == 0 and squeeze.ac == pytest.approx(squeeze.nonzero) and squeeze.inputs == features
    assert found["conv2_x.0.residual_function.1"].binary and not found["fc"].binary


def test_hooks_are_gone_afterwards():
    net = VGG8(T=4, num_classes=3, width=0.0625)
    count(net, torch.rand(4, 1, 2, 32, 32))
    assert not any(module._forward_hooks for module in net.modules())


def test_summary_and_energy_in_numbers():
    real = LayerCount("a", "conv", "network", inputs=10, nonzero=10, binary=False, connections=3_000_000, reached=9)
    spikes = LayerCount("b", "linear", "SMA branches", inputs=10, nonzero=5, connections=8_000_000, from_nonzero=6)
    neurons = LayerCount("c", "neuron", "network", inputs=2 * 2 * 5, nonzero=4, per_step=[1, 3])
    found = report.summary([real, spikes, neurons], 2, "usual", 4.6, 0.9)
    assert (found["total"]["mac"], found["total"]["ac"]) == (1_500_000, 2_000_000)
    assert found["total"]["energy_uj"] == pytest.approx(1.5 * 4.6 + 2 * 0.9)
    assert found["parts"]["SMA branches"]["share"] == pytest.approx(1.8 / 8.7)
    assert found["layers"][2] == {
        "layer": "c", "kind": "neuron", "part": "network", "neurons": 5, "firing_rate": 0.2,
        "firing_rate_of_step": [0.1, 0.3],
    }  # fmt: skip
    assert (found["firing_rate"], found["spikes"]) == (0.2, 2)
    exact = report.summary([real, spikes, neurons], 2, "exact", 1.0, 1.0)
    assert (exact["total"]["mac"], exact["total"]["ac"]) == (4.5, 3)


def test_agreement_with_the_counters_of_spikingjelly_2():
    counters = pytest.importorskip(
        "spikingjelly.activation_based.op_counter", reason="SpikingJelly 0.0.0.0.14 has no counter of operations"
    )
    torch.manual_seed(0)
    # Without SMA: its gating runs as matrix products on few values, which the other counter cannot tell apart.
    net = VGG8(T=2, num_classes=3, width=0.0625, sma_blocks=[]).eval()
    lively(net)
    x = torch.rand(2, 2, 2, 64, 64)
    ours = count(net, x)
    synops, macs = counters.SynOpCounter(), counters.MACCounter()
    with torch.no_grad(), counters.DispatchCounterMode([synops, macs]):
        net(x)
    reset_net(net)
    layers = [layer for layer in ours.values() if layer.kind != "neuron"]
    assert sum(layer.ac_exact for layer in layers) == synops.get_total() > 0
    theirs = sum(number for operation, number in macs.records["Global"].items() if "batch_norm" not in str(operation))
    assert sum(layer.mac for layer in layers) == theirs > ours["block1.0.0"].mac  # the pooled input of others.2, too


@pytest.fixture
def weights(gesture_data, tmp_path):
    """A small network with SMA whose neurons spike, as a bare state dict."""
    torch.manual_seed(0)
    net = VGG8(T=4, num_classes=11, width=0.125, sma_blocks=[2])
    path = tmp_path / "run" / "weights.pt"
    path.parent.mkdir()
    torch.save(net.state_dict(), path)
    return path


def run_tool(monkeypatch, capsys, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
    try:
        exit_with_sentence(main)
        code = 0
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_report_of_two_processes_is_that_of_one(monkeypatch, capsys, launch, gesture_data, weights, tmp_path):
    common = ["--weights", weights, "--data-dir", gesture_data, "--frame-size", 32, "--device", "cpu"]
    one = ["-b", 4, "--latency-runs", 1]
    code, out, err = run_tool(monkeypatch, capsys, report.main, *common, *one)
    assert code == 0, err
    alone = json.loads((weights.parent / "report.json").read_text())
    assert alone["evaluation"]["count"] == 11 and alone["parameters"] == sum(
        value.numel() for name, value in torch.load(weights).items() if "running" not in name and "num_b" not in name
    )
    assert alone["parts"]["SMA branches"]["energy_uj"] > 0 and "real-valued map" in out
    rows = (weights.parent / "report.csv").read_text().splitlines()
    assert len(rows) == 1 + len(alone["layers"]) and "block2.1 squeeze" in (weights.parent / "report.md").read_text()

    both = tmp_path / "both"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    arguments = [*common, "-b", 3, "--latency-runs", 1, "--output-dir", both]
    result = launch([*torchrun, ROOT / "tools" / "report.py", *arguments])
    assert result.returncode == 0, result.stderr
    together = json.loads((both / "report.json").read_text())
    for name in ("layers", "total", "parts", "firing_rate", "evaluation"):
        assert together[name] == alone[name]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--weights", "none.pt"], "none.pt does not exist"),
        (["--weights", "WEIGHTS"], "the data of weights file"),
        (["--weights", "WEIGHTS", "--data-dir", "."], "is not in --data-dir"),
        (["--weights", "WEIGHTS", "--data-dir", ".", "--demo"], "leave out either"),
        (["--weights", "WEIGHTS", "--mac-pj", "-1"], "must be a number from 0 to 1e+06"),
    ],
)
def test_mistakes_end_in_a_sentence(arguments, words, monkeypatch, capsys, weights, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = [weights if word == "WEIGHTS" else word for word in arguments]
    code, _, err = run_tool(monkeypatch, capsys, report.main, *arguments)
    assert code == 2 and words in err and "Traceback" not in err
    assert not (weights.parent / "report.json").exists()


def report_of(weights, monkeypatch, capsys, *arguments):
    common = ["--weights", weights, "--device", "cpu", "--latency-runs", 1]
    code, out, err = run_tool(monkeypatch, capsys, report.main, *common, *arguments)
    assert code == 0, err
    return json.loads((weights.parent / "report.json").read_text()), out


@pytest.mark.parametrize("data_set", ["cifar10dvs", "ncaltech101"])
def test_released_weights_are_reported_on_the_split_of_the_script(data_set, tmp_path, script, monkeypatch, capsys):
    sensor, frames = DATA_SETS[data_set].sensor, tmp_path / "data/frames_number_4_split_by_number"
    for label in ("ant", "bee"):
        (frames / label).mkdir(parents=True)
        for number in range(10):
            counts = np.full((4, 2, *sensor), 1 + number + 10 * (label == "bee"), np.float32)
            np.savez(frames / label / f"image_{number}.npz", frames=counts)
    torch.manual_seed(0)
    (tmp_path / "run").mkdir()
    torch.save(VGG8(T=4, num_classes=2, width=0.125, sma_blocks=[2]).state_dict(), tmp_path / "run/weights.pt")
    common = ["--data-dir", tmp_path / "data", "--frame-size", 32]
    arguments = ["--evaluate", "--weights", tmp_path / "run/weights.pt", "--output-dir", tmp_path / "evaluated"]
    code, _, err = script(data_set, *arguments, *common, "--device", "cpu", "--num-workers", 0, "-b", 4)
    assert code == 0, err
    evaluated = json.loads((tmp_path / "evaluated/evaluation.json").read_text())
    weights = tmp_path / "run/weights.pt"
    found, out = report_of(weights, monkeypatch, capsys, "--data-set", data_set, *common)
    assert found["facts"]["split"] == split_in_words(evaluated["split"])
    assert f"seed {DATA_SETS[data_set].split_seed}, fingerprint" in found["facts"]["split"]
    assert "; epoch unknown, perhaps selected on the test set; seed unknown" in out


def test_a_run_without_bad_samples_is_reported_without_them(tmp_path, gesture_data, script, monkeypatch, capsys):
    shutil.copytree(gesture_data / "events_np", tmp_path / "data/events_np")
    common = [*SMALL, "--data-dir", tmp_path / "data", "--output-dir", tmp_path / "run", "--epochs", 1]
    assert script("dvs128", *common[:-1], 1, "--output-dir", tmp_path / "first")[0] == 0
    (tmp_path / "data/frames_number_4_split_by_number/test/3/user24_0.npz").write_bytes(b"cut off")
    code, _, err = script("dvs128", *common, "--on-bad-sample", "skip")
    assert code == 0, err
    found, _ = report_of(tmp_path / "run/last.pt", monkeypatch, capsys)
    trained = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert (found["evaluation"]["correct"], found["evaluation"]["count"]) == (trained["correct"], 10)
    assert found["facts"]["split"] == split_in_words(trained["split"]) and found["facts"]["left out"] == "1 bad files"
    arguments = ["--weights", tmp_path / "run/last.pt", "--device", "cpu", "--on-bad-sample", "stop"]
    code, _, err = run_tool(monkeypatch, capsys, report.main, *arguments)
    assert code == 2 and "1 bad files" in err


@pytest.mark.parametrize(
    ("known", "selection", "epoch"),
    [
        ({"epoch": 5, "best": {"epoch": 3}}, "final", "5 of 5, the final one"),
        ({"epoch": 5, "best": {"epoch": 5}}, "final and best", "5 of 5, the final one, also the best on the test set"),
        ({"epoch": 3, "best": {"epoch": 3}}, "best", "3 of 5, the best so far (selected on the test set)"),
        ({"epoch": 3, "best": {"epoch": 2}}, "none", "3 of 5, neither the final nor the best one"),
        ({"epoch": 3, "selection": "best"}, "best", "3 of 5, the best so far (selected on the test set)"),  # exported
        ({"epoch": 3, "selection": "unknown"}, "unknown", "3 of 5, perhaps selected on the test set"),
        ({"epoch": 3, "best": {"epoch": 3}, "processes": [{"progress": {"step": 4}}]}, "none",
         "3 of 5 and 4 step(s) of the next, neither the final nor the best one"),
    ],
)  # fmt: skip
def test_the_epoch_and_seed_of_an_accuracy_are_known(known, selection, epoch):
    found = training_facts({"recipe": {"epochs": 5, "seed": 17}, **known})
    assert (found["epoch"], found["epochs"], found["seed"]) == (known["epoch"], 5, 17)
    assert found["selection"] == selection
    assert training_in_words(found) == {"epoch": epoch, "seed": "17"}


def test_an_accuracy_of_best_pt_says_that_the_test_set_selected_it(
    gesture_data, weights, tmp_path, monkeypatch, capsys
):
    recipe = {"timesteps": 4, "frame_size": [32, 32], "epochs": 9, "seed": 17, "AZO": True}
    best = {"epoch": 4, "best": {"epoch": 4, "acc1": 50.0}, "recipe": recipe}
    torch.save({"model": torch.load(weights), **best}, weights.with_name("best.pt"))
    found, out = report_of(weights.with_name("best.pt"), monkeypatch, capsys, "--data-dir", gesture_data)
    (line,) = (line for line in out.splitlines() if line.startswith("- accuracy"))
    assert line.endswith("/11); epoch 4 of 9, the best so far (selected on the test set); seed 17")
    assert (found["facts"]["epoch"], found["facts"]["seed"]) == (
        "4 of 9, the best so far (selected on the test set)",
        "17",
    )
    assert "- AZO: training only" in out.splitlines()


def test_a_report_that_cannot_be_written_is_a_sentence(gesture_data, weights, tmp_path, monkeypatch, capsys):
    (tmp_path / "out/report.md").mkdir(parents=True)
    arguments = ["--weights", weights, "--data-dir", gesture_data, "--frame-size", 32, "--device", "cpu"]
    more = ["--latency-runs", 1, "--output-dir", tmp_path / "out"]
    code, _, err = run_tool(monkeypatch, capsys, report.main, *arguments, *more)
    assert code == 2 and f"--output-dir {tmp_path}/out cannot be written: Is a directory; make room or choose" in err


def test_lif_neurons_are_found_by_their_threshold():
    assert set(count(nn.Sequential(lif()), torch.rand(2, 1, 3))) == {"0"}

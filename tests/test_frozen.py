"""SMA with constant weights: its sum by hand, the means over a data set, and the programs made of it."""

import argparse
import json

import numpy as np
import pytest
import torch

import models
from models import SMA, SMA_L
from models.frozen import FrozenSMA, freeze
from models.neurons import reset_net
from tests.conftest import SMALL
from tests.test_operations import run_tool
from tests.test_train_amp import SMALL as SMALL_IMAGES
from tests.test_train_amp import write_images
from tools import export
from utils.analysis.attention import mean_weights
from utils.analysis.inspection import load_inspected
from utils.checkpoint import load_weights
from utils.distributed import Process

CPU = torch.device("cpu")


def test_a_frozen_sma_is_a_sum_of_its_branches_with_constant_weights():
    torch.manual_seed(0)
    sma = SMA(channel=6, time=3, kernels=[1, 3], C_reduction=2, T_reduction=1).eval()
    weights, x = torch.rand(2, 3, 6), torch.randn(3, 2, 6, 5, 5)
    frozen = FrozenSMA(sma, weights)
    with torch.no_grad():
        found = frozen(x)
        reset_net(sma)
        features = torch.stack([branch(x) for branch in sma.S_Convs])
    assert torch.allclose(found, torch.einsum("stc,stbchw->tbchw", weights, features), atol=1e-6)
    assert next(iter(frozen.state_dict())) == "weights" and not any("attention" in name for name in frozen.state_dict())


@pytest.mark.parametrize("kind", [SMA, SMA_L])
def test_the_means_are_those_of_the_products_over_all_samples(kind):
    torch.manual_seed(0)
    net = torch.nn.Sequential(kind(channel=4, time=3, kernels=[1, 3], C_reduction=2, T_reduction=1).eval())
    samples = torch.randn(5, 3, 4, 6, 6)
    expected = []
    for sample in samples:
        with torch.no_grad():
            features = torch.stack([branch(sample[:, None]) for branch in net[0].S_Convs])
            reset_net(net)
            w_time, w_channel = net[0].attention_weights(features)  # [S, T, 1], [S, T, 1, C] or [S, 1, C]
            w_channel = w_channel if w_channel.ndim == 4 else w_channel[:, None]
            expected.append((w_time[..., None] * w_channel)[:, :, 0])
    batches = [(samples[:2], torch.zeros(2)), (samples[2:], torch.zeros(3))]  # of two sizes
    found = mean_weights(net, batches, lambda x, y: (x.transpose(0, 1), y), CPU)
    assert list(found) == ["0"] and torch.allclose(found["0"], torch.stack(expected).mean(0), atol=1e-6)
    with torch.no_grad():  # where the weights are the same for every input, freezing changes nothing
        for parameter in [p for name, p in net.named_parameters() if "attention" in name]:
            parameter.zero_()
        before = net(samples.transpose(0, 1))
        reset_net(net)
        freeze(net, mean_weights(net, batches, lambda x, y: (x.transpose(0, 1), y), CPU))
        assert isinstance(net[0], FrozenSMA) and torch.allclose(net(samples.transpose(0, 1)), before, atol=1e-6)


@pytest.fixture
def run_dir(script, gesture_data, tmp_path):
    """A run of one epoch."""
    command = ["dvs128", *SMALL, "--data-dir", gesture_data, "--epochs", 1, "--lr", 0.01, "--val", 0.5]
    assert script(*command, "--output-dir", tmp_path / "run")[0] == 0
    return tmp_path / "run"


def frozen_by_hand(weights, samples):
    """The network of a run with SMA frozen, and whether each test sample is correct before and after."""
    net = models.sma_vgg8_dvs128(T=4, width=0.125).eval()
    load_weights(net, weights)
    options = argparse.Namespace(weights=weights, batch_size=16, num_workers=0, backend="auto", device="cpu")
    inspected = load_inspected(options, Process(0, 0, 1, CPU), training=True)
    test = torch.stack([frames for frames, _ in inspected.test]).transpose(0, 1)
    labels = np.array([label for _, label in inspected.test])
    train = [inspected.train[index][0] for index in range(0, len(inspected.train), samples)]
    correct = []
    with torch.no_grad():
        for step in range(2):
            if step:
                batch = torch.stack(train).float(), torch.zeros(len(train))
                freeze(net, mean_weights(net, [batch], lambda x, y: (x.transpose(0, 1), y), CPU))
            correct.append(net(test).mean(0).argmax(1).numpy() == labels)
            reset_net(net)
    return net, correct


@pytest.mark.slow
def test_a_frozen_program_says_what_it_costs(run_dir, tmp_path, monkeypatch, capsys):
    path = tmp_path / "frozen.pt2"
    command = ["program", run_dir / "last.pt", "--freeze", "--samples", 6, "--device", "cpu", "--output", path]
    code, out, err = run_tool(monkeypatch, capsys, export.main, *command)
    assert code == 0, err
    net, (before, after) = frozen_by_hand(run_dir / "last.pt", 2)
    assert "frozen: means over 6 of 11 training samples; on the test set " in out  # --val holds half of the 22 out
    assert f"{before.sum()} of 11 correct before and {after.sum()} after" in out
    extra = {"sma.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    known = json.loads(extra["sma.json"])["frozen"]
    counts = [known[name] for name in ("samples", "correct_before", "correct", "count", "lost", "won")]
    assert counts == [6, before.sum(), after.sum(), 11, (before & ~after).sum(), (~before & after).sum()]
    x = torch.rand(4, 3, 2, 32, 32)
    with torch.no_grad():
        assert torch.allclose(program(x), net(x), atol=1e-5)


def test_images_are_frozen_too_and_a_network_without_sma_is_a_sentence(script, tmp_path, monkeypatch, capsys):
    root = write_images(tmp_path / "images", 2, 1)
    for blocks in ("first-two", "none"):
        run = tmp_path / blocks
        command = ["imagenet", *SMALL_IMAGES, "--data-dir", root, "--epochs", 1, "--sma-blocks", blocks]
        assert script(*command, "--output-dir", run)[0] == 0
    inspected = load_inspected(
        argparse.Namespace(weights=tmp_path / "first-two/last.pt", batch_size=2, num_workers=0, backend="auto"),
        Process(0, 0, 1, CPU), training=True,
    )  # fmt: skip
    assert len(inspected.train) == 6 and torch.equal(inspected.train[0][0], inspected.train[0][0])  # not augmented
    command = ["program", tmp_path / "none/last.pt", "--freeze", "--output", tmp_path / "f.pt2"]
    code, _, err = run_tool(monkeypatch, capsys, export.main, *command)
    assert code == 2 and "has no SMA; leave --freeze out" in err


def test_packages_of_onnx_that_are_missing_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(export.sys.modules, "onnxscript", None)
    monkeypatch.setitem(export.sys.modules, "onnxruntime", None)
    code, _, err = run_tool(monkeypatch, capsys, export.main, "program", "w.pt", "--output", tmp_path / "a.onnx")
    assert code == 2 and f"--output {tmp_path}/a.onnx needs " in err and "onnxscript, onnxruntime: pip install" in err


@pytest.mark.slow
def test_onnxruntime_has_the_logits_of_the_frozen_network(run_dir, tmp_path, monkeypatch, capsys):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnx
    import onnxruntime

    path = tmp_path / "frozen.onnx"
    command = ["program", run_dir / "last.pt", "--freeze", "--device", "cpu", "--output", path]
    code, out, err = run_tool(monkeypatch, capsys, export.main, *command)
    assert code == 0 and "largest difference of its logits from the network's: " in out, err
    net, _ = frozen_by_hand(run_dir / "last.pt", 1)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        x = torch.rand(4, batch, 2, 32, 32)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            assert np.allclose(found, net(x).numpy(), atol=1e-4)
        reset_net(net)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    kinds = {node.op_type for node in model.graph.node}
    assert "Conv" in kinds and not kinds & {"Softmax", "Sigmoid", "Loop", "If"}  # no attention is left
    assert json.loads({entry.key: entry.value for entry in model.metadata_props}["sma"])["frozen"]["count"] == 11

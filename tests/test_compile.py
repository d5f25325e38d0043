"""--compile: the same training by torch.compile, with a graph for each shape of a batch and no more."""

import copy
import shutil

import pytest
import torch
from spikingjelly.activation_based import layer
from torch._dynamo.utils import counters

from models import VGG8
from tests.conftest import SMALL, rows, same_weights
from utils.engine import evaluate, train_one_epoch
from utils.errors import exit_with_sentence
from utils.losses import mse_of_mean

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler on a CPU"
)


def trained(net, compiled, data, epochs=2):
    """The results of epochs, and the graphs that there were after each."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    results, graphs = [], []
    for _ in range(epochs):
        results.append(train_one_epoch(compiled, data, mse_of_mean, optimizer, scaler, CPU))
        graphs.append(counters["stats"]["unique_graphs"])
        evaluate(net, data, mse_of_mean, CPU)
    return results, graphs


@pytest.mark.slow
@needs_compiler
def test_it_trains_as_without_and_compiles_once_for_each_shape():
    torch.manual_seed(0)
    plain = VGG8(T=4, num_classes=3, width=0.0625, sma_blocks=(2,), kernels=(1, 3), AZO=True, RCR=4, RTR=2)
    for module in plain.modules():
        if isinstance(module, layer.Dropout):
            module.p = 0.0  # the compiler draws other random numbers
    net = copy.deepcopy(plain)
    generator = torch.Generator().manual_seed(1)
    frames = torch.poisson(torch.full((10, 4, 2, 32, 32), 0.5), generator=generator)
    labels = torch.randint(0, 3, (10,), generator=generator)
    data = list(zip(frames.split(4), labels.split(4), strict=True))  # 4, 4 and 2 samples
    expected, _ = trained(plain, plain, data)
    torch._dynamo.reset()
    counters.clear()
    found, graphs = trained(net, torch.compile(net, dynamic=False), data)
    assert graphs == [2, 2] and not counters["graph_break"]
    for one, other in zip(expected, found, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.02) and other["count"] == 10
    assert set(net.state_dict()) == set(plain.state_dict())


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_continues_to_the_same_bits(script, gesture_data, tmp_path):
    common = ["dvs128", *SMALL, "--sma-blocks", "--data-dir", gesture_data, "--RTR", 2, "--compile"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    code, out, err = script(*common, "--output-dir", whole, "--epochs", 2, "--decay", 2)
    assert code == 0, err
    assert "compiled:" in out and len(rows(whole)) == 2
    weights = torch.load(whole / "last.pt", weights_only=True)["model"]
    assert all(name.startswith(("block", "others")) for name in weights)
    shutil.copytree(whole, stopped)
    shutil.copy(whole / "previous.pt", stopped / "last.pt")  # as after the first epoch
    code, _, err = script(*common, "--output-dir", stopped, "--epochs", 2, "--decay", 2)
    assert code == 0, err
    assert same_weights(whole / "last.pt", stopped / "last.pt") and rows(whole) == rows(stopped)


def test_a_compiler_that_fails_is_one_sentence(capsys):
    def fails(*_):
        raise RuntimeError("no working compiler\nand more")

    torch._dynamo.reset()
    net = torch.compile(torch.nn.Linear(1, 1), backend=fails)
    with pytest.raises(SystemExit) as stop:
        exit_with_sentence(lambda: net(torch.ones(1, 1)))
    assert stop.value.code == 2
    sentence = "error: --compile does not work here (no working compiler); leave it out\n"
    assert capsys.readouterr().err.endswith(sentence)

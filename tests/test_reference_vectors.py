"""The modules against the reference vectors: outputs and gradients in double precision, to 1e-9."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import layer

from models import (
    SMA,
    SMA_L,
    ms_resnet18,
    ms_resnet34,
    ms_resnet104,
    sma_ms_resnet18,
    sma_ms_resnet34,
    sma_ms_resnet104,
    sma_vgg8_cifar10dvs,
    sma_vgg8_dvs128,
    sma_vgg8_ncaltech101,
)
from models.neurons import reset_net
from tests.reference import fill

REFERENCE = Path(__file__).parent / "reference"
TOLERANCE = 1e-9


def load(name):
    description = json.loads((REFERENCE / f"{name}.json").read_text())
    return description, np.load(REFERENCE / f"{name}.npz")


def fill_network(net, expected_shapes):
    shapes = {name: list(value.shape) for name, value in net.state_dict().items()}
    assert shapes == expected_shapes  # names and shapes are a file format
    net.double()
    net.load_state_dict({k: torch.from_numpy(np.asarray(v)) for k, v in fill.fill(net.state_dict()).items()})


def difference(actual, expected):
    return np.abs(actual.detach().numpy() - expected).max()


@pytest.mark.parametrize("name", ["sma_spiking", "sma_spiking_azo", "sma_relu_azo", "sma_l_azo"])
@pytest.mark.parametrize("form", ["fast", "shared convolutions", "equations"])
def test_sma_matches_the_reference(name, form, monkeypatch):
    description, expected = load(name)
    monkeypatch.setenv("SMA_CONVOLUTIONS", "shared" if form == "shared convolutions" else "direct")
    cls = SMA_L if name.startswith("sma_l") else SMA
    net = cls(**description["kwargs"], **({"activation": "relu"} if "relu" in name else {}), fast=form != "equations")
    fill_network(net, description["state_dict"])
    x = torch.from_numpy(eval(description["input"], {"images": fill.images})).requires_grad_()

    net.eval()
    assert difference(net(x), expected["eval"]) <= TOLERANCE
    reset_net(net)

    net.train()
    output = net(x)
    assert difference(output, expected["train"]) <= TOLERANCE
    gradient = torch.from_numpy(eval(description["output_gradient"], {"images": fill.images, "output": output}))
    (output * gradient).sum().backward()
    assert difference(x.grad, expected["grad_input"]) <= TOLERANCE
    compared = [key for key in expected.files if key.startswith("grad/")]
    assert len(compared) > 20
    for key in compared:
        grad = net.get_parameter(key.removeprefix("grad/")).grad
        assert difference(grad, expected[key]) <= TOLERANCE, key


def test_vgg8_matches_the_reference():
    description, expected = load("vgg8_dvs128")
    net = sma_vgg8_dvs128()
    fill_network(net, description["state_dict"])
    x = torch.from_numpy(eval(description["input"], {"events": fill.events}))

    rates = {}
    modules = dict(net.named_modules())
    hooks = [
        modules[name].register_forward_hook(lambda _, __, spikes, name=name: rates.update({name: spikes.mean()}))
        for name in description["lif_names"]
    ]
    net.eval()
    with torch.no_grad():
        assert difference(net(x), expected["eval_logits"]) <= TOLERANCE
    reset_net(net)
    measured = torch.stack([rates[name] for name in description["lif_names"]])
    assert difference(measured, expected["firing_rate"]) <= TOLERANCE
    for hook in hooks:
        hook.remove()

    net.train()
    for module in net.modules():
        if isinstance(module, layer.Dropout):
            module.p = 0.0
    logits = net(x)
    assert difference(logits, expected["train_logits"]) <= TOLERANCE
    logits.mean(0).pow(2).mean().backward()
    compared = [key for key in expected.files if key.startswith("grad/")]
    assert len(compared) == 6
    for key in compared:
        grad = net.get_parameter(key.removeprefix("grad/")).grad
        assert difference(grad, expected[key]) <= TOLERANCE, key


def test_ms_resnet18_matches_the_reference():
    description, expected = load("resnet18")
    net = sma_ms_resnet18(AZO=description["azo"])
    fill_network(net, description["state_dict"])
    x = torch.from_numpy(eval(description["input"], {"images": fill.images}))

    net.eval()
    with torch.no_grad():
        assert difference(net(x), expected["eval_logits"]) <= TOLERANCE
    reset_net(net)

    net.train()
    logits = net(x)
    assert difference(logits, expected["train_logits"]) <= TOLERANCE
    logits.pow(2).mean().backward()
    compared = [key for key in expected.files if key.startswith("grad/")]
    assert len(compared) == 5
    for key in compared:
        grad = net.get_parameter(key.removeprefix("grad/")).grad
        if grad.numel() > 20_000:
            grad = grad.reshape(-1)[::37]
        # Relative to the largest entry: some of these gradients are of the order of 1e5.
        assert difference(grad, expected[key]) <= TOLERANCE * max(1.0, np.abs(expected[key]).max()), key


@pytest.mark.parametrize(
    ("factory", "plain", "millions"),
    [
        (sma_ms_resnet18, ms_resnet18, (11.694, 71.09, 71.09)),
        (sma_ms_resnet34, ms_resnet34, (21.802, 81.20, 129.07)),
        (sma_ms_resnet104, ms_resnet104, (77.351, 136.74, 447.37)),
    ],
)
def test_ms_resnet_parameter_counts_are_the_published_ones(factory, plain, millions):
    with torch.device("meta"):
        nets = plain(), factory(), factory(sma_blocks="all")
    counts = [sum(p.numel() for p in net.parameters()) / 1e6 for net in nets]
    # The last one is 447.363 M, and the publication's table says 447.37.
    assert counts == [pytest.approx(published, abs=0.007) for published in millions]


@pytest.mark.parametrize(
    ("factory", "count"),
    [(sma_vgg8_dvs128, 22_452_531), (sma_vgg8_cifar10dvs, 22_451_014), (sma_vgg8_ncaltech101, 22_544_543)],
)
def test_parameter_counts_are_the_published_ones(factory, count):
    assert sum(p.numel() for p in factory().parameters()) == count


def test_sma_in_blocks_2_to_5_has_the_size_of_the_appendix_table():
    count = sum(p.numel() for p in sma_vgg8_dvs128(sma_blocks=(2, 3, 4, 5)).parameters())
    assert round(count / 1e6, 1) == 67.2

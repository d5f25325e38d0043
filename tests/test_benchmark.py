"""tools/benchmark.py: its forms are the networks that they say, and it counts what they compute."""

import argparse

import pytest
import torch
from torch import nn

from models import SMA
from models.neurons import multi_dimensional_attention, temporal_wise_attention
from tools import benchmark_convolutions
from tools.benchmark_model import DIRECT_CONVOLUTIONS, FORMS, LAYERS_ALONE, Setting, alternate, make_form, steps_of
from tools.benchmark_parts import benchmark_parts

SMALL = Setting("cpu", 2, (32, 32), 1, "off", False)


def test_every_form_of_a_network_trains_and_evaluates():
    flops = {}
    for form in FORMS:
        steps, _, flops[form] = steps_of("dvs128", form, Setting(**{**vars(SMALL), "T": 4}))
        for step in steps.values():
            step()
    assert flops["SMA"] == flops[DIRECT_CONVOLUTIONS] == flops[LAYERS_ALONE] > 9 * flops["no attention"]
    assert flops["SMA, depthwise"] < 1.1 * flops["no attention"]


@pytest.mark.slow
def test_every_form_trains_and_evaluates_in_bfloat16():
    for form in FORMS:
        steps, _, _ = steps_of("dvs128", form, Setting(**{**vars(SMALL), "T": 4, "amp": "bf16"}))
        for step in steps.values():
            step()


def test_the_operations_of_a_block_are_those_of_its_branches():
    _, _, flops = steps_of("block", "SMA", Setting(**{**vars(SMALL), "T": 4}))
    assert flops == 2 * 84 * 128**2 * 32 * 32 * 4


def test_spikingjelly_s_attention_takes_the_places_of_sma():
    ours, theirs = make_form("dvs128", "SMA", 4), make_form("dvs128", "temporal-wise attention", 4)
    for block in ("block2", "block3"):
        assert isinstance(ours.get_submodule(block)[1], SMA) and len(theirs.get_submodule(block)) == 5
    assert sum(p.numel() for p in theirs.parameters()) > sum(
        p.numel() for p in make_form("dvs128", "no attention", 4).parameters()
    )
    assert make_form("block", "no attention", 4) is None and make_form("resnet18", "temporal-wise attention", 2) is None


def test_spikingjelly_s_attention_is_that_of_the_study():
    for form, made in (
        ("temporal-wise attention", temporal_wise_attention(4, 4)),
        ("multi-dimensional attention", multi_dimensional_attention(4, 128, 4)),
    ):
        attention = make_form("dvs128", form, 4).block2[1]
        assert type(attention).__name__ == type(made).__name__
        assert {k: v.shape for k, v in attention.state_dict().items()} == {
            k: v.shape for k, v in made.state_dict().items()
        }


def test_tasks_alternate_after_one_run_that_does_not_count():
    order = []
    values = alternate({name: lambda n=name: order.append(n) or float(len(order)) for name in "ab"}, 2)
    assert order == list("ababab") and values == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


@pytest.mark.parametrize("form", ["SMA", DIRECT_CONVOLUTIONS, "SMA, direct"])
def test_the_direct_form_has_the_same_weights(form):
    one, other = make_form("block", "SMA", 4), make_form("block", form, 4)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert any(isinstance(m, nn.Conv2d) for m in other.modules())


def test_the_convolutions_have_a_row_for_each_size_with_the_choice_that_sma_makes(monkeypatch):
    monkeypatch.setattr(benchmark_convolutions, "SIZES", ((2, 4, 12, 12), (16, 128, 64, 64)))
    monkeypatch.setattr(benchmark_convolutions, "seconds_of", lambda step, device: 0.5)
    args = argparse.Namespace(threads=None, runs=1)
    small, large = benchmark_convolutions.benchmark_convolutions(args)
    assert (small["T, C, H, W"], small["chosen"]) == ("2, 4, 12, 12", "direct")
    assert (large["chosen"], large["ratio"]) == ("shared", 1)
    assert large["estimate"] < 0.5 < small["estimate"]


def test_the_parts_of_a_step_are_all_of_it(monkeypatch):
    monkeypatch.setattr("models.fast.forward.applies", lambda *_, **__: True)
    threads = torch.get_num_threads()
    args = argparse.Namespace(
        net=["dvs128"], timesteps=4, image_size=32, batch_size=1, amp="off", channels_last=False, threads=None
    )
    training, evaluation = benchmark_parts(args)
    torch.set_num_threads(threads)
    for rows in (training, evaluation):
        shares = {row["part"]: row["share"] for row in rows}
        assert sum(shares.values()) == pytest.approx(1)
        assert {"convolutions of the branches: products", "convolutions of the branches: transforms"} <= shares.keys()
        assert {"BatchNorm and neurons", "weighted sum and AZO", "pooling", "other neurons"} <= shares.keys()

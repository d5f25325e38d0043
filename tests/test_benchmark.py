"""tools/benchmark.py model: its forms are the networks that they say, and count what they compute."""

import pytest
import torch
from torch import nn

from models import SMA
from models.neurons import multi_dimensional_attention, temporal_wise_attention
from tools.benchmark_model import DIRECT_CONVOLUTIONS, FORMS, LAYERS_ALONE, Setting, alternate, make_form, steps_of

SMALL = Setting("cpu", 2, (32, 32), 1, "off", False)


def test_every_form_of_a_network_trains_and_evaluates():
    flops = {}
    for form in FORMS:
        steps, _, flops[form] = steps_of("dvs128", form, Setting(**{**vars(SMALL), "T": 4}))
        for step in steps.values():
            step()
    assert flops["SMA"] == flops[DIRECT_CONVOLUTIONS] == flops[LAYERS_ALONE] > 9 * flops["no attention"]
    assert flops["SMA, depthwise"] < 1.1 * flops["no attention"]


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

"""SMA, SMA-L and AZO beyond the reference vectors: the definition, gradients, modes, arguments, reuse."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from torch.utils._python_dispatch import TorchDispatchMode

import models.sma
from models import SMA, SMA_L, attention_zoneout
from models.neurons import reset_net
from models.sma import _Conv2d


def zoneout_by_definition(z, w_time, w_channel, RTR, RCR):
    """Spec section 2, step by step, with loops."""
    S, T, _, C = z.shape[:4]
    out = z.clone()
    for s in range(S):
        steps = sorted(range(T), key=lambda t, s=s: w_time[s, t].sum().item())[: T // RTR]
        per_channel = w_channel[s].sum(0) if w_channel.ndim == 3 else w_channel[s, steps].sum((0, 1))
        channels = sorted(range(C), key=lambda c: per_channel[c].item())[: C // RCR]
        for t in steps:
            for c in channels:
                if t > 0:
                    out[s, t, :, c] = z[s, t - 1, :, c]
    return out


@pytest.mark.parametrize("over_time", [True, False], ids=["SMA", "SMA-L"])
@pytest.mark.parametrize(("RTR", "RCR"), [(1, 1), (2, 3), (4, 4), (8, 12)])
def test_zoneout_is_its_definition(over_time, RTR, RCR):
    generator = torch.Generator().manual_seed(RTR * 100 + RCR)
    S, T, B, C = 4, 8, 3, 12
    z = torch.randn(S, T, B, C, 2, 3, generator=generator)
    w_time = torch.rand(S, T, B, generator=generator).softmax(0)
    w_channel = torch.rand(S, *((T, B, C) if over_time else (B, C)), generator=generator).softmax(0)
    expected = zoneout_by_definition(z, w_time, w_channel, RTR, RCR)
    assert not torch.equal(expected, z) or RTR == 8
    assert torch.equal(attention_zoneout(z, w_time, w_channel, RTR, RCR), expected)


def test_a_chain_of_chosen_steps_reads_the_values_before_any_replacement():
    z = torch.arange(4.0).reshape(1, 4, 1, 1, 1, 1)
    w_time = torch.tensor([0.9, 0.1, 0.2, 0.3]).reshape(1, 4, 1)
    w_channel = torch.ones(1, 4, 1, 1)
    assert attention_zoneout(z, w_time, w_channel, RTR=1, RCR=1).flatten().tolist() == [0.0, 0.0, 1.0, 2.0]


def test_zoneout_changes_nothing_when_only_step_0_is_chosen():
    z = torch.randn(2, 4, 3, 5, 2, 2)
    w_time = torch.tensor([0.0, 1.0, 1.0, 1.0]).reshape(1, 4, 1).expand(2, 4, 3)
    assert torch.equal(attention_zoneout(z, w_time, torch.rand(2, 4, 3, 5), RTR=4, RCR=1), z)


def test_replaced_values_carry_the_gradient_of_their_source_and_the_choice_none():
    z = torch.randn(1, 3, 1, 2, 1, 1, requires_grad=True)
    w_time = torch.tensor([0.5, 0.9, 0.1]).reshape(1, 3, 1).requires_grad_()  # step 2 is chosen
    w_channel = torch.tensor([0.1, 0.9]).expand(1, 3, 1, 2).clone().requires_grad_()  # channel 0 is chosen
    weights = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]).reshape(1, 3, 1, 2, 1, 1)
    (attention_zoneout(z, w_time, w_channel, RTR=3, RCR=2) * weights).sum().backward()
    assert z.grad.reshape(3, 2).tolist() == [[1.0, 10.0], [2.0 + 4.0, 20.0], [0.0, 40.0]]
    assert w_time.grad is None and w_channel.grad is None


@pytest.mark.parametrize("over_time", [True, False], ids=["SMA", "SMA-L"])
def test_zoneout_has_no_loop(over_time):
    """The number of operations depends neither on the scales nor on the steps nor on the channels."""

    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Count.operations += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for S, T, C in ((1, 2, 2), (4, 2, 2), (1, 16, 2), (1, 2, 32)):
        w_channel = torch.rand(S, *((T, 2, C) if over_time else (2, C)))
        before = Count.operations
        with Count():
            attention_zoneout(torch.rand(S, T, 2, C, 3, 3), torch.rand(S, T, 2), w_channel, RTR=2, RCR=2)
        counts.append(Count.operations - before)
    assert counts[0] > 5 and len(set(counts)) == 1


@pytest.mark.parametrize("cls", [SMA, SMA_L])
def test_zoneout_follows_the_training_mode(cls):
    torch.manual_seed(0)
    with_azo = cls(8, 4, C_reduction=4, T_reduction=2, AZO=True, RCR=2, RTR=2)
    without = cls(8, 4, C_reduction=4, T_reduction=2, AZO=False)
    without.load_state_dict(with_azo.state_dict())
    x = torch.randn(4, 2, 8, 6, 6)

    def outputs(training):
        results = []
        for net in (with_azo, without):
            net.train(training)
            results.append(net(x))
            reset_net(net)
        return results

    assert torch.equal(*outputs(training=False))
    assert not torch.equal(*outputs(training=True))


@pytest.mark.parametrize("cls", [SMA, SMA_L])
def test_an_observer_sees_the_weights_and_what_zoneout_replaced(cls):
    torch.manual_seed(0)
    sma = cls(channel=8, time=4, C_reduction=2, AZO=True, RCR=4, RTR=2).double()
    seen = []
    sma.observer = lambda *of_a_pass: seen.append(of_a_pass)
    x = torch.rand(4, 2, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    for mode in (True, False):
        sma.train(mode)(x)
        reset_net(sma)
    (w_time, w_channel, replaced), (_, _, in_evaluation) = seen
    assert not w_time.requires_grad and not w_channel.requires_grad
    assert w_time.shape == (4, 4, 2) and w_channel.shape == ((4, 4, 2, 8) if cls is SMA else (4, 2, 8))
    marked = torch.arange(1.0, 5).view(1, 4, 1, 1, 1, 1).expand(4, 4, 2, 8, 1, 1).contiguous()
    moved = attention_zoneout(marked, w_time, w_channel, RTR=2, RCR=4) != marked  # where step t has become t - 1
    assert replaced.any() and torch.equal(replaced, moved[:, :, 0, :, 0, 0])
    assert in_evaluation is None


def test_attention_weights_sum_to_one_over_the_scales():
    features = torch.rand(3, 4, 2, 8, 5, 5)
    w_time, w_channel = SMA(8, 4, kernels=[1, 3, 5], C_reduction=4, T_reduction=2).attention_weights(features)
    assert w_time.shape == (3, 4, 2) and w_channel.shape == (3, 4, 2, 8)
    torch.testing.assert_close(w_time.sum(0), torch.ones(4, 2))
    torch.testing.assert_close(w_channel.sum(0), torch.ones(4, 2, 8))
    _, w_light = SMA_L(8, 4, kernels=[1, 3, 5], C_reduction=4, T_reduction=2).attention_weights(features)
    assert w_light.shape == (3, 2, 8)


def test_the_published_call_works_word_for_word():
    net = SMA(channel=512, time=16, kernels=[1, 3, 5, 7], C_reduction=16, T_reduction=4, AZO=False, RCR=4, RTR=4)
    assert net.C_before_attention_conv.weight.shape == (32, 512, 1, 1)
    assert net.T_before_attention_conv.weight.shape == (4, 16, 1, 1, 1)


def test_a_fractional_time_reduction_gives_whole_units():
    net = SMA(channel=8, time=6, C_reduction=4, T_reduction=1.5)
    assert net.T_before_attention_conv.weight.shape == (4, 6, 1, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"time": 6, "T_reduction": 8}, r"T_reduction=8 leaves no unit for time=6; use 1 to 6"),
        ({"channel": 8, "C_reduction": 16}, r"C_reduction=16 leaves no unit for channel=8; use 1 to 8"),
        ({"C_reduction": 2.5}, r"C_reduction=2.5 must be a whole number"),
        ({"T_reduction": 0.5}, r"T_reduction=0.5 must be at least 1"),
        ({"T_reduction": float("nan")}, r"T_reduction=nan must be at least 1"),
        ({"channel": 0}, r"channel=0 must be a whole number of at least 1"),
        ({"time": 4.0}, r"time=4.0 must be a whole number"),
        ({"kernels": [2]}, r"kernels=\[2\] must be a list of odd whole numbers"),
        ({"kernels": []}, r"kernels=\[\] must be a list of odd whole numbers"),
        ({"AZO": True, "RTR": 17}, r"RTR=17 leaves AZO no step of time=16; use 1 to 16"),
        ({"RTR": 0}, r"RTR=0 must be a whole number of at least 1"),
        ({"AZO": True, "RCR": 513}, r"RCR=513 leaves AZO no channel of channel=512; use 1 to 512"),
        ({"groups": 4}, r"groups=4 must be 1, the published form, or 'channel'"),
        ({"activation": "gelu"}, r"activation='gelu' must be 'lif', 'relu' or a callable"),
    ],
)
def test_every_argument_is_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        SMA(**arguments)


def test_divisors_do_not_matter_without_zoneout():
    assert SMA_L(8, 2, C_reduction=4, T_reduction=2).RCR == 16


def test_input_of_another_length_is_refused_with_both():
    with pytest.raises(ValueError, match=r"T=4.*\[5, 1, 8, 4, 4\]"):
        SMA(8, 4, C_reduction=4, T_reduction=2)(torch.zeros(5, 1, 8, 4, 4))


def test_any_module_can_follow_the_branch_normalisation():
    net = SMA(8, 4, C_reduction=4, T_reduction=2, activation=torch.nn.Tanh)
    assert net(torch.randn(4, 1, 8, 3, 3)).shape == (4, 1, 8, 3, 3)
    assert isinstance(net.S_Convs[0].lif, torch.nn.Tanh)


@pytest.mark.parametrize(
    "activation",
    [neuron.LIFNode, neuron.IFNode, lambda: torch.nn.Sequential(torch.nn.Identity(), neuron.LIFNode())],
    ids=["LIFNode", "IFNode", "inside"],
)
def test_a_neuron_in_single_step_mode_is_refused(activation):
    """It would take T for the batch and compute another network."""
    message = r'makes a L?IFNode in single-step mode; use activation=lambda: L?IFNode\(step_mode="m"\)'
    with pytest.raises(ValueError, match=message):
        SMA(8, 4, C_reduction=4, T_reduction=2, activation=activation)


def test_single_step_neurons_in_a_container_for_all_steps_are_fine():
    nets = [
        SMA(8, 4, C_reduction=4, T_reduction=2, kernels=[1, 3], activation=activation).double().eval()
        for activation in (lambda: layer.MultiStepContainer(neuron.LIFNode()), lambda: neuron.LIFNode(step_mode="m"))
    ]
    x = 3 * torch.randn(4, 2, 8, 5, 5, dtype=torch.double)
    state = {name: value for name, value in nets[0].state_dict().items() if ".lif." not in name}
    nets[1].load_state_dict(state)
    torch.testing.assert_close(nets[0](x), nets[1](x))


@pytest.mark.parametrize("cls", [SMA, SMA_L])
def test_recomputation_without_the_fast_form_is_refused(cls):
    with pytest.raises(ValueError, match="recompute=True needs fast=True"):
        cls(8, 4, C_reduction=4, T_reduction=2, recompute=True, fast=False)


def test_sma_py_can_be_lifted_into_another_project(tmp_path):
    """Copied alone into an empty folder, it trains in a network of that project."""
    shutil.copy(models.sma.__file__, tmp_path / "sma.py")
    (tmp_path / "use.py").write_text(
        """
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from sma import SMA, SMA_L, attention_zoneout

torch.manual_seed(0)
net = nn.Sequential(
    layer.Conv2d(2, 8, 3, padding=1, bias=False),
    SMA(channel=8, time=4, C_reduction=4, T_reduction=2, AZO=True, RCR=2, RTR=2),
    layer.BatchNorm2d(8),
    neuron.LIFNode(),
    layer.AdaptiveAvgPool2d(1),
    layer.Flatten(),
    layer.Linear(8, 2),
)
functional.set_step_mode(net, "m")
x = torch.zeros(4, 8, 2, 8, 8)
x[:, :4, :, :4] = 1.0  # class 0: the upper half
x[:, 4:, :, 4:] = 1.0
x = x * torch.linspace(0.5, 1.5, 8).reshape(1, 8, 1, 1, 1)
y = torch.tensor([0] * 4 + [1] * 4)
optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
losses = []
for _ in range(15):
    loss = nn.functional.cross_entropy(net(x).mean(0), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    functional.reset_net(net)
    losses.append(loss.item())
assert losses[-1] < 0.7 * losses[0], losses
print("trained")
"""
    )
    result = subprocess.run(
        [sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout.strip() == "trained", result.stderr


# A neuron as SpikingJelly 0.0.0.0.12 has it, where that version is not there: one class for a step, one for T steps.
STAND_IN = """
import torch
from torch import nn

class LIFNode(nn.Module):
    def __init__(self, tau=2.0, v_threshold=1.0, surrogate_function=None, detach_reset=False):
        super().__init__()
        self.tau, self.v_threshold, self.v = tau, v_threshold, 0.0

class MultiStepLIFNode(LIFNode):
    def forward(self, x_seq):
        spikes = []
        for x in x_seq:
            self.v = self.v + (x - self.v) / self.tau
            soft = torch.sigmoid(4 * (self.v - self.v_threshold))
            spikes.append((self.v >= self.v_threshold).float() + soft - soft.detach())
            self.v = self.v * (1 - spikes[-1].detach())
        return torch.stack(spikes)

    def reset(self):
        self.v = 0.0
"""
IN_012 = """
import importlib.util, warnings
import torch
assert importlib.util.find_spec("spikingjelly.activation_based") is None
from spikingjelly.clock_driven import neuron, surrogate
from sma import SMA, SMA_L

torch.manual_seed(0)
for cls in (SMA, SMA_L):
    for activation, sentence in (("lif", "activation=lambda: MultiStepLIFNode("),
                                 (neuron.LIFNode, "use activation=lambda: MultiStepLIFNode(...)")):
        try:
            cls(8, 4, C_reduction=4, T_reduction=2, activation=activation)
            raise AssertionError("not refused")
        except (ImportError, ValueError) as error:
            assert sentence in str(error)
    multi_step = lambda: neuron.MultiStepLIFNode(detach_reset=True, surrogate_function=surrogate.ATan())
    sma = cls(8, 4, C_reduction=4, T_reduction=2, AZO=True, RCR=2, RTR=2, activation=multi_step)
    target, x = torch.rand(4, 2, 8, 6, 6), 3 * torch.randn(4, 2, 8, 6, 6)
    optimizer = torch.optim.Adam(sma.parameters(), 0.03)
    losses = []
    for _ in range(15):
        loss = (sma(x) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for branch in sma.S_Convs:
            branch.lif.reset()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    print("trained")
"""


@pytest.mark.parametrize("version", ["stand-in", "installed"])
def test_sma_py_works_alone_under_spikingjelly_0_0_0_0_12(version, tmp_path):
    folder = tmp_path / "packages"
    if version == "installed":
        name = "SPIKINGJELLY_012"
        if name not in os.environ:
            how = "pip install --no-deps --target FOLDER spikingjelly==0.0.0.0.12"
            pytest.skip(f"give in {name} a folder made by: {how}")
        folder = Path(os.environ[name])
    else:
        (folder / "spikingjelly/clock_driven").mkdir(parents=True)
        for empty in ("__init__.py", "clock_driven/__init__.py"):
            (folder / "spikingjelly" / empty).touch()
        (folder / "spikingjelly/clock_driven/neuron.py").write_text(STAND_IN)
        (folder / "spikingjelly/clock_driven/surrogate.py").write_text("ATan = object")
    shutil.copy(models.sma.__file__, tmp_path / "sma.py")
    (tmp_path / "use.py").write_text(IN_012)
    result = subprocess.run(
        [sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip
    assert result.stdout.split() == ["trained"] * 2, result.stderr


@pytest.mark.parametrize(
    ("kernel", "height", "width"), [(7, 2, 2), (7, 1, 1), (5, 1, 3), (7, 2, 9), (3, 1, 4), (7, 4, 4)]
)
def test_on_a_small_map_the_taps_that_see_padding_only_are_left_out(kernel, height, width):
    torch.manual_seed(0)
    conv = _Conv2d(3, 3, kernel, padding=kernel // 2).double()
    plain = torch.nn.Conv2d(3, 3, kernel, padding=kernel // 2).double()
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [conv(inputs[0]), plain(inputs[1])]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for output in outputs:
        output.pow(3).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(conv.weight.grad, plain.weight.grad, rtol=1e-12, atol=1e-12)
    if height == width == 1:
        assert torch.count_nonzero(conv.weight.grad[0, 0]) == 1


def test_bfloat16_weight_gradients_on_small_maps_are_those_of_float32():
    torch.manual_seed(0)
    conv = _Conv2d(64, 64, 7, padding=3)
    x = torch.relu(torch.randn(8, 64, 2, 2))
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = conv(x)
        conv.zero_grad()
        y.float().pow(2).sum().backward()
        gradients.append(conv.weight.grad.clone())
    assert (gradients[1] - gradients[0]).norm() < 0.02 * gradients[0].norm()

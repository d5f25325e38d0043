"""The path that a GPU takes, on a machine without one: devices, types, questions to the device, and its compilers."""

import re

import pytest
import torch
from torch import nn

from models import neurons
from models.ms_resnet import BatchNorm, MSBlock
from tools._without_gpu import (
    HostQuestionError,
    cupy_sources,
    fake_cuda_forward,
    launches,
    neurons_in,
    pretended_step,
)
from tools.compile_kernels import NETS, compile_cuda, net_of

pytest.importorskip("triton", reason="Triton is not installed")
FIRST_GENERATION = hasattr(neurons.functional, "set_backend")
HALF, BRAIN = torch.float16, torch.bfloat16
# The four networks of the recipes in their published sizes, precision, and what runs the neurons.
PATHS = [
    *((name, amp, "triton") for name in ("dvs128", "cifar10dvs", "ncaltech101", "resnet18") for amp in (HALF, BRAIN)),
    ("dvs128", HALF, "torch"),
    ("resnet18", HALF, "torch"),
]


def potentials(net):
    return {name: m.v.dtype for name, m in net.named_modules() if torch.is_tensor(getattr(m, "v", None))}


def of_residual_stream(net):
    """What blocks and BatchNorms of MS-ResNet give, noted from now on: name to type."""
    found = {}
    for name, module in net.named_modules():
        if isinstance(module, MSBlock | BatchNorm):
            module.register_forward_hook(lambda m, given, y, name=name: found.update({name: y.dtype}))
    return found


@pytest.mark.parametrize(("name", "amp", "backend"), PATHS, ids=str)
def test_a_forward_pass_on_cuda_tensors(name, amp, backend):
    """It stops where devices mix or a value is asked for. What is carried from step to step is float32."""
    make, shape = net_of(name)
    types = {}

    def choose(net):
        neurons_in(backend)(net)
        types["stream"] = of_residual_stream(net)

    with launches():
        net, y = fake_cuda_forward(make, shape, amp, choose)
    assert y.device.type == "cuda" and y.shape[-1] == net.num_classes
    assert len(potentials(net)) >= 8 and set(potentials(net).values()) == {torch.float32}
    assert set(types["stream"].values()) <= {torch.float32}
    assert len(types["stream"]) > 20 or name != "resnet18"


@pytest.mark.parametrize(("name", "amp", "backend"), PATHS, ids=str)
def test_a_training_step_asks_the_gpu_nothing(name, amp, backend):
    with launches() as found:
        pretended_step(*net_of(name), amp, neurons_in(backend))
    used = {launch.kernel.split(".", 2)[2] for launch in found}
    assert {"neuron_kernels._fire", "neuron_kernels._fire_backward"} <= used or backend == "torch"
    assert {"kernels._weighted_sum", "kernels._weighted_sum_backward"} <= used
    assert {"kernels._fire", "kernels._fire_backward"} <= used or name == "resnet18"


@pytest.mark.parametrize("name", ["dvs128", "resnet18"])
def test_a_step_without_the_kernels_of_sma_asks_the_gpu_nothing(name):
    with launches(work=False) as found:
        pretended_step(*net_of(name), HALF, neurons_in("torch"))
    assert not found


@pytest.mark.parametrize("name", ["dvs128", "resnet18"])
def test_evaluation_asks_the_gpu_nothing(name):
    make, shape = net_of(name)
    with launches():
        fake_cuda_forward(make, shape, None, neurons_in("triton"), training=False)


@pytest.mark.parametrize("name", ["dvs128", "resnet18"])
def test_the_two_walks_launch_the_same_kernels(name):
    """So what the walk on meta tensors imitates (autocast, layouts) is what the walk on CUDA tensors has."""
    make, shape = net_of(name)
    with launches() as forward:
        fake_cuda_forward(make, shape, HALF, neurons_in("triton"))
    with launches() as both:
        pretended_step(make, shape, HALF, neurons_in("triton"))
    assert {launch for launch in both if "backward" not in launch.kernel} == set(forward)


# Faults on purpose: each must be found by the walks above.


class MixedDevices(nn.Module):
    def forward(self, x):
        return x + torch.ones(1)  # made on the CPU


class TruthOfATensor(nn.Module):
    def forward(self, x):
        return x * 2 if x.max() > 0 else x


class AList(nn.Module):
    def forward(self, x):
        return x * sum(x.flatten()[:2].tolist())


class AQuestionInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * grad.max().item()


class Asks(nn.Module):
    def forward(self, x):
        return AQuestionInBackward.apply(x)


def net_with(module):
    return lambda: nn.Sequential(nn.Conv2d(2, 4, 3), module(), nn.Flatten())


@pytest.mark.parametrize("fault", [MixedDevices, TruthOfATensor, AList])
def test_a_fault_in_the_forward_pass_is_found_by_both_walks(fault):
    expected = "device|tensors on meta" if fault is MixedDevices else "path of a GPU"
    for walk in (fake_cuda_forward, pretended_step):
        with pytest.raises(RuntimeError, match=expected):
            walk(net_with(fault), (3, 2, 8, 8), HALF, lambda net: None)


def test_a_question_in_the_backward_pass_is_found():
    with pytest.raises(HostQuestionError, match="_local_scalar_dense"):
        pretended_step(net_with(Asks), (3, 2, 8, 8), HALF, lambda net: None)


class HalfPotential(nn.Module):
    def forward(self, x):
        self.v = x[0] / 2
        return x


def test_a_half_precision_potential_is_found():
    for fault, expected in ((HalfPotential, {HALF}), (neurons.lif, {torch.float32})):
        with launches():
            net, _ = fake_cuda_forward(net_with(fault), (3, 2, 8, 8), HALF, neurons_in("triton"))
        assert set(potentials(net).values()) == expected


def test_a_kernel_with_tensors_of_two_devices_is_found():
    from models.fast import neuron_kernels

    x = torch.zeros(3, 2, device="meta")
    with launches(), pytest.raises(RuntimeError, match="tensors on"):
        neuron_kernels.fire(x, torch.zeros(2), 2.0, True, 1.0)


# Compilers ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not FIRST_GENERATION, reason="SpikingJelly 2.x has no CuPy code")
@pytest.mark.parametrize("name", ["dvs128", "resnet18"])
def test_the_cuda_sources_of_spikingjelly_compile(name):
    titles = set()
    for amp in (HALF, None):
        for title, source in cupy_sources(*net_of(name), amp).items():
            titles.add(title)
            assert compile_cuda(source, 90).spilled == 0
    assert len(titles) in (2, 4)  # forward and backward; where potentials are float32 throughout, in float only
    surrogate = "ATan" if name == "dvs128" else "Rectangle"
    assert any(title.endswith(surrogate) for title in titles)


@pytest.mark.skipif(not FIRST_GENERATION, reason="SpikingJelly 2.x has no CuPy code")
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_the_cupy_kernels_get_the_map_itself_in_either_layout(layout, monkeypatch):
    """No copy: what the kernels read lies in the memory of the input, and what they write is laid out like it."""
    from spikingjelly.activation_based import base
    from spikingjelly.activation_based.auto_cuda import neuron_kernel

    seen = []

    class Noted:
        @staticmethod
        def apply(x, v, *rest):
            seen.append(x)
            return x * 1, x * 1

    monkeypatch.setattr(base, "cupy", object())
    monkeypatch.setattr(neuron_kernel, "LIFNodeATGF", Noted)
    node = neurons.lif()
    node.backend = node.runs_in = "cupy"
    with torch._subclasses.fake_tensor.FakeTensorMode():
        x = torch.zeros(4, 2, 5, 3, 7, device="cuda")
        if layout == "channels-last":
            x = x.movedim(2, 4).contiguous().movedim(4, 2)
        for dtype in (HALF, BRAIN):
            given = x.to(dtype)
            spikes = node(given)
            assert spikes.shape == x.shape and spikes.stride() == x.stride() and spikes.dtype == dtype
            assert node.v.shape == x.shape[1:] and node.v.stride() == x.stride()[1:]
            if dtype == HALF:
                assert seen[-1].is_contiguous()
                assert seen[-1].untyped_storage()._cdata == given.untyped_storage()._cdata
            assert seen[-1].dtype == (torch.float32 if dtype == BRAIN else HALF)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_gpu(launch):
    """With the arguments of a step in production, in all networks, and nothing of a thread's registers in memory."""
    command = ["tools/compile_kernels.py", "--amp", "fp16", "bf16", "--arch", "80", "86", "90"]
    done = launch(command, timeout=600, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "neuron_kernels." in line or "kernels." in line]
    assert len(rows) >= 6 * len(NETS)
    for row in rows:
        assert re.findall(r"\d+ / (\d+)", row) == ["0", "0", "0"], row


WRONG = """
import torch
from tools._without_gpu import Launch
from tools.compile_kernels import compile_triton

half, real = torch.float16, torch.float32
constants = (0.5, 0.5, 1.0, True, True, 4, 1024)  # decay ... BLOCK
for first in (real, half, 7):
    launch = Launch("models.fast.neuron_kernels._fire", (half, first, half, real, 4096, 4096, 4096, *constants), ())
    print(compile_triton(launch, 90).spilled)
"""


@pytest.mark.slow
def test_a_wrong_argument_of_a_kernel_is_found(launch):
    """A number in the place of a potential's memory: the interpreter never sees it, the compiler refuses it."""
    done = launch(["-c", WRONG], TRITON_INTERPRET="0")
    assert done.stdout.split() == ["0", "0"] and "CompilationError" in done.stderr

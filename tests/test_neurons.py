"""Choosing the backend of the neurons, on both generations of SpikingJelly."""

import types

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, neuron, surrogate

from models import VGG8, neurons

CPU = torch.device("cpu")
FIRST_GENERATION = hasattr(functional, "set_backend")


def test_the_neuron_follows_its_equation():
    x = torch.tensor([1.5, 1.0, 0.4, 3.0, 0.1]).reshape(5, 1)
    spikes, u = [], 0.0
    for value in x.flatten().tolist():
        u = u + (value - u) / 2.0  # tau = 2, input decayed
        spikes.append(float(u >= 1.0))
        u = 0.0 if u >= 1.0 else u
    assert spikes == [0.0, 0.0, 0.0, 1.0, 0.0]
    lif = neurons.lif()
    assert lif(x).flatten().tolist() == spikes
    neurons.reset_net(lif)
    lif.eval()
    assert lif(x).flatten().tolist() == spikes


def test_the_surrogate_gradient_is_atan_with_alpha_2():
    x = torch.tensor([[1.0]], requires_grad=True)  # u = 0.5, so u - threshold = -0.5
    neurons.lif()(x).sum().backward()
    assert x.grad.item() == pytest.approx(0.5 * 1.0 / (1 + (torch.pi * -0.5) ** 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_cpu_path_is_spikingjelly_s_neuron(dtype):
    """Bit-equal spikes and potentials, gradients to rounding, over two calls without a reset between."""
    torch.manual_seed(0)
    theirs = neuron.LIFNode(
        tau=2.0, v_threshold=1.0, v_reset=0.0, detach_reset=True, surrogate_function=surrogate.ATan(), step_mode="m"
    )
    ours = neurons.lif()
    x = (2 * torch.randn(2, 6, 3, 5, 7) + 1).to(dtype)
    weights = torch.randn(2, 6, 3, 5, 7).to(dtype)
    inputs, outputs, potentials = [], [], []
    for node in (theirs, ours):
        inputs.append(x.clone().requires_grad_())
        first, second = node(inputs[-1][0]), node(inputs[-1][1])
        outputs.append(torch.stack([first, second]))
        potentials.append(node.v)
        ((outputs[-1] * weights).sum() + node.v.sum()).backward()
    assert 0.2 < outputs[0].float().mean() < 0.8
    assert torch.equal(*outputs) and torch.equal(*potentials)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=tolerance, atol=tolerance)


def test_a_reset_forgets_the_potential():
    lif = neurons.lif()
    x = torch.full((3, 2), 0.9)
    first = lif(x)
    lif(x)
    neurons.reset_net(lif)
    assert lif.v == 0.0 and torch.equal(lif(x), first)


def test_on_a_cpu_the_backend_is_torch():
    net = VGG8(T=4, width=0.125)
    assert neurons.select_backend(net, "auto", CPU) == "torch"
    assert neurons.select_backend(net, "torch", CPU) == "torch"


def test_cupy_that_is_asked_for_and_cannot_be_used_is_an_error_with_the_reason():
    reason = "needs a CUDA GPU" if FIRST_GENERATION else "has no CuPy code"
    with pytest.raises(neurons.BackendError, match=f"--backend cupy cannot be used: .*{reason}"):
        neurons.select_backend(VGG8(T=4, width=0.125), "cupy", CPU)


@pytest.mark.skipif(not FIRST_GENERATION, reason="SpikingJelly 2.x has no CuPy code")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this test is about a machine without a GPU")
def test_without_cupy_a_gpu_run_goes_on_in_torch_and_says_why():
    words = neurons.select_backend(VGG8(T=4, width=0.125), "auto", torch.device("cuda"))
    assert words.startswith("torch (no CuPy: ") and "Error" in words


@pytest.mark.skipif(not FIRST_GENERATION, reason="SpikingJelly 2.x has no CuPy code")
def test_np_int_is_mended_in_the_one_module_that_needs_it():
    module = types.SimpleNamespace(np=np)
    neurons._mend_numpy_int(module)
    assert np.dtype(np.int64) == module.np.int and module.np.float32 is np.float32
    assert not hasattr(np, "int")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu_kernels_agree_with_torch(dtype):
    torch.manual_seed(0)
    x = torch.randn(8, 2, 64, device="cuda").to(dtype) + 1
    results = []
    for backend in ("auto", "torch"):
        net = torch.nn.Sequential(neurons.lif()).cuda()
        neurons.select_backend(net, backend, torch.device("cuda"))
        inputs = x.clone().requires_grad_()
        spikes = net(inputs)
        spikes.float().pow(2).sum().backward()
        results.append((spikes.detach().float(), inputs.grad.float()))
    assert (results[0][0] == results[1][0]).float().mean() > 0.999
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0.05, atol=0.02)


def test_only_spikingjelly_s_neurons_are_used():
    kinds = {type(m) for m in VGG8(T=4, width=0.125).modules() if hasattr(m, "v_threshold")}
    assert len(kinds) == 1 and issubclass(kinds.pop(), neuron.LIFNode)

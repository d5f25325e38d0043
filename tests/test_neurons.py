"""Choosing the backend of the neurons, on both generations of SpikingJelly."""

import types

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, neuron, surrogate

from models import VGG8, neurons

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # without one Triton interprets (conftest.py)
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


def reference(kind):
    """SpikingJelly's own neuron of the same kind, step by step."""
    form = {"v_reset": 0.0, "detach_reset": True, "step_mode": "m"}
    if kind is neurons.lif:
        return neuron.LIFNode(tau=2.0, v_threshold=1.0, surrogate_function=surrogate.ATan(), **form)
    rectangle = neurons.Rectangle()
    return neuron.LIFNode(tau=4 / 3, decay_input=False, v_threshold=0.5, surrogate_function=rectangle, **form)


def run_twice(node, x, weights):
    """Two calls without a reset between: spikes of both, the last potential, and the gradient of the inputs ``x``."""
    x = x.clone().requires_grad_()
    spikes = torch.stack([node(one) for one in x])
    ((spikes * weights).sum() + node.v.sum()).backward()
    return spikes.detach(), node.v.detach(), x.grad


@pytest.mark.parametrize("kind", [neurons.lif, neurons.ms_lif])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_neuron_is_spikingjelly_s(kind, backend, dtype):
    """Equal spikes, potentials and gradients to rounding; half-precision inputs as their values in float32."""
    torch.manual_seed(0)
    x = (2 * torch.randn(2, 6, 3, 5, 7) + 1).to(dtype)
    weights = torch.randn(2, 6, 3, 5, 7).to(dtype)
    exact = torch.promote_types(dtype, torch.float32)
    spikes, potential, grad = run_twice(reference(kind), x.to(exact), weights.to(exact))
    ours = kind()
    assert neurons.select_backend(ours, backend, DEVICE).name == backend
    found = run_twice(ours, x.to(DEVICE), weights.to(DEVICE))
    assert 0.2 < spikes.mean() < 0.8
    assert found[0].dtype == dtype and torch.equal(found[0].cpu().to(exact), spikes)
    assert found[1].dtype == exact
    if kind is neurons.lif:
        assert torch.equal(found[1].cpu(), potential)
    else:  # 2.x has v - v / tau where the publication has v / 4
        torch.testing.assert_close(found[1].cpu(), potential, rtol=1e-6, atol=1e-6)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(found[2].cpu().to(exact), grad, rtol=tolerance, atol=tolerance)


def test_a_reset_forgets_the_potential():
    lif = neurons.lif()
    x = torch.full((3, 2), 0.9)
    first = lif(x)
    lif(x)
    neurons.reset_net(lif)
    assert lif.v == 0.0 and torch.equal(lif(x), first)


def laid_out(x, layout):
    """``x [T, B, C, H, W]`` in memory: contiguous, channels-last, one step for all of them, or with gaps."""
    if layout == "channels-last":
        return x.movedim(2, 4).contiguous().movedim(4, 2)
    return {"contiguous": x, "repeated": x[:1].expand(x.shape), "gaps": x.repeat(1, 1, 1, 1, 2)[..., ::2]}[layout]


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "repeated", "gaps"])
@pytest.mark.parametrize("shape", [(3, 2, 5, 6, 7), (1, 1, 1, 1, 1), (2, 1, 66, 3, 17), (40, 1, 2, 3, 3)], ids=str)
@pytest.mark.parametrize("kind", [neurons.lif, neurons.ms_lif])
@pytest.mark.parametrize("of_loss", ["spikes", "potential", "both"])
def test_the_triton_kernels_serve_every_layout_and_shape(kind, shape, layout, of_loss):
    torch.manual_seed(0)
    x = laid_out(2 * torch.randn(shape, dtype=torch.float64, device=DEVICE) + 1, layout)
    v = torch.randn(shape[1:], dtype=torch.float64, device=DEVICE)
    weights = torch.randn(shape, dtype=torch.float64, device=DEVICE)
    results = []
    for backend in ("torch", "triton"):
        node = kind()
        assert neurons.select_backend(node, backend, DEVICE).name == backend
        inputs, node.v = x.detach().requires_grad_(), v.clone().requires_grad_()
        first, spikes = node.v, node(inputs)
        loss = {"spikes": (spikes * weights).sum(), "potential": node.v.square().sum()}
        (sum(loss.values()) if of_loss == "both" else loss[of_loss]).backward()
        assert layout == "repeated" or layout == "gaps" or spikes.stride() == inputs.stride()
        results.append([spikes, node.v, inputs.grad, first.grad])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_on_a_cpu_the_backend_is_torch():
    net = VGG8(T=4, width=0.125)
    assert neurons.select_backend(net, "auto", CPU) == neurons.Backend("torch")
    assert neurons.select_backend(net, "torch", CPU) == neurons.Backend("torch")


def test_a_choice_can_be_changed():
    node = neurons.lif()
    for wanted in ("triton", "torch", "triton", "auto"):
        name = neurons.select_backend(node, wanted, DEVICE).name
        assert name == wanted or wanted == "auto"
        node(torch.ones(2, 3, dtype=torch.float16, device=DEVICE))
        assert node.v.dtype == torch.float32
        neurons.reset_net(node)


def test_cupy_that_is_asked_for_and_cannot_be_used_is_an_error_with_the_reason():
    reason = "needs a CUDA GPU" if FIRST_GENERATION else "has no CuPy code"
    with pytest.raises(neurons.BackendError, match=f"--backend cupy cannot be used: .*{reason}"):
        neurons.select_backend(VGG8(T=4, width=0.125), "cupy", CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this test is about a machine without a GPU")
def test_a_gpu_run_without_kernels_is_one_in_torch_and_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend = neurons.select_backend(VGG8(T=4, width=0.125), "auto", torch.device("cuda"))
    assert backend.name == "torch" and "no CuPy: " in backend.reason and "no Triton: " in backend.reason
    assert str(backend) == f"torch ({backend.reason})"
    asked_for = neurons.select_backend(VGG8(T=4, width=0.125), "torch", torch.device("cuda"))
    assert asked_for == neurons.Backend("torch", "asked for")
    with pytest.raises(neurons.BackendError, match=r"--backend triton cannot be used: .*needs a CUDA GPU"):
        neurons.select_backend(VGG8(T=4, width=0.125), "triton", CPU)


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch):
    right = neurons.neuron_kernels.fire
    monkeypatch.setattr(neurons.neuron_kernels, "fire", lambda x, v, *rest: right(x + 0.25, v, *rest))
    with pytest.raises(neurons.BackendError, match="spikes in float32 are not those of PyTorch"):
        neurons.select_backend(neurons.lif(), "triton", DEVICE)


@pytest.mark.skipif(not FIRST_GENERATION, reason="SpikingJelly 2.x has no CuPy code")
def test_np_int_is_mended_in_the_one_module_that_needs_it():
    module = types.SimpleNamespace(np=np)
    neurons._mend_numpy_int(module)
    assert np.dtype(np.int64) == module.np.int and module.np.float32 is np.float32
    assert not hasattr(np, "int")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["cupy", "triton"])
@pytest.mark.parametrize("kind", [neurons.lif, neurons.ms_lif])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu_kernels_agree_with_a_float32_reference(kind, backend, dtype):
    """Where a potential comes near the threshold, CuPy's half-precision arithmetic may fire or not."""
    torch.manual_seed(0)
    x = (torch.randn(8, 2, 64) + 1).to(dtype)
    nodes = reference(kind), kind()
    try:
        neurons.select_backend(nodes[1], backend, DEVICE)
    except neurons.BackendError as error:
        pytest.skip(str(error))
    nodes[0].store_v_seq = True
    expected = nodes[0](x.float())
    before = x[0].float() * 0  # the potential before the reset, step by step
    near = torch.zeros_like(expected, dtype=torch.bool)
    for t, charge in enumerate(x.float()):
        u = before + (charge - before) / 2 if kind is neurons.lif else before / 4 + charge
        near[t:] |= (u - nodes[0].v_threshold).abs() < 0.02  # and what follows it
        before = nodes[0].v_seq[t]
    inputs = [x.float().requires_grad_(), x.to(DEVICE).requires_grad_()]
    found = nodes[1](inputs[1])
    assert (~near).float().mean() > 0.3
    assert torch.equal(found.detach().cpu().float()[~near], expected[~near])
    neurons.reset_net(nodes[0])
    for node, given in zip(nodes, inputs, strict=True):
        neurons.reset_net(node)
        node(given).sum().backward()
    clear = ~near.any(0)  # neurons whose gradients went through none of these
    torch.testing.assert_close(inputs[1].grad.cpu().float()[:, clear], inputs[0].grad[:, clear], rtol=0.05, atol=0.02)


def test_only_spikingjelly_s_neurons_are_used():
    kinds = {type(m) for m in VGG8(T=4, width=0.125).modules() if hasattr(m, "v_threshold")}
    assert len(kinds) == 1 and issubclass(kinds.pop(), neuron.LIFNode)

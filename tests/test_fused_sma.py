"""The fast form of SMA against its equations: numbers, gradients, memory, and what the fused functions cannot serve."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models import SMA, SMA_L, sma_ms_resnet18, sma_vgg8_dvs128
from models.fast import equations_only
from models.fast.loops import pack, unpack
from models.neurons import lif, reset_net
from tests.direct import as_direct

SMALL = {"channel": 12, "time": 8, "C_reduction": 4, "T_reduction": 2}


def make(cls=SMA, dtype=torch.float64, **keywords):
    torch.manual_seed(0)
    sma = cls(**{**SMALL, "activation": lif, **keywords}).to(dtype)
    for branch in sma.S_Convs:  # off the first values, so that about a fifth of the neurons fire
        bn = branch.bn.bn if hasattr(branch.bn, "bn") else branch.bn
        nn.init.uniform_(bn.weight, 0.5, 2.0)
        nn.init.uniform_(bn.bias, 0.0, 1.0)
    return sma


def a_pass(sma, x, weights):
    """Output, and gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    sma.zero_grad()
    output = sma(x)
    (output * weights).sum().backward()
    return {"output": output, "x": x.grad} | {name: p.grad for name, p in sma.named_parameters()}


def inputs(height=5, width=7, batch=3, dtype=torch.float64):
    torch.manual_seed(1)
    shape = 8, batch, 12, height, width
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def assert_equal(found, expected, tolerance):
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("activation", [lif, "lif", "relu"], ids=["lif of models", "lif of sma.py", "relu"])
@pytest.mark.parametrize("groups", [1, "channel"])
@pytest.mark.parametrize("cls", [SMA, SMA_L])
def test_it_is_the_direct_form(cls, groups, activation, training):
    """Two calls without a reset between them, and the state that they leave behind."""
    ours = make(cls, activation=activation, groups=groups, AZO=True, RCR=2, RTR=2).train(training)
    direct = as_direct(ours)
    x, weights = inputs()
    for call in range(2):
        found, expected = a_pass(ours, x + call, weights), a_pass(direct, x + call, weights)
        assert_equal(found, expected, 1e-10)
        for sma in (ours, direct):
            for branch in sma.S_Convs:
                if activation != "relu":
                    branch.lif.v = branch.lif.v.detach()
    assert_equal(ours.state_dict(), direct.state_dict(), 1e-12)
    if activation != "relu":
        for one, other in zip(ours.S_Convs, direct.S_Convs, strict=True):
            torch.testing.assert_close(one.lif.v, other.lif.v, rtol=1e-12, atol=1e-12)
            assert one.lif.v.abs().sum() > 0


@pytest.mark.parametrize(("height", "width", "batch"), [(1, 1, 1), (2, 3, 1), (4, 4, 2)])
def test_any_size_and_batch(height, width, batch):
    ours = make(AZO=True, RCR=3, RTR=1)
    x, weights = inputs(height, width, batch)
    assert_equal(a_pass(ours, x, weights), a_pass(as_direct(make(AZO=True, RCR=3, RTR=1)), x, weights), 1e-10)


def test_float32_is_the_direct_form_to_rounding():
    ours = make(dtype=torch.float32, AZO=True, RCR=2, RTR=2)
    x, weights = inputs(dtype=torch.float32)
    expected = a_pass(as_direct(ours), x, weights)
    found = a_pass(ours, x, weights)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * value.norm() + 1e-3, name


def test_under_bfloat16_autocast_it_stays_near_float32():
    ours = make(dtype=torch.float32)
    x, weights = inputs(dtype=torch.float32)
    expected = a_pass(ours, x, weights)
    reset_net(ours)
    with torch.autocast("cpu", torch.bfloat16):
        found = a_pass(ours, x, weights)
    assert (found["output"].float() - expected["output"]).norm() < 0.2 * expected["output"].norm()
    assert (found["x"] - expected["x"]).norm() < 0.5 * expected["x"].norm()


def test_the_gradient_flows_through_potentials_that_are_carried_over():
    ours = make()
    x, weights = inputs()
    grads = []
    for sma in (ours, as_direct(ours)):
        first = x.clone().requires_grad_()
        sma(first)
        (sma(x) * weights).sum().backward()
        grads.append(first.grad)
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def test_channels_last_input_gives_the_same():
    ours = make(dtype=torch.float64, AZO=True, RCR=2, RTR=2)
    x, weights = inputs()
    expected = a_pass(ours, x, weights)
    reset_net(ours)
    strided = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
    assert strided.stride() != x.stride()
    assert_equal(a_pass(make(AZO=True, RCR=2, RTR=2), strided, weights), expected, 1e-10)


@pytest.mark.parametrize("watched", ["conv", "bn", "lif", ""])
def test_a_hook_on_a_module_of_a_branch_sees_the_tensors(watched):
    ours = make(AZO=True, RCR=2, RTR=2)
    x, weights = inputs()
    expected = a_pass(ours, x, weights)
    reset_net(ours)
    seen = []
    branch = ours.S_Convs[2]
    module = branch.get_submodule(watched)
    handle = module.register_forward_hook(lambda _, given, output: seen.append((given[0].clone(), output.clone())))
    ours.load_state_dict(make().state_dict())
    assert_equal(a_pass(ours, x, weights), expected, 1e-10)
    handle.remove()
    (given, output), *more = seen
    assert not more and output.shape[-3:] == (12, 5, 7)
    if watched == "lif":
        assert 0.05 < output.mean() < 0.6 and set(output.unique().tolist()) == {0.0, 1.0}
        assert (given >= 1).any()
    if watched == "bn":
        torch.testing.assert_close(output.mean((0, 2, 3)), branch.bn.bias)


def test_a_neuron_of_the_user_s_own_is_called():
    class Halves(type(lif())):
        def multi_step_forward(self, x_seq):
            return super().multi_step_forward(x_seq) / 2

    Halves.computes_lif = False
    ours = make(activation=lambda: Halves(step_mode="m"), kernels=[1])
    features = ours.S_Convs[0](inputs()[0])
    reset_net(ours)
    assert set(features.unique().tolist()) == {0.0, 0.5}
    torch.testing.assert_close(ours(inputs()[0]), features, rtol=1e-12, atol=1e-12)  # one scale: its weight is 1


def test_backward_keeps_the_convolutions_outputs_and_bits():
    """No feature map but the input and what each convolution gives is kept, and one bit a spike."""
    ours = make(dtype=torch.float32, channel=16, kernels=[1, 3])
    x = torch.randn(8, 1, 16, 16, 16)
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.update({t.data_ptr(): t.numel() * t.element_size()}) or t, lambda t: t
    ):
        ours(x.requires_grad_())
    whole = x.numel() * 4
    assert sorted(size for size in sizes.values() if size >= whole / 4) == [whole] * 3  # x, two outputs
    assert sum(size == whole / 32 for size in sizes.values()) == 2


def test_a_block_of_the_network_keeps_no_normalised_map_and_no_potentials():
    block = sma_vgg8_dvs128(T=4, width=0.25).block1  # 16 channels
    x = torch.rand(4, 2, 2, 32, 32)
    sizes = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.update({t.data_ptr(): t.numel() * t.element_size()}) or t, lambda t: t
    ):
        block(x)
    whole = 4 * 2 * 16 * 32 * 32 * 4
    assert sorted(size for size in sizes.values() if size > whole / 8) == [whole / 2, whole, whole]
    # of the pooling its indices (8 bytes) and its input, the spikes; of all that comes before, the convolution's output


@pytest.mark.parametrize("layer", [1, 2], ids=["bn", "lif"])
def test_a_hook_in_a_block_of_the_network_sees_the_tensors(layer):
    torch.manual_seed(0)
    block = sma_vgg8_dvs128(T=4, width=0.125).double().block4
    x = torch.randn(4, 2, *block[0][0].weight.shape[1:2], 6, 6, dtype=torch.float64)
    expected = block(x)
    reset_net(block)
    seen = []
    handle = block[layer].register_forward_hook(lambda _, given, output: seen.append((given[0].clone(), output)))
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)
    handle.remove()
    [(given, output)] = seen
    if layer == 1:
        torch.testing.assert_close(output.mean((0, 1, 3, 4)), block[1][0].bias)
    else:
        assert (given >= 1).any() and set(output.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("activation", ["lif", "relu"])
def test_recomputation_keeps_less_and_changes_no_bit(activation):
    """Two calls, so that the neurons start from potentials and the running statistics from something."""
    keywords = {"dtype": torch.float32, "activation": activation, "AZO": True, "RCR": 2, "RTR": 2}
    results, kept = [], []
    for recompute in (False, True):
        sma = make(**keywords, recompute=recompute)
        results.append([])
        for _ in range(2):
            storages = {}
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, found=storages: found.update({t.untyped_storage().data_ptr(): t.numel()}) or t, lambda t: t
            ):
                x, weights = inputs(dtype=torch.float32)
                results[-1].append(a_pass(sma, x, weights))
            for branch in sma.S_Convs:
                if activation == "lif":
                    branch.lif.v = branch.lif.v.detach()
        results[-1].append(sma.state_dict())
        kept.append(sum(size for size in storages.values() if size >= x.numel() / 8))
    for one, other in zip(*results, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert kept[1] < 0.8 * kept[0]


def test_depthwise_branches_have_the_published_names():
    published, depthwise = make().state_dict(), make(groups="channel").state_dict()
    differing = [name for name, value in published.items() if depthwise.pop(name).shape != value.shape]
    assert not depthwise and differing == [f"S_Convs.{s}.conv.weight" for s in range(4)]
    assert make(groups="channel").S_Convs[3].conv.weight.shape == (12, 1, 7, 7)


def test_evaluation_writes_over_no_input_and_no_weight():
    ours = make().eval()
    x, _ = inputs()
    kept, state = x.clone(), {name: value.clone() for name, value in ours.state_dict().items()}
    expected = ours(x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        reset_net(ours)
        with mode():
            torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, kept)
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("shape", [(3, 1), (2, 5, 7), (4, 2, 8, 3)])
def test_spikes_are_packed_to_bits_and_back(shape):
    spikes = (torch.rand(shape) < 0.4).float()
    bits = pack(spikes)
    assert bits.dtype == torch.uint8 and bits.shape == (shape[0], -(-spikes[0].numel() // 8))
    assert all(torch.equal(unpack(packed, step), step) for packed, step in zip(bits, spikes, strict=True))


def test_a_whole_network_is_its_direct_form():
    torch.manual_seed(0)
    net = sma_vgg8_dvs128(T=4, width=0.125, RCR=4, RTR=2).double()
    direct = as_direct(net)
    x = torch.rand(4, 2, 2, 40, 40, dtype=torch.float64)
    grads = []
    for one in (net, direct):
        torch.manual_seed(1)  # dropout
        one(x).pow(2).sum().backward()
        reset_net(one)
        grads.append({name: p.grad for name, p in one.named_parameters()})
    assert_equal(*grads, 1e-9)
    net.eval(), direct.eval()
    torch.testing.assert_close(net(x), direct(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", [pytest.param(lif, marks=pytest.mark.slow), "relu"], ids=["lif", "relu"])
def test_it_compiles_to_one_graph_in_both_modes(activation):
    keywords = {"time": 2, "kernels": [1, 3], "activation": activation, "AZO": True, "RCR": 2, "RTR": 1}
    eager, compiled = make(**keywords), make(**keywords)
    torch._dynamo.reset()
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    x, weights = inputs()
    for training in (True, False):
        results = []
        for sma, function in ((eager.train(training), eager), (compiled.train(training), run)):
            given = x[:2].clone().requires_grad_(training)
            output = function(given)
            if training:
                (output * weights[:2]).sum().backward()
            results.append([output, given.grad, *(p.grad for p in sma.parameters())][: None if training else 1])
            reset_net(sma)
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_whole_network_compiles_without_a_break():
    net = sma_vgg8_dvs128(T=2, width=0.125, sma_blocks=[3], kernels=[1, 3], T_reduction=2, RCR=4, RTR=2)
    torch._dynamo.reset()
    found = torch._dynamo.explain(net)(torch.rand(2, 1, 2, 32, 32))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


FORMS = [lif, "lif", "relu"]
FORM_NAMES = ["lif of models", "lif of sma.py", "relu"]


@pytest.mark.parametrize("activation", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_gradients_can_be_differentiated_again(activation, training, recompute):
    """A penalty on the gradients of the input and of all parameters, twice through one graph."""
    ours = make(activation=activation, AZO=True, RCR=2, RTR=2, recompute=recompute).train(training)
    results = []
    for sma in (ours, as_direct(ours)):
        x, weights = (one[:, :1] for one in inputs())
        x = x.clone().requires_grad_()
        gradients = torch.autograd.grad((sma(x) * weights).sum(), [x, *sma.parameters()], create_graph=True)
        penalty = sum(g.pow(2).sum() for g in gradients)
        results.append([*gradients, *torch.autograd.grad(penalty, [x, *sma.parameters()], allow_unused=True)])
    assert results[0][len(results[0]) // 2].abs().sum() > 0
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_a_gradient_that_was_not_kept_for_it_says_what_to_do():
    ours = make(kernels=[1, 3])
    ours.S_Convs[0].lif.register_forward_hook(lambda *_: None)  # a watched branch runs module by module
    x = inputs()[0].requires_grad_()
    with pytest.raises(RuntimeError, match="fast=False"):
        torch.autograd.grad(ours(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("activation", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_it_can_be_traced_and_saved(activation, training, tmp_path):
    sma = make(kernels=[1, 3], activation=activation, AZO=True, RCR=2, RTR=2).train(training)
    x = inputs()[0]
    torch.jit.save(torch.jit.trace(sma, x, check_trace=False), tmp_path / "sma.pt")
    reset_net(sma)
    other = x.flip(0)
    torch.testing.assert_close(torch.jit.load(tmp_path / "sma.pt")(other), sma(other), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_torch_func_gives_the_gradients_of_autograd(activation, training):
    sma = make(kernels=[1, 3], activation=activation, AZO=True, RCR=2, RTR=2).train(training)
    x, weights = inputs(batch=1)
    parameters, buffers = dict(sma.named_parameters()), dict(sma.named_buffers())

    def loss(parameters, x):
        # A BatchNorm in training writes into its buffers: they are inputs, as torch.func wants it.
        state = {**parameters, **{name: value.clone() for name, value in buffers.items()}}
        output = torch.func.functional_call(sma, state, (x,))
        reset_net(sma)
        return (output * weights).sum()

    found, of_x = torch.func.grad(loss, argnums=(0, 1))(parameters, x)
    expected = a_pass(sma, x, weights)
    reset_net(sma)
    assert_equal({**found, "x": of_x}, {name: expected[name] for name in (*parameters, "x")}, 1e-10)
    _, slope = torch.func.jvp(lambda x: loss(parameters, x), (x,), (weights,))
    torch.testing.assert_close(slope, (expected["x"] * weights).sum(), rtol=1e-8, atol=1e-8)
    if not training:  # a BatchNorm in training cannot be mapped over a batch of batches
        mapped = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, torch.stack([x + 1, x]))
        assert_equal({name: value[1] for name, value in mapped.items()}, found, 1e-10)


@pytest.mark.parametrize("activation", FORMS, ids=FORM_NAMES)
def test_a_forward_mode_derivative_goes_through(activation):
    sma = make(kernels=[1, 3], activation=activation).eval()
    x, direction = inputs()
    expected = torch.autograd.functional.vjp(sma, x, direction)[1]
    reset_net(sma)
    with torch.autograd.forward_ad.dual_level():
        output = sma(torch.autograd.forward_ad.make_dual(x, direction))
        slope = torch.autograd.forward_ad.unpack_dual(output).tangent
    torch.testing.assert_close((slope * direction).sum(), (expected * direction).sum(), rtol=1e-8, atol=1e-8)


NETWORKS = [
    (lambda: sma_vgg8_dvs128(T=4, width=0.125, RCR=4, RTR=2, num_classes=3), (4, 1, 2, 32, 32)),
    (lambda: sma_ms_resnet18(T=2, width=0.125, num_classes=3), (1, 3, 32, 32)),
]


@pytest.mark.parametrize(("network", "shape"), NETWORKS, ids=["VGG8", "MS-ResNet"])
def test_a_whole_network_can_be_traced_and_its_gradient_taken_by_torch_func(network, shape, tmp_path):
    torch.manual_seed(0)
    net = network().double().eval()
    x, parameters = 3 * torch.rand(shape, dtype=torch.float64), dict(net.named_parameters())
    torch.jit.save(torch.jit.trace(net, x, check_trace=False), tmp_path / "net.pt")
    reset_net(net)

    def loss(parameters):
        output = torch.func.functional_call(net, parameters, (x,))
        reset_net(net)
        return output.pow(2).sum()

    output = net(x)
    output.pow(2).sum().backward()
    reset_net(net)
    torch.testing.assert_close(torch.jit.load(tmp_path / "net.pt")(x), output, rtol=1e-10, atol=1e-10)
    expected = {name: p.grad for name, p in parameters.items()}
    assert_equal(torch.func.grad(loss)(parameters), expected, 1e-6)  # MS-ResNet rounds gradients to float32
    assert expected["conv1.0.weight" if "conv1.0.weight" in expected else "block1.0.0.weight"].abs().sum() > 0


@pytest.mark.parametrize(("network", "shape"), NETWORKS, ids=["VGG8", "MS-ResNet"])
def test_a_gradient_of_a_whole_network_by_its_equations_can_be_differentiated_again(network, shape):
    torch.manual_seed(0)
    net = network().double()
    reference, x = equations_only(net), 3 * torch.rand(shape, dtype=torch.float64)
    gradients = []
    for one in (net, reference):
        torch.manual_seed(1)  # dropout
        of_parameters = torch.autograd.grad(one(x).pow(2).sum(), [*one.parameters()], create_graph=one is reference)
        gradients.append(torch.cat([gradient.flatten() for gradient in of_parameters]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()
    gradients[1].pow(2).sum().backward()
    assert sum(p.grad.norm() for p in reference.parameters() if p.grad is not None) > 0


def test_a_copy_runs_the_equations_and_the_network_stays_as_it_was():
    net = sma_vgg8_dvs128(T=4, width=0.125, RCR=4, RTR=2, recompute=True)
    copy = equations_only(net)
    assert [net.block2[1].fast, copy.block2[1].fast, copy.block3[1].fast] == [True, False, False]
    assert net.block2[1].recompute
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in copy.state_dict().items())


@pytest.mark.parametrize("activation", FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_nothing_is_asked_of_tensors_that_have_no_values(activation, recompute):
    """As on a GPU, where a question to a tensor waits for all the work before it. A fake tensor cannot answer."""
    with FakeTensorMode():
        sma = SMA(**SMALL, activation=activation, AZO=True, RCR=2, RTR=2, recompute=recompute)
        x = torch.empty(8, 3, 12, 5, 7, requires_grad=True)
        output = sma(x)
        output.sum().backward()
    assert output.shape == x.grad.shape == x.shape
    assert all(p.grad.shape == p.shape for p in sma.parameters())


def test_a_forward_pass_on_a_gpu_that_is_not_there():
    """Devices never mix, and nothing is asked of the host."""
    with FakeTensorMode(), torch.device("cuda"):
        output = SMA(**SMALL, activation="relu", AZO=True, RCR=2, RTR=2)(torch.empty(8, 3, 12, 5, 7))
    assert output.device.type == "cuda" and output.shape == (8, 3, 12, 5, 7)

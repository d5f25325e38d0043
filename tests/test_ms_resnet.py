"""MS-ResNet: its equation, its forms, and what must not change the result."""

import copy

import pytest
import torch

from models import MSResNet, ms_resnet18, ms_resnet104, neurons, sma_ms_resnet18, sma_ms_resnet34, sma_ms_resnet104
from models.ms_resnet import BatchNorm, MSBlock
from models.sma import SMA
from tests.direct import PublishedNeuron, as_direct

SMALL = {"width": 0.125, "num_classes": 5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_spikingjelly", [False, True], ids=["our loop", "SpikingJelly's loop"])
def test_the_neuron_follows_its_equation(dtype, by_spikingjelly):
    """Ours has float32 potentials, whatever the input; SpikingJelly's has those of the input."""
    torch.manual_seed(0)
    x = torch.randn(6, 3, 4, 5, 5).to(dtype)
    weights = torch.randn_like(x)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    node = neurons.ms_lif()
    node.store_v_seq = by_spikingjelly
    outputs = [PublishedNeuron()(inputs[0] if by_spikingjelly else inputs[0].float()).to(dtype), node(inputs[1])]
    assert 0.2 < outputs[0].float().mean() < 0.6
    assert torch.equal(*outputs)
    for output in outputs:
        (output * weights).sum().backward()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=tolerance, atol=tolerance)


def test_the_baseline_of_the_benchmark_is_the_same_network():
    torch.manual_seed(0)
    net = sma_ms_resnet18(T=2, **SMALL)
    baseline = as_direct(net)
    assert not any(hasattr(module, "v_threshold") for module in baseline.modules())
    x = torch.randn(2, 3, 32, 32)
    logits = [net(x), baseline(x)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    for output in logits:
        output.pow(2).sum().backward()
    gradients = [network.conv1[0].weight.grad for network in (net, baseline)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_the_surrogate_is_a_window_of_width_and_height_1():
    x = torch.tensor([-0.75, -0.5, -0.499, 0.0, 0.499, 0.5, 0.75], requires_grad=True)
    y = neurons.Rectangle()(x)
    y.sum().backward()
    assert y.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 0, 0]


@pytest.mark.skipif(not neurons._has_backends(), reason="SpikingJelly 2.x has no CuPy code")
def test_the_window_as_a_line_of_cuda():
    code = neurons.Rectangle.cuda_codes(y="const float g", x="over_th", dtype="float")
    assert code == "const float g = (float) ((0.5f) > (fabsf(over_th)));"
    code = neurons.Rectangle.cuda_codes(y="const half2 g", x="over_th", dtype="half2")
    assert code == "const half2 g = __hgtu2((__float2half2_rn(0.5f)), (__habs2(over_th)));"


def test_batch_norm_has_one_mean_a_channel_over_time_batch_and_space():
    torch.manual_seed(0)
    x = 3 * torch.randn(4, 2, 3, 5, 5) + torch.arange(3.0)[:, None, None]
    y = BatchNorm(3, scale=0.5)(x)
    expected = (x - x.mean((0, 1, 3, 4), keepdim=True)) / (
        x.var((0, 1, 3, 4), unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    torch.testing.assert_close(y, 0.5 * expected)


def test_sync_batch_norm_reaches_every_batch_norm_and_keeps_the_names():
    net = sma_ms_resnet18(**SMALL)
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    assert list(converted.state_dict()) == list(net.state_dict())
    plain = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    synced = [m for m in converted.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert len(synced) == len(plain) == 1 + 8 * (2 + 4) + 4
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in converted.modules())
    seen = []
    for module in synced:
        module.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0].ndim, inputs[0].shape[1])))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(converted.eval()(x), net.eval()(x))
    assert set(seen) == {(4, 8), (4, 16), (4, 32), (4, 64)}  # the second axis is the channel for SyncBatchNorm


def test_initial_scales_of_batch_norm():
    net = sma_ms_resnet18(**SMALL)
    block = net.conv3_x[0]
    scales = {
        0.5: [net.conv1[1], block.residual_function[3], block.shortcut[1]],
        0.0: [block.residual_function[6]],
        1.0: [branch.bn for branch in block.residual_function[2].S_Convs],
    }
    for scale, layers in scales.items():
        assert all(torch.all(layer.bn.weight == scale) for layer in layers)


@pytest.mark.parametrize("factory", [sma_ms_resnet18, sma_ms_resnet104])
def test_an_image_is_the_input_of_every_step(factory):
    torch.manual_seed(0)
    net = factory(T=4, **SMALL).double()
    for module in net.modules():
        if isinstance(module, BatchNorm):
            torch.nn.init.uniform_(module.bn.weight, 1.0, 2.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    results, before = [], copy.deepcopy(net.state_dict())
    for x in (image, image.expand(4, -1, -1, -1, -1).contiguous()):
        net.zero_grad()
        logits = net(x)
        logits.pow(2).sum().backward()
        neurons.reset_net(net)
        gradients = net.conv1[0].weight.grad.clone(), net.conv2_x[0].shortcut[-2].weight.grad
        statistics = [value for name, value in net.state_dict().items() if "running_" in name]
        results.append((logits.detach(), *gradients, *statistics))
        net.load_state_dict(before)
    assert results[0][1].abs().max() > 0
    torch.testing.assert_close(results[0], results[1], rtol=1e-7, atol=1e-10)


def test_under_autocast_only_products_run_in_half_precision():
    net = sma_ms_resnet18(**SMALL, AZO=True)
    dtypes = {}

    def note(module, inputs, output):
        kind = type(module).__name__
        dtypes.setdefault(kind, set()).update({inputs[0].dtype, output.dtype})
        if hasattr(module, "v"):
            dtypes.setdefault("potential", set()).add(module.v.dtype)

    kinds = (MSBlock, BatchNorm, SMA, type(neurons.ms_lif()))
    inside = {m for sma in net.modules() if isinstance(sma, SMA) for m in sma.modules() if m is not sma}
    for module in net.modules():
        if module not in inside and (not list(module.children()) or isinstance(module, kinds)):
            module.register_forward_hook(note)
    products = []
    for branch in inside:
        if isinstance(branch, torch.nn.Conv2d):
            branch.register_forward_hook(lambda _, __, output: products.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(torch.randn(2, 3, 64, 64)).sum().backward()
    assert dtypes.pop("Linear") == {torch.float32, torch.bfloat16}
    assert set(dtypes) >= {"potential", "MSBlock", "BatchNorm", "SMA", "_Conv2d"}
    assert set.union(*dtypes.values()) == {torch.float32}, dtypes
    assert set(products) == {torch.bfloat16}


def test_identical_frames_are_convolved_once():
    net = ms_resnet18(T=6, **SMALL).eval()
    shapes = {}
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, __, name=name: shapes.update({name: inputs[0].shape[0]}))
    with torch.no_grad():
        net(torch.randn(2, 3, 32, 32))
    once = {name for name, steps in shapes.items() if steps == 1}
    assert once == {"conv1.0", "conv2_x.0.shortcut.0"}
    assert all(steps == 6 for name, steps in shapes.items() if name not in once)


@pytest.mark.parametrize("factory", [ms_resnet18, ms_resnet104])
def test_every_stage_halves_the_image(factory):
    net = factory(T=1, **SMALL).eval()
    sizes = []
    for stage in (net.conv1, net.conv2_x, net.conv3_x, net.conv4_x, net.conv5_x):
        stage.register_forward_hook(lambda _, __, out: sizes.append(out.shape[-1]))
    with torch.no_grad():
        net(torch.randn(1, 3, 224, 224))
        assert sizes == [112, 56, 28, 14, 7]
        neurons.reset_net(net)
        assert net(torch.randn(1, 3, 45, 75)).shape == (1, 5)  # odd sizes all the way


@pytest.mark.parametrize(
    ("factory", "places", "expected"),
    [
        (sma_ms_resnet34, "first-two", [2, 2, 2, 2]),
        (sma_ms_resnet34, "all", [3, 4, 6, 3]),
        (sma_ms_resnet34, "none", [0, 0, 0, 0]),
        (sma_ms_resnet104, "first-two", [2, 2, 2, 2]),
    ],
)
def test_blocks_with_sma(factory, places, expected):
    net = factory(sma_blocks=places, **SMALL)
    stages = (net.conv2_x, net.conv3_x, net.conv4_x, net.conv5_x)
    with_sma = [[any(isinstance(m, SMA) for m in block.modules()) for block in stage] for stage in stages]
    assert [sum(stage) for stage in with_sma] == expected
    assert all(stage == sorted(stage, reverse=True) for stage in with_sma)  # the first ones


def test_sma_keywords_reach_the_blocks():
    sma = sma_ms_resnet18().conv5_x[1].residual_function[2]
    assert (sma.channel, sma.time, sma.AZO, sma.RCR, sma.RTR) == (512, 6, False, 4, 2)
    assert sma.T_before_attention_conv.weight.shape[0] == 4 and sma.C_before_attention_conv.weight.shape[0] == 128
    sma = sma_ms_resnet18(T=4, AZO=True, RCR=2, RTR=4, **SMALL).conv2_x[0].residual_function[2]
    assert (sma.time, sma.AZO, sma.RCR, sma.RTR) == (4, True, 2, 4)


def test_azo_acts_in_training_only():
    torch.manual_seed(0)
    net = sma_ms_resnet18(T=4, AZO=True, **SMALL)
    for module in net.modules():
        if isinstance(module, BatchNorm):
            torch.nn.init.uniform_(module.bn.weight, 1.0, 2.0)
    plain = sma_ms_resnet18(T=4, **SMALL)
    plain.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 64, 64)

    def logits(net):
        neurons.reset_net(net)
        with torch.no_grad():
            return net(x)

    assert not torch.equal(logits(net.train()), logits(plain.train()))
    plain.load_state_dict(net.state_dict())  # the running statistics have moved apart
    assert torch.equal(logits(net.eval()), logits(plain.eval()))


def test_the_block_is_an_argument():
    class Counted(MSBlock):
        pass

    net = MSResNet([1, 1, 1, 1], block=Counted, T=2, **SMALL)
    assert sum(isinstance(m, Counted) for m in net.modules()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"T": 0}, "T=0 must be a whole number of at least 1"),
        ({"T": 1}, "T_reduction=1.5 leaves no unit for time=1"),
        ({"num_classes": 2.5}, "num_classes=2.5 must be a whole number"),
        ({"sma_blocks": "some"}, "sma_blocks='some' must be one of first-two, all, none"),
        ({"width": 0}, "width=0 must be above 0"),
        ({"AZO": True, "RTR": 9}, "RTR=9 leaves AZO no step of time=6"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sma_ms_resnet18(**{**SMALL, **arguments})


@pytest.mark.parametrize("shape", [(1, 3, 16, 64), (1, 1, 64, 64), (5, 1, 3, 64, 64), (3, 64, 64)])
def test_a_wrong_input_is_named(shape):
    with pytest.raises(ValueError, match=r"takes \[B, 3, H, W\] or \[T=4, B, 3, H, W\].* at least 32 and got"):
        ms_resnet18(T=4, **SMALL)(torch.zeros(shape))

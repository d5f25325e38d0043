"""The network for evaluation: BatchNorm inside the convolutions, the same function, the original untouched."""

import pytest
import torch
from torch import nn

from models import folded, sma_ms_resnet18, sma_vgg8_dvs128
from models.neurons import reset_net
from utils.engine import evaluate
from utils.losses import mse_of_mean

EVENTS = {"T": 4, "width": 0.125, "AZO": False}
IMAGES = {"T": 2, "width": 0.125, "num_classes": 7}


def networks():
    yield sma_vgg8_dvs128(**EVENTS), torch.rand(4, 3, 2, 36, 44), 3  # the BatchNorms of blocks 1, 4 and 5
    yield sma_vgg8_dvs128(**EVENTS, branch_activation="relu"), torch.rand(4, 3, 2, 36, 44), 3 + 8
    yield sma_ms_resnet18(**IMAGES), torch.randn(3, 3, 40, 40), 1 + 8 * 4 + 8 + 4  # stem, branches, second, shortcuts
    yield sma_ms_resnet18(**IMAGES, pool_shortcut=True, deep_stem=True), torch.randn(2, 2, 3, 33, 47), 1 + 8 * 4 + 8 + 4


def with_random_statistics(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.2, 2.0)
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.uniform_(module.bias, -0.2, 0.8)
    return net.double().eval()


@pytest.mark.parametrize("number", range(4), ids=["VGG8", "VGG8 with ReLU", "ResNet-18", "ResNet-18, other form"])
def test_it_is_the_same_function(number):
    torch.manual_seed(0)
    net, x, expected = list(networks())[number]
    with_random_statistics(net)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    copy = folded(net)
    count = [sum(isinstance(m, nn.BatchNorm2d) for m in one.modules()) for one in (net, copy)]
    assert count[0] - count[1] == expected
    with torch.inference_mode():
        logits = net(x.double())
        assert logits.std() > 1e-3
        torch.testing.assert_close(copy(x.double()), logits, rtol=1e-12, atol=1e-12)
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_the_original_goes_on_training_and_the_next_copy_follows():
    torch.manual_seed(0)
    net = with_random_statistics(sma_vgg8_dvs128(**EVENTS))
    before = folded(net)
    x = torch.rand(4, 2, 2, 32, 32, dtype=torch.float64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net.train()(x).pow(2).sum().backward()
    optimizer.step()
    reset_net(net)
    with torch.no_grad():
        expected = net.eval()(x)
        torch.testing.assert_close(folded(net)(x), expected, rtol=1e-12, atol=1e-12)
    reset_net(net)
    assert not torch.equal(before.block1[0][0].weight, folded(net).block1[0][0].weight)


def test_a_network_that_is_watched_is_not_folded():
    net = sma_vgg8_dvs128(**EVENTS)
    handle = net.block4[1].register_forward_hook(lambda *_: None)
    assert folded(net) is net
    handle.remove()
    assert folded(net) is not net


def test_an_observer_sees_the_folded_network():
    class Watcher:
        def __init__(self):
            self.calls = 0

        def __call__(self, *_):
            self.calls += 1

    net = sma_vgg8_dvs128(**EVENTS)
    net.block2[1].observer = watcher = Watcher()
    copy = folded(net)
    assert copy is not net
    copy(torch.rand(4, 2, 2, 32, 32, dtype=next(net.parameters()).dtype))
    assert watcher.calls == 1


def test_evaluation_is_that_of_the_network():
    torch.manual_seed(0)
    net = with_random_statistics(sma_vgg8_dvs128(**EVENTS))
    frames, labels = torch.rand(5, 4, 2, 32, 32, dtype=torch.float64), torch.arange(5)
    with torch.no_grad():
        expected = mse_of_mean(net(frames.transpose(0, 1)), labels)
    reset_net(net)
    result = evaluate(net, [(frames, labels)], mse_of_mean, torch.device("cpu"))
    assert result["loss"] == pytest.approx(expected.item(), rel=1e-6) and result["count"] == 5
    assert all(not torch.is_tensor(m.v) for m in net.modules() if hasattr(m, "v_threshold"))

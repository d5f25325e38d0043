"""The branch convolutions by one shared transform: the same function as direct convolutions, and its gradients."""

import pytest
import torch
from torch.nn import functional as F

from models import SMA_L
from models.fast import transforms
from models.fast.convolution import applies, branch_convolutions
from tests.direct import as_direct
from tests.test_fused_sma import a_pass, assert_equal, make
from tests.test_fused_sma import inputs as sma_inputs

# One tile and several, odd sizes, other heights than widths, maps smaller than the kernels.
SIZES = [(8, 8), (17, 9), (40, 33), (5, 50), (2, 2), (1, 7)]


def direct(x, weights, biases):
    return tuple(F.conv2d(x, w, b, padding=w.shape[-1] // 2) for w, b in zip(weights, biases, strict=True))


def inputs(size, kernels=(1, 3, 5, 7), n=2, channels=3, outputs=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()  # noqa: E731
    x = random(n, channels, *size)
    weights = [random(outputs, channels, k, k) for k in kernels]
    return x, weights, [random(outputs) for _ in kernels]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernels", [(1, 3, 5, 7), (3,), (9, 5), (1, 3)])
def test_values_and_gradients_are_those_of_direct_convolutions(size, kernels):
    x, weights, biases = inputs(size, kernels)
    expected, found = direct(x, weights, biases), branch_convolutions(x, weights, biases)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in expected]
    expected += torch.autograd.grad(expected, [x, *weights, *biases], grads)
    found += torch.autograd.grad(found, [x, *weights, *biases], grads)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [(5, 3), (3, 18)])
def test_gradients_are_those_of_finite_differences(size):
    x, weights, biases = inputs(size, (1, 3, 5), n=1, channels=2, outputs=2)
    torch.autograd.gradcheck(lambda x, *p: branch_convolutions(x, p[:3], p[3:]), (x, *weights, *biases))


def test_gradients_of_gradients_are_those_of_finite_differences():
    x, weights, _ = inputs((4, 3), (3,), n=1, channels=1, outputs=2)
    torch.autograd.gradgradcheck(lambda x, w: branch_convolutions(x, [w], [None]), (x, *weights))


def test_float32_is_as_exact_as_direct_convolutions():
    x, weights, biases = inputs((32, 32), (3, 7), n=4, channels=32, outputs=32)
    arguments = [x, *weights, *biases]
    grads = [torch.ones(4, 32, 32, 32, dtype=torch.float64).bernoulli_() for _ in weights]

    def errors(convolutions):
        single = [a.detach().float().requires_grad_() for a in arguments]
        y = convolutions(single[0], single[1:3], single[3:])
        results = [*y, *torch.autograd.grad(y, single, [g.float() for g in grads])]
        return [((r - e).norm() / e.norm()).item() for r, e in zip(results, exact, strict=True)]

    y = direct(x, weights, biases)
    exact = [*y, *torch.autograd.grad(y, arguments, grads)]
    for found, usual in zip(errors(branch_convolutions), errors(direct), strict=True):
        assert found < max(2 * usual, 1e-6)


def test_gradients_that_nothing_asks_for_are_left_out():
    x, weights, biases = inputs((8, 8))
    biases[1] = None
    _, y, _, z = branch_convolutions(x.detach(), weights, biases)
    (y + z).sum().backward()
    assert x.grad is None and weights[2].grad is None and weights[0].grad is None
    _, y, _, z = direct(x.detach(), weights, biases)
    expected = torch.autograd.grad((y + z).sum(), [weights[1], weights[3], biases[3]])
    for parameter, grad in zip((weights[1], weights[3], biases[3]), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def results_of(x, weights, biases):
    y = branch_convolutions(x, weights, biases)
    return [*y, *torch.autograd.grad(y, [x, *weights, *biases], [torch.cos(one.detach()) for one in y])]


@pytest.mark.parametrize("size", [(40, 24), (16, 16)])
def test_the_result_does_not_depend_on_the_run_or_on_the_number_of_threads(size):
    arguments = inputs(size, (3, 5, 7), n=12, channels=16, outputs=16, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(results_of(*arguments))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (64, 64)])
def test_a_sample_does_not_depend_on_the_rest_of_the_batch(size):
    x, weights, biases = inputs(size, (3, 5, 7), n=20, channels=64, outputs=64, dtype=torch.float32)
    with torch.no_grad():
        together = branch_convolutions(x, weights, biases)
        for start, stop in ((0, 4), (3, 10), (12, 16)):
            alone = branch_convolutions(x[start:stop], weights, biases)
            assert all(torch.equal(one, all_[start:stop]) for one, all_ in zip(alone, together, strict=True))


def test_evaluations_follow_the_weights_and_give_what_training_gives():
    x, weights, biases = inputs((20, 20), n=8, dtype=torch.float32)
    for factor in (1.0, 1.0, 2.0):
        for weight in weights:
            weight.data *= factor  # of which nobody is informed
        with torch.inference_mode():
            evaluated = branch_convolutions(x, weights, biases)
        with torch.no_grad():
            again = branch_convolutions(x[:5], weights, biases)
        trained = branch_convolutions(x, weights, biases)
        for one, other, third in zip(evaluated, again, trained, strict=True):
            assert torch.equal(one, third) and torch.equal(other, third[:5])


def test_what_evaluations_hold_has_a_limit_and_is_given_back(monkeypatch):
    def held():
        transforms.held.clear()
        x, weights, biases = inputs((20, 20), (3, 5), n=4, dtype=torch.float32)
        with torch.no_grad():
            branch_convolutions(x, weights, biases)
        count = len(transforms.held)
        branch_convolutions(x, weights, biases)
        return count, len(transforms.held)

    assert held() == (2, 0)
    monkeypatch.setattr(transforms, "MOST_HELD", 0)
    assert held() == (0, 0)


@pytest.mark.parametrize(
    "keywords", [{"AZO": True}, {"activation": "relu"}, {"recompute": True}, {"cls": SMA_L}], ids=str
)
def test_sma_is_the_direct_form(keywords, monkeypatch):
    monkeypatch.setenv("SMA_CONVOLUTIONS", "shared")
    ours = make(**keywords)
    x, weights = sma_inputs(19, 7, 2)
    assert_equal(a_pass(ours, x, weights), a_pass(as_direct(make(**keywords)), x, weights), 1e-10)


def test_what_is_too_small_or_not_computed_here_goes_to_direct_convolutions(monkeypatch):
    large, small = torch.zeros(4, 64, 32, 32), torch.zeros(4, 64, 8, 8)
    weights = [torch.zeros(64, 64, k, k) for k in (1, 3, 5, 7)]
    assert applies(large, weights, 4) and not applies(small, weights, 4)
    assert applies(large.repeat(3, 1, 1, 1), weights, 4) and not applies(small.repeat(99, 1, 1, 1), weights, 4)
    assert not applies(large.half(), [w.half() for w in weights], 4)
    assert not applies(large.double(), [w.double() for w in weights], 4)
    assert not applies(large.to("meta"), weights, 4)
    assert not applies(large, [w[:, :1] for w in weights], 4), "depthwise"
    assert not applies(large, weights[:1], 4), "a plain product"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not applies(large, weights, 4)
    monkeypatch.setenv("SMA_CONVOLUTIONS", "shared")
    assert applies(small, weights, 4) and applies(small.double(), [w.double() for w in weights], 4)
    assert not applies(large.half(), [w.half() for w in weights], 4)
    monkeypatch.setenv("SMA_CONVOLUTIONS", "direct")
    assert not applies(large, weights, 4)

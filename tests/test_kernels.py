"""SMA's Triton kernels against the same functions in PyTorch: on a GPU, or in Triton's interpreter (conftest.py)."""

import subprocess
import sys
import warnings

import pytest
import torch

from models import SMA, SMA_L
from models.fast import has_kernels, loops, passes
from models.neurons import lif
from tests.conftest import ROOT
from tests.direct import as_direct
from tests.test_fused_sma import a_pass, assert_equal, make

pytest.importorskip("triton", reason="Triton is not installed")
from models.fast import kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Shape and layout: odd sizes, a single value, more channels and more pixels than a tile has.
CASES = [
    ((3, 2, 5, 6, 7), "contiguous"),
    ((3, 2, 5, 6, 7), "channels-last"),
    ((1, 1, 1, 1, 1), "contiguous"),
    ((2, 1, 66, 3, 3), "channels-last"),
    ((2, 1, 2, 37, 41), "contiguous"),
]


def laid_out(x, layout):
    if layout == "contiguous":
        return x.contiguous()
    return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
@pytest.mark.parametrize("carried", [False, True], ids=["from rest", "from a potential"])
def test_neurons_and_their_gradients(shape, layout, carried):
    y = laid_out(2 * random(*shape), layout)
    scale, shift = 1 + 0.1 * random(shape[2], 1, 1, seed=1), 0.3 * random(shape[2], 1, 1, seed=2)
    v = laid_out(random(*shape, seed=3), layout)[0] if carried else None
    grads = [random(*shape, seed=4), random(*shape[:3], seed=5), random(*shape[1:], seed=6) if carried else None]
    results = []
    for fire, backward in ((loops.fire, loops.fire_backward), (kernels.fire, kernels.fire_backward)):
        spikes = torch.empty_like(y)
        means, last = fire(y, scale, shift, v, 0.5, 1.0, spikes)
        for given in ([*grads], [grads[0], None, None], [None, grads[1], None]):
            results.append((spikes, means, last, *backward(y, scale, shift, v, *given, 0.5, 0.25, 1.0, 2.0)))
    assert 0 < results[0][0].mean() < 1 or y.numel() == 1
    for expected, found in zip(results[:3], results[3:], strict=True):
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)
        assert found[3].stride() == y.stride()


def test_spikes_may_take_the_memory_of_the_input():
    y = 2 * random(4, 2, 3, 5, 5)
    one = torch.ones(3, 1, 1, device=DEVICE, dtype=torch.float64)
    expected = torch.empty_like(y)
    loops.fire(y, one, 0 * one, None, 0.5, 1.0, expected)
    kernels.fire(y, one, 0 * one, None, 0.5, 1.0, y)
    assert torch.equal(y, expected)


@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
@pytest.mark.parametrize("are_spikes", [True, False], ids=["spikes", "real features"])
@pytest.mark.parametrize("zoneout", [True, False], ids=["AZO", "no AZO"])
def test_weighted_sum_and_its_gradients(shape, layout, are_spikes, zoneout):
    T, B, C = shape[:3]
    scales = kernels.most_scales if are_spikes else 3
    features = [laid_out(random(*shape, seed=s), layout) for s in range(scales)]
    if are_spikes:
        features = [(f > 0).to(f.dtype) for f in features]
    replaced = random(scales, T, C, seed=20) > 0 if zoneout else None
    if zoneout:
        replaced[:, 0] = False
    current, previous = random(scales, T, B, C, seed=21), None
    if zoneout:
        previous = torch.zeros_like(current)
        previous[:, 1:] = current[:, :-1] * replaced[:, 1:, None]
        current = current * ~replaced[:, :, None]
    shares = current, previous
    grad = random(*shape, seed=22)
    expected, kept = loops.weighted_sum(features, *shares, are_spikes)
    found, in_kernels = kernels.weighted_sum(features, *shares, are_spikes)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert len(in_kernels) == 1 and in_kernels[0].dtype == torch.uint8 if are_spikes else len(in_kernels) == scales
    expected = loops.weighted_sum_backward(grad, *shares, are_spikes, kept, torch.float64)
    found = kernels.weighted_sum_backward(grad, *shares, are_spikes, in_kernels, torch.float64)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    if zoneout:
        where = replaced[:, :, None]
        torch.testing.assert_close(found[1] * where, expected[1] * where, rtol=1e-12, atol=1e-12)
    for one, other in zip(expected[2], found[2], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)
        assert other.stride() == features[0].stride()


@pytest.fixture
def in_kernels(monkeypatch):
    """Every pass of SMA in the kernels, also on a CPU, which runs them in Triton's interpreter."""

    def implementation(_, scales=1):
        return kernels if scales <= kernels.most_scales else loops

    monkeypatch.setattr(passes, "implementation", implementation)


SMALL = {"channel": 4, "time": 4, "kernels": [1, 3], "AZO": True, "RCR": 2, "RTR": 2}


@pytest.mark.parametrize(
    ("cls", "activation", "training"),
    [(SMA, lif, True), (SMA, lif, False), (SMA, "relu", True), (SMA_L, lif, True)],
    ids=["training", "evaluation", "relu", "SMA-L"],
)
def test_the_module_in_kernels_is_the_direct_form(in_kernels, cls, activation, training):
    """Two calls without a reset between them, and the state that they leave behind."""
    ours = make(cls, activation=activation, **SMALL).to(DEVICE).train(training)
    direct = as_direct(ours)
    x, weights = random(4, 2, 4, 3, 5), random(4, 2, 4, 3, 5, seed=1)
    for call in range(2):
        found, expected = a_pass(ours, x + call, weights), a_pass(direct, x + call, weights)
        assert_equal(found, expected, 1e-10)
        for module in (ours, direct):
            for branch in module.S_Convs:
                if activation != "relu":
                    branch.lif.v = branch.lif.v.detach()
    assert_equal(ours.state_dict(), direct.state_dict(), 1e-12)


def test_half_precision_is_near_float32_and_spikes_stay_half(in_kernels):
    y = (2 * random(4, 2, 6, 5, 5)).float()
    one = torch.ones(6, 1, 1, device=DEVICE)
    halves = [torch.empty_like(y).to(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    means = [kernels.fire(y.to(h.dtype), one, 0 * one, None, 0.5, 1.0, h)[0] for h in halves]
    assert [m.dtype for m in means] == [torch.float32] * 3
    for spikes, mean in zip(halves[1:], means[1:], strict=True):
        assert (spikes != halves[0]).float().mean() < 0.03  # a potential within a rounding of the threshold
        torch.testing.assert_close(spikes.float().mean((-2, -1)), mean)
        out, (bits,) = kernels.weighted_sum([spikes, spikes], torch.full((2, 4, 2, 6), 0.25, device=DEVICE), None, True)
        assert (
            out.dtype == torch.float32 and torch.equal(out, spikes.float() / 2) and torch.equal(bits, 3 * spikes.byte())
        )


def test_more_scales_than_a_byte_has_bits(in_kernels):
    ours = make(**{**SMALL, "kernels": [1, 3, 1] * 3}).to(DEVICE)
    x, weights = random(4, 1, 4, 2, 3), random(4, 1, 4, 2, 3, seed=1)
    direct = as_direct(ours)
    assert_equal(a_pass(ours, x, weights), a_pass(direct, x, weights), 1e-10)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_are_compared_with_pytorch_before_they_are_used(dtype, channels_last):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert has_kernels(DEVICE, dtype, channels_last)


@pytest.mark.parametrize("channels_last", [False, True], ids=["raises", "computes nonsense"])
def test_kernels_that_do_not_work_are_left_out_with_a_warning(monkeypatch, channels_last):
    def broken(y, *_):
        if channels_last:
            return torch.zeros_like(y[..., 0, 0]), y[0]
        raise RuntimeError("no compiler")

    monkeypatch.setattr(kernels, "fire", broken)
    with pytest.warns(UserWarning, match="without its Triton kernels"):  # of types that no other test asks for
        assert not has_kernels(DEVICE, torch.float64, channels_last)
    assert not has_kernels(DEVICE, torch.float64, channels_last)  # without another warning


def test_a_moment_without_memory_does_not_leave_the_kernels_out_for_good(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    device = torch.device("cuda", 0) if DEVICE.type == "cuda" else torch.device("cpu", 0)
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(kernels, "fire", full)
        assert not has_kernels(device, torch.float32)
    assert has_kernels(device, torch.float32)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from models.fast import kernels

half, scales, real = "*fp16", 4, "*fp32"
sizes = dict.fromkeys(("B", "C", "P", "step", "of_b"), "i32")
layouts = [({"of_c": "i32"}, {"of_p": 1, "BLOCK_P": 512, "BLOCK_C": 1}),
           ({"of_p": "i32"}, {"of_c": 1, "BLOCK_P": 8, "BLOCK_C": 64})]
state = {"y": half, "scale": real, "shift": real, "first": real}
leak = {"decay": 0.5, "threshold": 1.0, "has_first": True}
gradients = {"grad_spikes": half, "grad_means": real, "grad_last": real, "grad": half, "grad_first": real}
of_gradients = {"input_scale": 0.5, "alpha": 2.0, "has_spikes": True, "has_means": True, "has_last": True}
weights, form = {"current": real, "previous": real}, {"has_previous": True, "are_spikes": True}
sums = {"current_sums": real, "previous_sums": real, "parts": "i32", "in_a_part": "i32"}
tasks = [
    (kernels._fire, {**state, "spikes": half, "counts": real, "last": real}, leak),
    (kernels._fire_backward, {**state, **gradients}, {**leak, **of_gradients}),
    (kernels._weighted_sum, {"features": (half,) * scales, **weights, "out": real, "bits": "*u8"}, form),
    (kernels._weighted_sum_backward, {"grad": real, **weights, "kept": ("*u8",), "grads": (half,) * scales, **sums},
     form),
]
for kernel, tensors, constants in tasks:
    for integers, layout in layouts:
        values = {"T": 16, **layout, **constants}
        known = {**tensors, **sizes, **integers, **dict.fromkeys(values, "constexpr")}
        source = ASTSource(kernel, {name: known[name] for name in kernel.arg_names}, values)
        made = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
        print(len(made.asm["cubin"]) > 0, "acq_rel" in made.asm["ptx"])
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu_without_one(tmp_path):
    """To code of an H100, in both layouts, without a fence. A compiler refuses what the interpreter lets pass."""
    environment = {"PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True", "False"] * 8

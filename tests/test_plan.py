"""tools/plan.py: its memory is that of a measured step, and it reads the scripts' own flags."""

from pathlib import Path

import pytest
import torch

from models import sma_ms_resnet18, sma_vgg8_cifar10dvs, sma_vgg8_dvs128, sma_vgg8_ncaltech101
from models.neurons import reset_net
from tools._memory import step_of
from tools.plan import OPTIMIZERS, largest_batch, main, task_of
from utils.errors import exit_with_sentence

SMALL = {"T": 4, "width": 0.5}
# A network, its optimiser, and the input of so many samples.
NETS = {
    "dvs128": (lambda: sma_vgg8_dvs128(**SMALL), lambda b: (4, b, 2, 64, 64)),
    "cifar10dvs": (lambda: sma_vgg8_cifar10dvs(**SMALL), lambda b: (4, b, 2, 48, 48)),
    "ncaltech101": (lambda: sma_vgg8_ncaltech101(**SMALL), lambda b: (4, b, 2, 45, 60)),
    "imagenet": (lambda: sma_ms_resnet18(**SMALL), lambda b: (b, 3, 64, 64)),
}


def measured_peak(make, optimizer_of, shape, amp=None):
    """Bytes that torch's CPU allocator had given out at most, in the second step."""
    net = make().train()
    optimizer = optimizer_of(net.parameters())
    x = torch.zeros(shape).bernoulli_(0.1)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=amp or torch.bfloat16, enabled=amp is not None):
            y = net(x)
        y.float().pow(2).mean().backward()
        reset_net(net)
        optimizer.step()

    step()
    optimizer.zero_grad(set_to_none=True)
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    before = sum(tensor.nbytes for tensor in [*net.parameters(), *net.buffers(), *states, x])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return before + most


def check(name, samples):
    make, shape = NETS[name]
    planned = step_of(make, OPTIMIZERS[name], shape(samples), None, device="cpu").peak
    assert planned == pytest.approx(measured_peak(make, OPTIMIZERS[name], shape(samples)), rel=0.1)


def test_the_peak_is_that_of_a_measured_step():
    check("ncaltech101", 2)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 2, 4])
@pytest.mark.parametrize("name", NETS)
def test_the_peak_of_every_network_is_measured(name, samples):
    check(name, samples)


def test_parts_of_a_step_on_a_gpu():
    sizes = lambda: sma_vgg8_dvs128(T=4), OPTIMIZERS["dvs128"], (4, 16, 2, 64, 64), torch.float16
    kept, again = (step_of(*sizes, recompute=recompute) for recompute in (False, True))
    assert kept.weights == 4 * sum(p.numel() for p in sma_vgg8_dvs128(T=4).parameters())
    assert kept.optimizer == pytest.approx(2 * kept.weights, rel=1e-3)  # two moments of AdamW
    assert again.activations < 0.9 * kept.activations and again.operations > 1.2 * kept.operations


def test_operations_are_those_of_the_published_figure():
    """180 GMAC of one sample of DVS128 Gesture forward, nearly all in SMA; three times these in a step."""
    step = step_of(sma_vgg8_dvs128, OPTIMIZERS["dvs128"], (16, 1, 2, 128, 128), torch.float16)
    assert step.operations == pytest.approx(3 * 2 * 180e9, rel=0.1)


def test_the_largest_batch_is_on_the_line():
    peaks = {4: 140, 8: 180}  # 100 and 10 a sample
    assert [largest_batch(peaks, room) for room in (99, 109, 110, 119, 1000)] == [0, 0, 1, 1, 90]


def test_the_flags_are_the_script_s_own():
    task = task_of(Path("vgg8_NCaltech101_SMA.py"), ["-b", "6", "--amp", "bf16", "-T", "7", "--width", "0.25"], 4)
    assert (task.batch, task.amp, task.device, task.input) == (6, "bf16", "cuda", (7, 2, 180, 240))
    assert task.shape(6) == (7, 6, 2, 180, 240)
    task = task_of(Path("train_amp.py"), ["-b", "384", "--image-size", "64", "--width", "0.25"], 6)
    assert (task.batch, task.amp, task.shape(2)) == (64, "fp16", (2, 3, 64, 64))


@pytest.fixture
def plan(monkeypatch, capsys):
    """Run the tool in this process: exit code, standard output and standard error."""

    def run(*words):
        monkeypatch.setattr("sys.argv", ["plan.py", *words])
        code = 0
        try:
            exit_with_sentence(main)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_the_plan_in_words(plan):
    small = ["-T", "4", "--width", "0.25", "--frame-size", "32", "-b", "8"]
    code, out, _ = plan("vgg8_dvs128_SMA.py", *small, "--amp", "fp16", "--gpu-memory", "2", "--gpus", "2")
    assert code == 0
    for words in ("8 samples a process, 2 process(es), precision fp16", "73 steps", "| optimiser |", "recomputed"):
        assert words in out


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["nothing.py"], "there is no script nothing.py"),
        (["hubconf.py"], "hubconf.py is not a training script"),
        (["vgg8_dvs128_SMA.py", "--nonsense"], "--nonsense"),
        (["train_amp.py", "--gpus", "0"], "--gpus"),
    ],
)
def test_a_mistake_is_one_sentence(plan, command, sentence):
    code, _, err = plan(*command)
    assert code == 2 and sentence in err and "Traceback" not in err

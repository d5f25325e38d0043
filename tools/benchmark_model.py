"""The networks in tools/benchmark.py: all forms of one in alternating runs, and against its convolutions alone."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models import (
    SMA,
    ms_resnet18,
    ms_resnet34,
    ms_resnet104,
    sma_ms_resnet18,
    sma_ms_resnet34,
    sma_ms_resnet104,
    sma_vgg8_cifar10dvs,
    sma_vgg8_dvs128,
    sma_vgg8_ncaltech101,
)
from models.fast import equations_only
from models.neurons import lif, multi_dimensional_attention, reset_net, select_backend, temporal_wise_attention
from utils.data.images import to_channels_last
from utils.engine import AMP_DTYPES
from utils.errors import UserError, user_input

__all__ = ["FORMS", "SUBJECTS", "benchmark_model", "benchmark_scaling"]

MOST_SAMPLES = 4096
DIRECT_CONVOLUTIONS = "SMA, direct convolutions"
COMPILED = "SMA, compiled"
LAYERS_ALONE = "direct convolutions and linear layers alone"


@dataclass(frozen=True)
class Subject:
    """What is measured: how it is made, and the input of its recipe (batch: per process on a GPU)."""

    factory: Callable[..., nn.Module]
    T: int
    size: tuple[int, int]
    batch: int
    plain: Callable[..., nn.Module] | None = None  # the network of ImageNet without SMA


def _block(T: int, branch_groups: int | str = 1) -> nn.Module:
    return SMA(128, T, C_reduction=4, AZO=True, RCR=10, activation=lif, groups=branch_groups)


SUBJECTS = {
    "block": Subject(_block, 16, (64, 64), 9),  # the first SMA of the DVS128 network
    "dvs128": Subject(sma_vgg8_dvs128, 16, (128, 128), 9),
    "cifar10dvs": Subject(sma_vgg8_cifar10dvs, 10, (128, 128), 24),
    "ncaltech101": Subject(sma_vgg8_ncaltech101, 14, (180, 240), 6),
    "resnet18": Subject(sma_ms_resnet18, 6, (224, 224), 64, ms_resnet18),
    "resnet34": Subject(sma_ms_resnet34, 6, (224, 224), 64, ms_resnet34),
    "resnet104": Subject(sma_ms_resnet104, 6, (224, 224), 22, ms_resnet104),
}
# Of every subject these forms, as far as it has them.
FORMS = (
    "SMA",
    DIRECT_CONVOLUTIONS,
    "SMA, direct",
    LAYERS_ALONE,
    "SMA, depthwise",
    "no attention",
    "temporal-wise attention",
    "multi-dimensional attention",
    COMPILED,  # compiling takes minutes: only where it is asked for
)
OF_DIRECT = ("SMA", DIRECT_CONVOLUTIONS, COMPILED)


def make_form(name: str, form: str, T: int) -> nn.Module | None:
    """A subject in one form, with the same first weights in all; None where there is no such form.

    The attention modules are SpikingJelly's, in the places of SMA. The layers alone are those of ``"SMA"``.
    """
    torch.manual_seed(0)
    subject = SUBJECTS[name]
    if form in ("SMA", DIRECT_CONVOLUTIONS, LAYERS_ALONE, COMPILED):
        return subject.factory(T=T)
    if form == "SMA, direct":
        return equations_only(subject.factory(T=T))
    if form == "SMA, depthwise":
        return subject.factory(T=T, branch_groups="channel")
    if name == "block":
        return None
    if subject.plain is not None:
        return subject.plain(T=T) if form == "no attention" else None
    net = subject.factory(T=T, sma_blocks=())
    for block, channels in ((net.block2, 128), (net.block3, 256)):
        if form == "temporal-wise attention":
            block.insert(1, temporal_wise_attention(T, min(4, T)))
        elif form == "multi-dimensional attention":
            block.insert(1, multi_dimensional_attention(T, channels, min(4, T)))
    return net


@dataclass(frozen=True)
class Setting:
    """Where and on what a form is measured; plain values, so that it can go to another process."""

    device: str
    T: int
    size: tuple[int, int]
    batch: int
    amp: str
    channels_last: bool

    def input(self, name: str) -> Tensor:
        """What the subject takes: potentials, event frames or images."""
        generator = torch.Generator().manual_seed(0)
        if SUBJECTS[name].plain is not None:
            x = torch.randn(self.batch, 3, *self.size, generator=generator)
            x = x.contiguous(memory_format=torch.channels_last) if self.channels_last else x
        elif name == "block":
            x = torch.randn(self.T, self.batch, 128, *self.size, generator=generator)
        else:
            x = (torch.rand(self.T, self.batch, 2, *self.size, generator=generator) < 0.1).float()
        return x.to(self.device)

    def autocast(self) -> AbstractContextManager:
        dtype = AMP_DTYPES[self.amp]
        return torch.autocast(torch.device(self.device).type, dtype=dtype, enabled=dtype is not None)


Step = Callable[[], Any]


def steps_of(name: str, form: str, setting: Setting) -> tuple[dict[str, Step], str, int] | None:
    """``training`` (forward and backward) and ``evaluation`` of a form, its neurons in words, and the operations of a
    forward pass; None where there is no such form.
    """
    device = torch.device(setting.device)
    net = make_form(name, form, setting.T)
    if net is None or (form == DIRECT_CONVOLUTIONS and device.type != "cpu"):  # they are direct anyway
        return None
    net.to(device)
    backend = select_backend(net, "auto", device)
    if setting.channels_last:
        to_channels_last(net)
    x = setting.input(name)
    flops = _flops(net, x, setting)
    if form == LAYERS_ALONE:
        return _layers_alone(net, x, setting), "", flops
    x.requires_grad_(name == "block")
    scaler = torch.amp.GradScaler(device.type, enabled=setting.amp == "fp16")
    run = torch.compile(net, dynamic=False) if form == COMPILED else net

    def training() -> None:
        net.train()
        net.zero_grad(set_to_none=True)
        with setting.autocast(), convolutions(form):
            y = run(x)
        scaler.scale(y.float().pow(2).mean()).backward()
        reset_net(net)

    def evaluation() -> None:
        net.eval()
        with torch.inference_mode(), setting.autocast(), convolutions(form):
            run(x)
        reset_net(net)

    words = "compiled" if form == COMPILED else str(backend)
    return {"training": training, "evaluation": evaluation}, words, flops


@contextmanager
def convolutions(form: str) -> Iterator[None]:
    """SMA's convolutions are direct in ``DIRECT_CONVOLUTIONS``, and otherwise as SMA chooses."""
    before = os.environ.pop("SMA_CONVOLUTIONS", None)
    if form == DIRECT_CONVOLUTIONS:
        os.environ["SMA_CONVOLUTIONS"] = "direct"
    try:
        yield
    finally:
        os.environ.pop("SMA_CONVOLUTIONS", None)
        if before is not None:
            os.environ["SMA_CONVOLUTIONS"] = before


def _layers_alone(net: nn.Module, x: Tensor, setting: Setting) -> dict[str, Step]:
    """All convolutions and linear layers on the inputs that they get in the network, and nothing else."""
    calls: list[tuple[nn.Module, Tensor]] = []
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [m.register_forward_hook(lambda m, given, _: calls.append((m, given[0].detach()))) for m in layers]
    with torch.no_grad(), setting.autocast():
        net.train()(x)
    reset_net(net)
    for hook in hooks:
        hook.remove()
    inputs = [given.requires_grad_(number > 0 or given.shape[1] > 3) for number, (_, given) in enumerate(calls)]
    with torch.no_grad(), setting.autocast():
        gradients = [torch.randn_like(m(given)) for (m, _), given in zip(calls, inputs, strict=True)]

    def training() -> None:
        for (m, _), given, gradient in zip(calls, inputs, gradients, strict=True):
            wanted = [given, *m.parameters()] if given.requires_grad else [*m.parameters()]
            with setting.autocast():
                y = m(given)
            torch.autograd.grad(y, wanted, gradient)

    def evaluation() -> None:
        with torch.inference_mode(), setting.autocast():
            for m, given in calls:
                m(given)

    return {"training": training, "evaluation": evaluation}


def benchmark_model(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Training step and evaluation of networks in several forms: time and peak memory, in ratios; a table for each."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = args.tf32
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.batch_size == 0 and device.type != "cuda":
        raise UserError("-b 0 looks for the largest batch that fits on a GPU, and the device is a CPU; give a number")
    forms = [form for form in FORMS if form in {"SMA", *(args.forms or set(FORMS) - {COMPILED})}]
    matrix_peak = _matrix_peak(args.amp, device) if device.type == "cuda" else None
    for name in args.net:
        with user_input():
            yield from _measure(name, forms, setting_of(name, args, device), args.runs, matrix_peak)


def setting_of(name: str, args: argparse.Namespace, device: torch.device) -> Setting:
    subject = SUBJECTS[name]
    size = (args.image_size, args.image_size) if args.image_size else subject.size
    default = subject.batch if device.type == "cuda" else 1
    batch = default if args.batch_size is None else args.batch_size
    setting = Setting(str(device), args.timesteps or subject.T, size, batch, args.amp, args.channels_last)
    return Setting(**{**vars(setting), "batch": batch or _largest_batch(name, setting)})


def _measure(
    name: str, forms: list[str], setting: Setting, runs: int, matrix_peak: float | None
) -> Iterator[list[dict[str, Any]]]:
    found = {form: steps for form in forms if (steps := _steps_that_fit(name, form, setting)) is not None}
    device = torch.device(setting.device)
    for kind in ("training", "evaluation"):
        steps = {form: both[kind] for form, (both, _, _) in found.items()}
        tasks = {form: partial(seconds_of, step, device) for form, step in steps.items()}
        seconds = alternate(tasks, runs, warm_up=3 if device.type == "cuda" else 1)
        rows = []
        medians = {form: statistics.median(values) for form, values in seconds.items()}
        for form, step in steps.items():
            flops = found[form][2] * (3 if kind == "training" else 1)
            rate = flops / medians[form] / 1e12
            rows.append(
                {
                    "subject": f"{name}, T={setting.T}, {'x'.join(map(str, setting.size))}, B={setting.batch}",
                    "pass": kind,
                    "form": form,
                    "seconds": medians[form],
                    "from": min(seconds[form]),
                    "to": max(seconds[form]),
                    "x layers alone": _ratio(medians, form, LAYERS_ALONE) if form.startswith("SMA") else None,
                    "x direct": _ratio(medians, form, "SMA, direct") if form in OF_DIRECT else None,
                    "x no attention": _ratio(medians, form, "no attention"),
                    "peak GiB": None
                    if form == LAYERS_ALONE or kind == "evaluation"
                    else _peak_memory(name, form, kind, setting, step),
                    "TFLOP/s": rate,
                    **({"share of matrix peak": rate / matrix_peak} if matrix_peak and kind == "training" else {}),
                    "neurons": found[form][1],
                }
            )
        yield rows


def _steps_that_fit(name: str, form: str, setting: Setting) -> tuple[dict[str, Step], str, int] | None:
    """:func:`steps_of`; None, and a line on stderr, for a form that does not fit into memory."""
    try:
        found = steps_of(name, form, setting)
        if found is not None:
            found[0]["training"]()
        return found
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        print(f"{name}, {form}: not enough memory", file=sys.stderr)
        return None


def _ratio(medians: dict[str, float], form: str, base: str) -> float | None:
    return medians[form] / medians[base] if base in medians and form != LAYERS_ALONE else None


def alternate(tasks: Mapping[str, Callable[[], float]], runs: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Run every task in turn, ``runs`` times, after ``warm_up`` runs that do not count; the values that they return."""
    for task in [*tasks.values()] * warm_up:
        task()
    values: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(runs):
        for name, task in tasks.items():
            values[name].append(task())
    return values


def seconds_of(step: Step, device: torch.device) -> float:
    """Wall time of a step, until the device has finished it."""
    _wait(device)
    began = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# What is beside the time --------------------------------------------------------------------------------------------


def _peak_memory(name: str, form: str, kind: str, setting: Setting, step: Step) -> float:
    """Peak memory of one step in GiB: on a GPU above what lay there before, on a CPU of a process of its own."""
    device = torch.device(setting.device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)  # the other forms are there, too
        torch.cuda.reset_peak_memory_stats(device)
        step()
        _wait(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_resident_peak, (name, form, kind, setting, torch.get_num_threads()))


def _resident_peak(name: str, form: str, kind: str, setting: Setting, threads: int) -> float:
    """Peak resident memory of this process after one step, in GiB."""
    torch.set_num_threads(threads)
    steps, _, _ = steps_of(name, form, setting)
    steps[kind]()
    status = Path("/proc/self/status")  # ru_maxrss starts from the parent's peak on Linux
    if status.exists():
        words = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()
        return int(words[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _flops(net: nn.Module, x: Tensor, setting: Setting) -> int:
    """Floating-point operations of convolutions and linear layers, forward; a training step has three times these."""
    counts = []

    def count(m: nn.Module, _: Any, y: Tensor) -> None:
        counts.append(2 * y.numel() * m.weight[0].numel())

    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad(), setting.autocast():
        net.eval()(x)
    reset_net(net)
    for hook in hooks:
        hook.remove()
    return sum(counts)


def _matrix_peak(amp: str, device: torch.device) -> float:
    """TFLOP/s of a large matrix product in the precision of the training, as the card really does it."""
    a = torch.randn(8192, 8192, device=device, dtype=AMP_DTYPES[amp] or torch.float32)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as the convolutions compute
    seconds = alternate({"": lambda: seconds_of(lambda: torch.mm(a, a), device)}, 20, warm_up=3)[""]
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * 8192**3 / statistics.median(seconds) / 1e12


def _largest_batch(name: str, setting: Setting) -> int:
    """The largest power of two whose training step fits into the memory of the GPU."""
    batch = 1
    while batch < MOST_SAMPLES:
        try:
            steps_of(name, "SMA", Setting(**{**vars(setting), "batch": 2 * batch}))[0]["training"]()
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            torch.cuda.empty_cache()
        batch *= 2
    return batch


# Processes ----------------------------------------------------------------------------------------------------------


def benchmark_scaling(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Training samples per second of one and of two processes, a core or a GPU each, with the exchange of gradients."""
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() > 1
    if (os.cpu_count() or 1) < 2:
        raise UserError("scaling needs two cores, and this machine has one")
    rows = []
    for name in args.net:
        setting = setting_of(name, args, torch.device("cuda" if on_gpus else "cpu"))
        seconds = {n: _seconds_of_processes(name, setting, n, args.runs) for n in (1, 2)}
        rows += [
            {
                "subject": f"{name}, T={setting.T}, {'x'.join(map(str, setting.size))}, B={setting.batch} per process",
                "processes": n,
                "on": f"{n} {'GPU' if on_gpus else 'core'}{'s' if n > 1 else ''}",
                "seconds": seconds[n],
                "samples/s": n * setting.batch / seconds[n],
                "speed-up": n * seconds[1] / seconds[n],
                "efficiency": seconds[1] / seconds[n],
            }
            for n in (1, 2)
        ]
    return rows


def _seconds_of_processes(name: str, setting: Setting, count: int, runs: int) -> float:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        found = manager.list()
        torch.multiprocessing.spawn(_train, (name, setting, count, runs, store.port, found), nprocs=count)
        return max(found)


def _train(rank: int, name: str, setting: Setting, count: int, runs: int, port: int, found: list[float]) -> None:
    torch.set_num_threads(1)
    on_gpu = setting.device.startswith("cuda")
    store = torch.distributed.TCPStore("localhost", port, is_master=False)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=count)
    device = torch.device(f"cuda:{rank}" if on_gpu else "cpu")
    net = make_form(name, "SMA", setting.T).to(device)
    select_backend(net, "auto", device)
    trained = DistributedDataParallel(net)
    x = Setting(**{**vars(setting), "device": str(device)}).input(name)

    def step() -> None:
        net.zero_grad(set_to_none=True)
        with setting.autocast():
            y = trained(x)
        y.float().pow(2).mean().backward()
        reset_net(net)

    found.append(statistics.median(alternate({"": lambda: seconds_of(step, device)}, runs)[""]))
    torch.distributed.destroy_process_group()

"""A run in words: the header that it prints and the facts that go into its files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from models.fast import has_kernels
from utils.data.events import EventData
from utils.data.images import ImageData
from utils.distributed import Process
from utils.versions import versions

__all__ = ["describe_event_run", "describe_image_run", "describe_training"]


def describe_event_run(args: Any, data: EventData, net: nn.Module, backend: str, process: Process) -> dict[str, str]:
    """The header of a run on event data, name to words."""
    height, width = data.frame_size
    blocks = ", ".join(map(str, args.sma_blocks)) or "no blocks"
    branches = f" ({args.branch_activation}{_depthwise(args)} branches)" if args.sma_blocks else ""
    parts = f", in {args.accumulate} parts of {args.batch_size // args.accumulate}" if args.accumulate > 1 else ""
    facts = {
        "data": data.title,
        "samples": f"{len(data.train)} training, {len(data.test)} test, {len(data.classes)} classes",
        "split": data.split,
        "left out": f"{len(data.left_out)} bad files" if data.left_out else "",
        "input": f"T = {args.timesteps}, frames {height}x{width}",
        "network": f"SMA-VGG8, SMA in {blocks}{branches}, {_azo(args)}, width {args.width:g}, {_size(net)}",
        "batch": f"{args.batch_size} per process, {process.world_size * args.batch_size} global{parts}",
    }
    return _with_common_facts(facts, args, backend, process)


def describe_image_run(args: Any, data: ImageData, net: nn.Module, backend: str, process: Process) -> dict[str, str]:
    """The header of a run on photographs, name to words."""
    training = f"{len(data.train)} training, " if data.train is not None else ""
    per_process = args.batch_size // process.world_size
    parts = f", in {args.accumulate} parts of {per_process // args.accumulate}" if args.accumulate > 1 else ""
    options = [name for name in ("mixup", "channels_last") if getattr(args, name)]
    options += [f"EMA {args.ema:g}"] if args.ema else []
    facts = {
        "data": data.title,
        "samples": f"{training}{len(data.test)} test (in {data.test.folder}), {len(data.classes)} classes",
        "input": f"T = {args.timesteps}, crops of {args.image_size} (test {args.test_crop}) pixels, by {args.decoder}",
        "network": f"SMA-MS-ResNet-{args.net.removeprefix('resnet')}, SMA in {args.sma_blocks} blocks"
        f"{_depthwise(args)}, {_azo(args)}, width {args.width:g}, {_size(net)}",
        "batch": f"{args.batch_size} global, {per_process} per process{parts}",
        "options": "" if args.evaluate else ", ".join(options).replace("_", " "),
    }
    return _with_common_facts(facts, args, backend, process)


_PERHAPS = "perhaps selected on the test set"


def describe_training(beside: Mapping[str, Any]) -> dict[str, str]:
    """Of which epoch and seed weights are, in words, and whether the test set selected that epoch.

    Args:
        beside: what lies beside the weights, as :func:`utils.checkpoint.read_weights` gives it.
    """
    recipe = beside["recipe"] if isinstance(beside.get("recipe"), Mapping) else {}
    epoch, epochs, unknown = beside.get("epoch"), recipe.get("epochs"), "not told by the weights file"
    told = epoch is not None and epochs is not None
    return {
        "epoch": f"{epoch} of {epochs}, {_kind_of_epoch(epoch, epochs, beside)}" if told else f"{unknown}, {_PERHAPS}",
        "seed": str(recipe.get("seed", unknown)),
    }


def _kind_of_epoch(epoch: int, epochs: int, beside: Mapping[str, Any]) -> str:
    """What an epoch is in its run; that of exported weights says so in the words of the export."""
    processes = beside.get("processes")
    if processes and processes[0]["progress"]["step"]:
        return f"and {processes[0]['progress']['step']} step(s) of the next"
    best = beside.get("best", {}).get("epoch")
    if epoch == epochs:
        return "the final one" + (", also the best on the test set" if epoch == best else "")
    if epoch == best or beside.get("accuracy", {}).get("of", "").startswith("the best test epoch"):
        return "the best so far (selected on the test set)"
    return "neither the final nor the best one" if best is not None else _PERHAPS


def _with_common_facts(facts: dict[str, str], args: Any, backend: str, process: Process) -> dict[str, str]:
    on_gpu = process.device.type == "cuda"
    device = torch.cuda.get_device_name(process.device) if on_gpu else "CPU"
    evaluation = _precision(args.eval_amp)
    facts |= {
        "neurons": str(backend),
        "SMA": ("Triton kernels" if has_kernels(process.device) else "PyTorch, no kernels") if on_gpu else "",
        "precision": evaluation if args.evaluate else f"training {_precision(args.amp)}, evaluation {evaluation}",
        "processes": f"{process.world_size} on {device}",
        "schedule": "" if args.evaluate else f"{args.epochs} epochs, lr {args.lr:g}, seed {args.seed}",
        "weights": str(args.weights) if args.evaluate else "",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "output": str(args.output_dir),
    }
    return {name: words for name, words in facts.items() if words}


def _precision(amp: str) -> str:
    return "fp32" if amp == "off" else amp


def _depthwise(args: Any) -> str:
    return ", depthwise" if args.branch_groups == "channel" else ""


def _azo(args: Any) -> str:
    return f"AZO with RCR {args.RCR}, RTR {args.RTR}" if args.AZO else "no AZO"


def _size(net: nn.Module) -> str:
    return f"{sum(p.numel() for p in net.parameters()) / 1e6:.6f} M parameters"

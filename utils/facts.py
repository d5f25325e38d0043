"""What a run is, as values: stored in ``args.json``, checkpoints, ``evaluation.json`` and exported files. The words of
the header are made from them."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from models.fast import has_kernels
from models.neurons import Backend
from utils.args import words
from utils.data.events import EventData
from utils.data.images import ImageData
from utils.distributed import Process
from utils.engine import AMP_DTYPES
from utils.networks import TITLES
from utils.versions import code, machine, versions

__all__ = [
    "facts_of_run",
    "header",
    "precision",
    "precision_in_words",
    "split_in_words",
    "training_facts",
    "training_in_words",
]

_SELECTIONS = {
    "final": "the final one",
    "best": "the best so far (selected on the test set)",
    "final and best": "the final one, also the best on the test set",
    "val": "the best so far on held-out training samples",
    "final and val": "the final one, also the best on held-out training samples",
    "none": "neither the final nor the best one",
    "unknown": "perhaps selected on the test set",
}
_NETWORK = ("timesteps", "width", "sma_blocks", "branch_activation", "branch_groups", "AZO", "RCR", "RTR")


def facts_of_run(
    args: Namespace, data: EventData | ImageData, data_set: str, net: nn.Module, backend: Backend, process: Process
) -> dict[str, Any]:
    """The facts of a run, by topic, in plain values.

    Args:
        args: the settings of a script.
        data: what it trains on.
        data_set: the name of its layout, for instance ``"dvs128"``.
        net: the network itself, not its wrapper.
        backend: of the neurons.
        process: this process.
    """
    on_event_data = isinstance(data, EventData)
    per_process = args.batch_size if on_event_data else args.batch_size // process.world_size
    name = TITLES["VGG8" if on_event_data else f"sma_ms_{args.net}"]
    on_gpu = process.device.type == "cuda"
    half = AMP_DTYPES[args.eval_amp if args.evaluate else args.amp]  # where SMA takes channels-last maps on a GPU
    return {
        "data": {
            "name": data_set,
            "title": data.title,
            "folder": str(args.data_dir),
            "size": list(data.frame_size),
            "on_bad_sample": getattr(args, "on_bad_sample", "stop"),
        },
        "split": asdict(data.info),
        "network": {
            "name": name,
            **{key: getattr(args, key) for key in _NETWORK if hasattr(args, key)},
            "parameters": sum(p.numel() for p in net.parameters()),
        },
        "batch": {
            "per_process": per_process,
            "processes": process.world_size,
            "global": per_process * process.world_size,
            "micro_batches": args.micro_batches,
        },
        "precision": precision(process.device, args.eval_amp, None if args.evaluate else args.amp),
        "neurons": backend._asdict(),
        "sma_kernels": on_gpu and has_kernels(process.device, half or torch.float32, channels_last=half is not None),
        "device": torch.cuda.get_device_name(process.device) if on_gpu else "CPU",
        "versions": versions(),
        # A run that continues has those of its earlier starts, too, alike ones once.
        "starts": [{**code(), "machine": machine(process.device), "threads": torch.get_num_threads()}],
    }


def header(args: Namespace, facts: Mapping[str, Any]) -> dict[str, str]:
    """The lines at the start of a run, name to words."""
    data, split, network, batch = (facts[topic] for topic in ("data", "split", "network", "batch"))
    blocks = words(network["sma_blocks"])
    branches = f", {network['branch_activation']} branches" if "branch_activation" in network else ""
    depthwise = ", depthwise" if network["branch_groups"] == "channel" else ""
    azo = f", AZO with RCR {network['RCR']}, RTR {network['RTR']}" if network["AZO"] else ", no AZO"
    parts = f", in {batch['micro_batches']} parts" if batch["micro_batches"] > 1 else ""
    extras = ", ".join(name.replace("_", " ") for name in ("mixup", "channels_last") if getattr(args, name, False))
    ema = f"EMA {args.ema:g}" if getattr(args, "ema", 0) else ""
    training = f"{split['train']} training, " if split["train"] else ""
    training += f"{split['val']} held out, " if split["val"] else ""
    lines = {
        "data": f"{data['title']}, in {data['folder']}",
        "samples": f"{training}{split['test']} test, {split['classes']} classes",
        "split": split_in_words(split),
        "left out": f"{split['left_out']} bad files" if split["left_out"] else "",
        "input": f"T = {network['timesteps']}, {data['size'][0]}x{data['size'][1]} pixels",
        "network": f"{network['name']}, SMA in blocks {blocks}{branches}{depthwise}{'' if args.evaluate else azo}, "
        f"width {network['width']:g}, {network['parameters'] / 1e6:.6f} M parameters",
        **(training_in_words(facts) if args.evaluate else {}),
        "batch": f"{batch['per_process']} per process, {batch['global']} global{parts}",
        "options": "" if args.evaluate else ", ".join(filter(None, (extras, ema))),
        "neurons": str(Backend(**facts["neurons"])),
        "compiled": "training, in plain operations in place of kernels" if args.compile and not args.evaluate else "",
        "SMA": "Triton kernels" if facts["sma_kernels"] else "",
        "precision": precision_in_words(facts["precision"]),
        "processes": f"{batch['processes']} on {facts['device']}",
        "schedule": "" if args.evaluate else f"{args.epochs} epochs, lr {args.lr:g}, seed {args.seed}",
        "weights": str(args.weights) if args.weights is not None else "",
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "code": _code(facts["starts"][-1]),
        "output": str(args.output_dir) if args.output_dir is not None else "",
    }
    return {name: text.strip() for name, text in lines.items() if text.strip()}


def split_in_words(split: Mapping[str, Any]) -> str:
    """The stored facts of a split, as the header writes them."""
    rule = {
        "own": "the data set's own",
        "folders": "the folders",
        "random": f"random 90/10 in each class, seed {split.get('seed')}",
        "first90": "the first 90 % of each class",
        "tebn": "TEBN's: the first 100 of each class to test",
    }.get(split["rule"], f"file {split.get('file')}")
    held = f", {split['val']} training samples held out to select the epoch" if split.get("val") else ""
    return f"{rule}{held}, fingerprint {split['fingerprint']}"


def training_facts(known: Mapping[str, Any]) -> dict[str, Any]:
    """Of which epoch weights are, and what selected it.

    Args:
        known: what lies in the file with the weights, as :func:`utils.checkpoint.read_weights` gives it.

    Returns:
        ``epoch``, ``epochs``, ``steps`` of the next epoch, ``seed``, ``AZO`` (None where unknown) and ``selection``:
        ``"final"``, ``"best"`` (the best epoch so far on the test set) or ``"val"`` (on held-out training samples),
        ``"final and best"``, ``"final and val"``, ``"none"`` or ``"unknown"``.
    """
    recipe = known["recipe"] if isinstance(known.get("recipe"), Mapping) else {}
    epoch, epochs = known.get("epoch"), recipe.get("epochs")
    found = {"epoch": epoch, "epochs": epochs, "steps": 0, "seed": recipe.get("seed"), "AZO": recipe.get("AZO")}
    found["selection"] = "unknown"
    if known.get("selection") in _SELECTIONS:  # of exported weights
        return found | {"selection": known["selection"], "steps": known.get("steps", 0)}
    with contextlib.suppress(LookupError, TypeError):  # nothing in a file is trusted
        found["steps"] = known["processes"][0]["progress"]["step"]
    if epoch is None or epochs is None:
        return found
    best = known.get("best")
    is_best = isinstance(best, Mapping) and best.get("epoch") == epoch and not found["steps"]
    on_test = True
    with contextlib.suppress(LookupError, TypeError):
        on_test = not known["facts"]["split"]["val"]
    is_final = epoch == epochs
    kinds = [kind for kind, holds in (("final", is_final), ("best" if on_test else "val", is_best)) if holds]
    return found | {"selection": " and ".join(kinds) or "none"}


def training_in_words(found: Mapping[str, Any]) -> dict[str, str]:
    """``epoch``, ``seed`` and, of weights trained with it, ``AZO`` of :func:`training_facts` in words."""
    azo = {"AZO": "training only"} if found["AZO"] else {}
    kind = _SELECTIONS[found["selection"]]
    steps = f" and {found['steps']} step(s) of the next" if found["steps"] else ""
    if found["epoch"] is None:
        return {"epoch": f"unknown, {kind}", "seed": "unknown", **azo}
    return {"epoch": f"{found['epoch']} of {found['epochs']}{steps}, {kind}", "seed": str(found["seed"]), **azo}


def _code(start: Mapping[str, Any]) -> str:
    changed = " and changed files" if start["changed"] else ""
    return f"commit {start['commit'][:10]}{changed}" if start["commit"] else ""


def precision(device: torch.device, evaluation: str = "off", training: str | None = None) -> dict[str, Any]:
    """The precisions ``"fp16"``, ``"bf16"`` or ``"off"``, and whether float32 convolutions may use TF32, which rounds
    their inputs to 10 bits; None on a CPU, which has no such thing.
    """
    tf32 = torch.backends.cudnn.allow_tf32 if device.type == "cuda" else None
    return {**({"training": training} if training else {}), "evaluation": evaluation, "tf32": tf32}


def precision_in_words(found: Mapping[str, Any]) -> str:
    """What :func:`precision` found, for instance ``"training fp16, evaluation fp32 (no TF32)"``."""
    full = {None: "fp32", True: "fp32 (convolutions may use TF32)", False: "fp32 (no TF32)"}[found["tf32"]]
    pairs = ((what, found[what]) for what in ("training", "evaluation") if what in found)
    return ", ".join(f"{what} {full if amp == 'off' else amp}" for what, amp in pairs)

"""A trained network and its test set from a weights file: what the tools that look at a network start from."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models import VGG8, sma_ms_resnet18, sma_ms_resnet34, sma_ms_resnet104
from models.neurons import select_backend
from utils.args import size, told_by_weights, whole
from utils.checkpoint import describe_ms_resnet, describe_vgg8, load_weights, read_weights
from utils.data.demo_images import write_demo_images
from utils.data.events import EventFrames, load_event_data
from utils.data.images import ImageSet, load_image_data, normalized
from utils.data.loaders import make_loaders
from utils.describe import describe_training
from utils.distributed import Process
from utils.engine import time_first
from utils.errors import UserError, user_input
from utils.event_args import INPUT_FIELDS as EVENT_INPUTS
from utils.files import Fields, check_fields, read_json
from utils.image_args import INPUT_FIELDS as IMAGE_INPUTS
from utils.prepare.datasets import DATA_SETS

__all__ = ["Inspected", "add_inspection", "load_inspected"]

NETS = {"resnet18": sma_ms_resnet18, "resnet34": sma_ms_resnet34, "resnet104": sma_ms_resnet104}
_EVENT_DEFAULTS = {"sensor_size": None, "frame_size": None, "split": "random", "demo": False}
_IMAGE_DEFAULTS = {"image_size": 224, "test_crop": None, "demo": False}


@dataclass(frozen=True)
class Inspected:
    """A network with its weights, in evaluation mode, and its test set.

    Attributes:
        batches: pairs of samples and labels of this process, every sample once.
        prepare: samples and labels on the device to the inputs of the network.
        facts: name to words: weights, network, epoch, seed, data, split, input, neurons.
    """

    net: nn.Module
    batches: Iterable[tuple[Tensor, Tensor]]
    test: EventFrames | ImageSet
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    classes: list[str]
    facts: dict[str, str]


def add_inspection(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a network and its data; those not given are absent from the result."""
    unset = {"default": argparse.SUPPRESS}
    add = parser.add_argument_group("network and data").add_argument
    add("--weights", type=Path, required=True, metavar="FILE", help="released or own; tells the network, T, ...")
    add("--data-dir", type=Path, metavar="DIR", help="folder of the data set (default: that of the run)", **unset)
    add("--demo", action="store_true", help="the built-in demo data", **unset)
    add("--data-set", choices=DATA_SETS, help="layout of event data (default: told by the run or the classes)", **unset)
    add("-T", "--timesteps", type=whole(1), metavar="T", help="of a network without SMA", **unset)
    add("--sensor-size", type=size(1), metavar="HxW", help="of another camera", **unset)
    add("--frame-size", type=size(32), metavar="N|HxW", help="resize frames (default: as in training)", **unset)
    add("--split", metavar="random|first90|tebn|FILE", help="train/test split (default: as in training)", **unset)
    add("--split-seed", type=whole(0), metavar="N", help="of that split", **unset)
    add("--on-bad-sample", choices=("stop", "skip"), help="damaged samples (default: as in training)", **unset)
    add("--image-size", type=whole(32), metavar="N", help="side of the test crop (default: as in training)", **unset)
    add("-b", "--batch-size", type=whole(1), default=16, metavar="N", help="per process (default: 16)")
    add("--num-workers", type=whole(0), default=0, metavar="N", help="loader processes (default: 0)")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    add("--backend", choices=("auto", "cupy", "torch"), default="auto", help="of the neurons (default: auto)")
    add("--output-dir", type=Path, metavar="DIR", help="default: the folder of --weights")
    add("--local-rank", "--local_rank", type=whole(0), metavar="N", help="set by older launchers")


def load_inspected(args: argparse.Namespace, process: Process) -> Inspected:
    """Rebuild the network of ``args.weights`` and find its test set.

    Raises:
        UserError: the file holds no network of this project, or its data are not there.
    """
    weights, beside = read_weights(args.weights)
    trained = describe_training(beside)
    if describe_vgg8(weights):
        return _inspect_events(args, process, trained)
    if describe_ms_resnet(weights):
        return _inspect_images(args, process, trained)
    raise UserError(
        f"weights file {args.weights} is neither of an SMA-VGG8 nor of an SMA-MS-ResNet-18, -34 or -104; its names "
        f"begin with {', '.join(list(weights)[:3])}"
    )


def _inspect_events(args: argparse.Namespace, process: Process, trained: dict[str, str]) -> Inspected:
    about = {**_EVENT_DEFAULTS, **told_by_weights(vars(args), describe_vgg8, EVENT_INPUTS, {}), **vars(args)}
    if "timesteps" not in about:
        raise UserError(f"weights file {args.weights} does not tell T; give it as -T")
    data_set = about.get("data_set") or _data_set_of(args.weights, about["num_classes"])
    data = load_event_data(
        data_set,
        _data_dir(args, about["demo"]),
        about["timesteps"],
        split=about["split"],
        split_seed=about.get("split_seed", DATA_SETS[data_set].split_seed),  # released files tell none
        sensor_size=about["sensor_size"],
        frame_size=about["frame_size"],
        demo=about["demo"],
        on_bad_sample=about.get("on_bad_sample", _run_settings(args.weights).get("on_bad_sample", "stop")),
    )
    keywords = {name: about[name] for name in ("num_classes", "width", "sma_blocks")}
    keywords |= {name: about[name] for name in ("branch_activation", "branch_groups") if name in about}
    with user_input():
        net = VGG8(about["timesteps"], **keywords)
    height, width = data.frame_size
    facts = {
        "network": f"SMA-VGG8, SMA in blocks {', '.join(map(str, about['sma_blocks'])) or 'none'}, "
        f"width {about['width']:g}",
        **trained,
        "data": data.title,
        "split": data.split,
        **({"left out": f"{len(data.left_out)} bad files"} if data.left_out else {}),
        "input": f"T = {about['timesteps']}, frames {height}x{width}",
    }
    return _ready(args, process, net, data, time_first, facts)


def _inspect_images(args: argparse.Namespace, process: Process, trained: dict[str, str]) -> Inspected:
    flags = {"net": "-net"}
    about = {**_IMAGE_DEFAULTS, **told_by_weights(vars(args), describe_ms_resnet, IMAGE_INPUTS, flags), **vars(args)}
    if "timesteps" not in about:
        raise UserError(f"weights file {args.weights} does not tell T; give it as -T")
    crop = about["image_size"] if "image_size" in args else about["test_crop"] or about["image_size"]
    data_dir = _data_dir(args, about["demo"])
    data = load_image_data(write_demo_images(data_dir) if about["demo"] else data_dir, crop, for_training=False)
    keywords = {"T": about["timesteps"], "num_classes": about["num_classes"], "width": about["width"]}
    keywords |= {name: about[name] for name in ("sma_blocks", "branch_groups") if name in about}
    with user_input():
        net = NETS[about["net"]](**keywords)
    depth = about["net"].removeprefix("resnet")
    facts = {
        "network": f"SMA-MS-ResNet-{depth}, SMA in {net.sma_blocks} blocks, width {about['width']:g}",
        **trained,
        "data": data.title,
        "split": f"folder {data.test.folder}",
        "input": f"T = {about['timesteps']}, test crops of {crop} pixels",
    }
    return _ready(args, process, net, data, normalized(), facts)


def _ready(
    args: argparse.Namespace, process: Process, net: nn.Module, data: Any, prepare: Callable, facts: dict[str, str]
) -> Inspected:
    load_weights(net, args.weights)
    if len(data.classes) != net.num_classes:
        raise UserError(
            f"weights file {args.weights} is of {net.num_classes} classes and the data have {len(data.classes)}; give "
            "the --data-dir that it was trained on"
        )
    net = net.to(process.device).eval()
    backend = select_backend(net, args.backend, process.device)
    only_test = argparse.Namespace(train=None, test=data.test)
    _, batches = make_loaders(only_test, args.batch_size, args.num_workers, 0, process)
    facts = {"weights": str(args.weights), **facts, "samples": f"{len(data.test)} test", "neurons": str(backend)}
    return Inspected(net, batches, data.test, prepare, data.classes, facts)


_RUN_FILE: Fields = {"args": (dict, None), "data": (str, None)}
_SETTINGS: Fields = {"data_dir": (str, None), "on_bad_sample": (str, None)}


def _run_file(weights: Path) -> dict[str, Any]:
    """``args.json`` of the run that wrote the weights; empty where there is none."""
    path = weights.with_name("args.json")
    return read_json(path, _RUN_FILE, "a run's own weights, or move them out of its folder") if path.exists() else {}


def _run_settings(weights: Path) -> dict[str, Any]:
    """The resolved arguments of that run."""
    settings = _run_file(weights).get("args") or {}
    check_fields(settings, _SETTINGS, weights.with_name("args.json"), "a run's own weights")
    return settings


def _data_set_of(weights: Path, num_classes: int) -> str:
    title = _run_file(weights).get("data") or ""
    for name, about in DATA_SETS.items():
        if title.endswith(about.title) or (not title and about.num_classes == num_classes):
            return name
    raise UserError(
        f"weights file {weights} does not tell its data set ({num_classes} classes); give the layout of the data as "
        f"--data-set {'|'.join(DATA_SETS)}"
    )


def _data_dir(args: argparse.Namespace, demo: bool) -> Path:
    if "data_dir" in args and "demo" in args:
        raise UserError("--demo makes its own data; leave out either --demo or --data-dir")
    if "data_dir" in args:
        return args.data_dir
    if demo:
        return args.weights.parent / "demo_data"
    stored = _run_settings(args.weights).get("data_dir")
    if stored is None:
        raise UserError(f"the data of weights file {args.weights} are unknown; give --data-dir DIR, or --demo")
    return Path(stored)

"""A trained network and its test set from a weights file: what the tools that look at a network start from."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from models import VGG8
from models.neurons import select_backend
from utils.args import size, stored_settings, whole, words
from utils.checkpoint import put_weights, read_weights
from utils.data.demo_images import write_demo_images
from utils.data.events import EventData, EventFrames, load_event_data
from utils.data.images import ImageData, ImageSet, load_image_data, normalized
from utils.data.loaders import make_loaders
from utils.distributed import Process
from utils.engine import time_first
from utils.errors import UserError
from utils.event_args import TABLE as EVENT_TABLE
from utils.facts import precision, precision_in_words, split_in_words, training_facts, training_in_words
from utils.image_args import TABLE as IMAGE_TABLE
from utils.networks import TITLES, build_network, describe_network
from utils.prepare.datasets import DATA_SETS

__all__ = ["Inspected", "add_data", "add_inspection", "load_inspected"]

_EVENT_DEFAULTS = {"sensor_size": None, "frame_size": None, "split": "random", "demo": False}
_IMAGE_DEFAULTS = {"image_size": 224, "test_crop": None, "demo": False}


@dataclass(frozen=True)
class Inspected:
    """A network with its weights, in evaluation mode, and its test set.

    Attributes:
        batches: pairs of samples and labels of this process, every sample once.
        train: training samples without augmentation, where they are asked for.
        prepare: samples and labels on the device to the inputs of the network.
        facts: name to words: weights, network, epoch, seed, data, split, input, neurons, precision.
    """

    net: nn.Module
    batches: Iterable[tuple[Tensor, Tensor]]
    test: EventFrames | ImageSet
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    classes: list[str]
    facts: dict[str, str]
    train: Dataset | None = None

    def sample(self, index: int, device: torch.device) -> tuple[Tensor, int, Tensor]:
        """One test sample: as it is stored, its label, and the inputs of the network (a batch of one)."""
        found = self.test[index]
        assert found is not None  # only training leaves out images that cannot be read
        sample, label = found
        return sample, label, self.prepare(sample[None].to(device), torch.tensor([label]))[0]


def add_inspection(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a network and its data; those not given are absent from the result."""
    add = parser.add_argument_group("network").add_argument
    add("--weights", type=Path, required=True, metavar="FILE", help="released or own: network, T, ... are in it")
    add("--output-dir", type=Path, metavar="DIR", help="default: the folder of --weights")
    add("--local-rank", "--local_rank", type=whole(0), metavar="N", help="set by older launchers")
    add_data(parser, "data")


def add_data(parser: argparse.ArgumentParser, title: str) -> None:
    """Add the arguments that name the data of a network; those not given are absent from the result."""
    unset: dict[str, Any] = {"default": argparse.SUPPRESS}
    add = parser.add_argument_group(title).add_argument
    add("--data-dir", type=Path, metavar="DIR", help="folder of the data set (default: that of the run)", **unset)
    add("--demo", action="store_true", help="the built-in demo data", **unset)
    add(
        "--data-set",
        choices=DATA_SETS,
        help="layout of event data (default: the run's)",
        **unset,
    )
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
    add("--backend", choices=("auto", "cupy", "triton", "torch"), default="auto", help="of the neurons (default: auto)")


def load_inspected(args: argparse.Namespace, process: Process, training: bool = False) -> Inspected:
    """Rebuild the network of ``args.weights`` and find its test set.

    Args:
        args: what :func:`add_inspection` adds.
        process: this process.
        training: also find its training samples.

    Raises:
        UserError: the file holds no network of this project, or its data are not there.
    """
    weights, known = read_weights(args.weights)
    net: Any = build_network(weights, known, **({"T": args.timesteps} if "timesteps" in args else {}))
    put_weights(net, weights, args.weights)
    recipe = stored_settings(EVENT_TABLE if isinstance(net, VGG8) else IMAGE_TABLE, known, args.weights)
    facts = known["facts"] if isinstance(known.get("facts"), Mapping) else {}
    find, prepare = (_event_data, time_first) if isinstance(net, VGG8) else (_image_data, normalized())
    data: Any = find(args, net, recipe, facts["data"] if isinstance(facts.get("data"), Mapping) else {})
    if len(data.classes) != net.num_classes:
        raise UserError(
            f"weights file {args.weights} is of {net.num_classes} classes and the data have {len(data.classes)}; give "
            "the --data-dir that it was trained on"
        )
    net = net.to(process.device)
    backend = select_backend(net, args.backend, process.device)
    only_test = argparse.Namespace(train=None, val=None, test=data.test)
    *_, batches = make_loaders(only_test, args.batch_size, args.num_workers, 0, process)
    name, keywords = describe_network(weights, known)
    height, width = data.frame_size
    lines = {
        "weights": str(args.weights),
        "network": f"{TITLES[name]}, SMA in blocks {words(net.sma_blocks)}, width {keywords['width']:g}",
        **training_in_words(training_facts(known)),
        "data": data.title,
        "split": split_in_words(asdict(data.info)),
        "left out": f"{data.info.left_out} bad files" if data.info.left_out else "",
        "input": f"T = {net.T}, {height}x{width} pixels",
        "samples": f"{len(data.test)} test",
        "neurons": str(backend),
        "precision": precision_in_words(precision(process.device)),
    }
    lines = {name: line for name, line in lines.items() if line}
    train: Any = None
    if training:
        on_events = isinstance(data, EventData)
        train = data.train if on_events else ImageSet(data.test.folder.parent / "train", data.test.transform)
    return Inspected(net, batches, data.test, prepare, data.classes, lines, train)


def _event_data(args: argparse.Namespace, net: Any, recipe: Mapping[str, Any], data: Mapping[str, Any]) -> EventData:
    about = {**_EVENT_DEFAULTS, **recipe, **vars(args)}
    demo = about["demo"] and "data_dir" not in args
    data_set = about.get("data_set") or data.get("name")
    if data_set not in list(DATA_SETS):
        data_set = _data_set_of(args.weights, net.num_classes)
    return load_event_data(
        data_set,
        _data_dir(args, demo, data),
        net.T,
        split=about["split"],
        split_seed=about.get("split_seed", DATA_SETS[data_set].split_seed),  # released files have none
        val=0.0 if "split" in args else about.get("val", 0.0),
        sensor_size=about["sensor_size"],
        frame_size=about["frame_size"],
        demo=demo,
        on_bad_sample=about.get("on_bad_sample", "skip" if data.get("on_bad_sample") == "skip" else "stop"),
    )


def _image_data(args: argparse.Namespace, _net: Any, recipe: Mapping[str, Any], data: Mapping[str, Any]) -> ImageData:
    about = {**_IMAGE_DEFAULTS, **recipe, **vars(args)}
    demo = about["demo"] and "data_dir" not in args
    crop = args.image_size if "image_size" in args else about["test_crop"] or about["image_size"]
    data_dir = _data_dir(args, demo, data)
    return load_image_data(write_demo_images(data_dir) if demo else data_dir, crop, for_training=False)


def _data_set_of(weights: Path, num_classes: int) -> str:
    for name, about in DATA_SETS.items():
        if about.num_classes == num_classes:
            return name
    raise UserError(
        f"weights file {weights} names no data set, and none of ours has {num_classes} classes; give the layout of the "
        f"data as --data-set {'|'.join(DATA_SETS)}"
    )


def _data_dir(args: argparse.Namespace, demo: bool, data: Mapping[str, Any]) -> Path:
    if "data_dir" in args and "demo" in args:
        raise UserError("--demo makes its own data; leave out either --demo or --data-dir")
    if "data_dir" in args:
        return args.data_dir
    if demo:
        return args.weights.parent / "demo_data"
    if not isinstance(data.get("folder"), str):
        raise UserError(f"the data of weights file {args.weights} are unknown; give --data-dir DIR, or --demo")
    return Path(data["folder"])

"""Export trained weights: to safetensors with what is known of them, back to .pt, as a folder for the Hugging Face hub,
or as a program of torch.export or ONNX.

    python tools/export.py weights output/dvs128/last.pt --output sma_azo_vgg8_dvs128.safetensors
    python tools/export.py hub     output/dvs128/last.pt --output sma_azo_vgg8_dvs128
    python tools/export.py show    sma_azo_vgg8_dvs128.safetensors
    python tools/export.py back    sma_azo_vgg8_dvs128.safetensors --output weights.pt
    python tools/export.py program sma_azo_vgg8_dvs128.safetensors --output sma_azo_vgg8_dvs128.pt2 --size 128
    python tools/export.py program output/dvs128/last.pt --freeze --output frozen.onnx

The metadata of a safetensors file are JSON: network, recipe, epoch and what selected it, accuracy, data, split,
versions. Its SHA-256 is written next to it (``sha256sum -c NAME.safetensors.sha256``) and checked whenever the file is
read. All scripts take the file as ``--weights``. The folder of ``hub`` is in the layout of the Hugging Face hub;
``models.load`` reads it.
``program --freeze`` replaces the attention weights of SMA by their means over training samples, and says what it costs.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

if not __package__:  # run as a file: the modules of the repository are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import SMA, VGG8
from models.frozen import freeze
from models.neurons import reset_net
from utils.analysis.attention import mean_weights
from utils.analysis.figures import draw_curves, save
from utils.analysis.inspection import Inspected, add_data, load_inspected
from utils.analysis.model_card import model_card
from utils.analysis.predictions import Collector
from utils.analysis.runs import read_metrics
from utils.analysis.statistics import mcnemar, paired_difference
from utils.args import size, stored_settings, whole
from utils.checked import write_checked
from utils.checkpoint import put_weights, read_weights
from utils.data.loaders import make_loaders
from utils.distributed import Process, start
from utils.engine import evaluate
from utils.errors import SentenceParser, UserError, exit_with_sentence, user_input
from utils.event_args import TABLE as EVENT_TABLE
from utils.exported import checksum_file, sha256_of, write_exported
from utils.facts import training_facts, training_in_words
from utils.files import Fields, read_json, replacing, write_text, writing
from utils.image_args import TABLE as IMAGE_TABLE
from utils.logger import progress_bar
from utils.networks import build_network, describe_network
from utils.versions import versions

__all__ = ["make_parser"]

_OF_A_RUN = (
    "recipe", "facts", "epoch", "epochs", "steps", "seed", "selection", "accuracy", "network", "source", "versions",
)  # fmt: skip
_ACCURACY = ("acc1", "acc5", "correct", "correct5", "count", "loss")


def export_weights(args: argparse.Namespace) -> None:
    """Write a safetensors file with metadata, and its checksum next to it."""
    weights, facts = _weights_and_facts(args)
    write_exported(weights, facts, args.output)
    print(f"{args.output}: {len(weights)} tensors, {_accuracy_in_words(facts)}")
    print(f"{checksum_file(args.output)}: SHA-256 {sha256_of(args.output)}")


def export_hub(args: argparse.Namespace) -> None:
    """Write a folder for the Hugging Face hub: weights, config.json, and a model card to complete."""
    weights, facts = _weights_and_facts(args)
    network, about = facts["network"], facts.get("facts", {})
    if "T" not in network:
        raise UserError(f"T of {args.file} is unknown: the network has no SMA, and the file has no recipe")
    if "data" in about:  # where they lie on this machine is for nobody else
        facts["facts"] = {**about, "data": {k: v for k, v in about["data"].items() if k != "folder"}}
    if "recipe" in facts:
        facts["recipe"] = {name: value for name, value in facts["recipe"].items() if name != "weights"}
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UserError(f"--output {args.output} exists already and is not empty; delete it or choose another name")
    config = {
        "network": network["name"],
        "keywords": {name: value for name, value in network.items() if name != "name"},
        "library_name": "pytorch",
    }
    curves = args.file.with_name("metrics.csv").exists()
    write_exported(weights, facts, args.output / "model.safetensors")
    with writing(f"--output {args.output}"):
        write_text(args.output / "config.json", json.dumps(config, indent=2) + "\n")
        write_text(args.output / "README.md", model_card(facts, args.license, curves))
    if curves:
        run = args.file.parent
        save(draw_curves({run.resolve().name: read_metrics(run)}), args.output / "curves.png")
    print(f"{args.output}: model.safetensors ({len(weights)} tensors), config.json, README.md: read and complete it")


def _weights_and_facts(args: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of ``args.file`` and what is known of them, in plain values."""
    weights, known = read_weights(args.file)
    network, keywords = describe_network(weights, known)
    return weights, {
        **{name: known[name] for name in _OF_A_RUN if name in known},
        **_known_of_run(args.file, known, args.evaluation),
        "network": {"name": network, **keywords},
        "source": {"name": args.file.name, "sha256": sha256_of(args.file)},
        "versions": versions(),
    }


def export_back(args: argparse.Namespace) -> None:
    """Write the weights of a safetensors file, and what is known of them, as a .pt file."""
    weights, known = read_weights(args.file)
    _check_new(args.output)
    write_checked({"model": weights, **known}, args.output)
    print(f"{args.output}: {len(weights)} tensors under 'model', {', '.join(known) or 'nothing'} with them")


def show(args: argparse.Namespace) -> None:
    """Print what is known of the weights of a file, as JSON."""
    weights, known = read_weights(args.file)
    known = {name: known[name] for name in _OF_A_RUN if name in known}
    network, keywords = describe_network(weights, known)
    print(json.dumps({**known, "network": {"name": network, **keywords}}, indent=2))


def export_program(args: argparse.Namespace) -> None:
    """Write the network in evaluation as a program of torch.export (.pt2) or ONNX (.onnx), and run it once."""
    if args.output.suffix == ".onnx":
        _check_onnx(args.output)
    weights, known = read_weights(args.file)
    net = build_network(weights, known)
    put_weights(net, weights, args.file)
    table = EVENT_TABLE if isinstance(net, VGG8) else IMAGE_TABLE
    height_width = args.size or _input_size(args.file, stored_settings(table, known, args.file), known)
    _check_new(args.output)
    frozen = _freeze(net, args) if args.freeze else {}
    example, batch_axis = _example(net, height_width, batch=2)
    with torch.no_grad(), warnings.catch_warnings(), user_input():
        # It warns of the membrane potentials. Every call of the program starts from 0, which is what is wanted.
        warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export")
        program = torch.export.export(
            net, (example,), dynamic_shapes=({batch_axis: torch.export.Dim("B", min=1)},), strict=False
        )
    shape = ["B" if axis == batch_axis else length for axis, length in enumerate(example.shape)]
    facts = {**{name: known[name] for name in _OF_A_RUN if name in known}, "input": shape, **frozen}
    to_bytes, run = (_onnx, _run_onnx) if args.output.suffix == ".onnx" else (_pt2, _run_pt2)
    content = to_bytes(program, json.dumps(facts))
    with writing(f"--output {args.output}"), replacing(args.output) as file:
        file.write(content)
    example, _ = _example(net, height_width, batch=3)
    reset_net(net)
    with torch.no_grad():
        difference = (run(args.output, example) - net(example)).abs().max().item()
    print(f"{args.output}: input {shape}; largest difference of its logits from the network's: {difference:g}")


def _known_of_run(path: Path, known: Mapping[str, Any], evaluation: Path | None) -> dict[str, Any]:
    """Epoch, what selected it, and the accuracy of the weights where a file of the run holds it."""
    trained = training_facts(known)
    if evaluation is not None:
        found = _read_evaluation(evaluation)
        if "acc1" not in found:
            raise UserError(f"--evaluation {evaluation} holds no acc1; give the evaluation.json that a script wrote")
        if found.get("sha256") not in (None, sha256_of(path)):
            raise UserError(
                f"--evaluation {evaluation} is of other weights ({found.get('weights')}); give that of {path}"
            )
    elif known.get("accuracy"):
        return trained
    else:
        found = _evaluation_next_to(path, trained)
    accuracy = {name: found[name] for name in _ACCURACY if name in found}
    best = known.get("best")
    if not accuracy and "best" in trained["selection"] and isinstance(best, Mapping) and "acc1" in best:
        accuracy = {"acc1": best["acc1"]}
    facts = {name: found[name] for name in ("data", "split", "precision") if name in found}
    return {**trained, **({"accuracy": accuracy} if accuracy else {}), **({"facts": facts} if facts else {})}


def _evaluation_next_to(path: Path, trained: Mapping[str, Any]) -> dict[str, Any]:
    """What a script wrote of an evaluation of these weights, or of the run whose final or selected epoch they are."""
    for name in (f"evaluation_of_{path.stem}.json", "evaluation.json"):
        if (file := path.with_name(name)).exists():
            found = _read_evaluation(file)
            theirs = found.get("selection") in trained["selection"].split(" and ")
            if found["sha256"] == sha256_of(path) if "sha256" in found else theirs:
                return found
    return {}


_EVALUATION: Fields = {"acc1": (float, None), "correct": (int, None), "count": (int, None), "sha256": (str, None)}


def _read_evaluation(path: Path) -> dict[str, Any]:
    return read_json(path, _EVALUATION, "the file that a script wrote")


def _accuracy_in_words(facts: Mapping[str, Any]) -> str:
    accuracy = facts.get("accuracy")
    if not accuracy or not isinstance(accuracy.get("acc1"), int | float):
        return "no accuracy known (give it by --evaluation evaluation.json)"
    counts = f" ({accuracy['correct']} of {accuracy['count']})" if {"correct", "count"} <= accuracy.keys() else ""
    return f"acc1 {accuracy['acc1']:.2f} %{counts}, epoch {training_in_words(facts)['epoch']}"


def _input_size(path: Path, recipe: Mapping[str, Any], known: Mapping[str, Any]) -> list[int]:
    """(H, W) of the input in an evaluation: of the recipe, or of the data that a run trained on."""
    found = next((recipe[n] for n in ("test_crop", "image_size", "frame_size", "sensor_size") if recipe.get(n)), None)
    if found is None and isinstance(known.get("facts"), Mapping) and isinstance(known["facts"].get("data"), Mapping):
        found = known["facts"]["data"].get("size")
    if found is None:
        raise UserError(f"file {path} does not say the size of the input; give it as --size, for instance --size 128")
    return found if isinstance(found, list) else [found, found]


def _example(net: nn.Module, height_width: list[int], batch: int) -> tuple[Tensor, int]:
    """A random input of the network, and which of its axes is the batch."""
    generator = torch.Generator().manual_seed(0)
    shape, axis = ([net.T, batch, 2], 1) if isinstance(net, VGG8) else ([batch, 3], 0)
    return torch.rand(*shape, *height_width, generator=generator), axis


def _freeze(net: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """Freeze every SMA of ``net``, and say what it costs on the test set: the facts of it."""
    with start(args.device, None) as process:
        inspected = load_inspected(argparse.Namespace(weights=args.file, **vars(args)), process, training=True)
        if not any(isinstance(module, SMA) for module in net.modules()):
            raise UserError(f"--freeze: the network of {args.file} has no SMA; leave --freeze out")
        train: Any = inspected.train
        chosen = range(0, len(train), -(-len(train) // args.samples))
        found = argparse.Namespace(train=None, val=None, test=Subset(train, chosen))
        *_, batches = make_loaders(found, args.batch_size, args.num_workers, 0, process)
        means = mean_weights(inspected.net, progress_bar(batches, "means", process), inspected.prepare, process.device)
        before = _correct(inspected, process)
        freeze(inspected.net, {name: weights.to(process.device) for name, weights in means.items()})
        after = _correct(inspected, process)
    freeze(net, means)
    change, low, high = (100 * value for value in paired_difference(before, after))
    lost, won, p = int((before & ~after).sum()), int((~before & after).sum()), mcnemar(before, after)
    was, now, count = int(before.sum()), int(after.sum()), len(before)
    print(
        f"frozen: means over {len(chosen)} of {len(train)} training samples; on the test set {was} of {count} correct "
        f"before and {now} after\n{change:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}; {lost} samples lost "
        f"and {won} won, p = {p:.2g} (McNemar)"
    )
    frozen = {"samples": len(chosen), "correct_before": was, "correct": now, "count": count, "lost": lost, "won": won}
    return {"frozen": {**frozen, "change": change, "change_low": low, "change_high": high, "p": p}}


def _correct(inspected: Inspected, process: Process) -> np.ndarray:
    """Whether each test sample is correct, ``[N]`` bool."""
    collector, batches = Collector(), progress_bar(inspected.batches, "test", process)
    evaluate(inspected.net, batches, collector, process.device, inspected.prepare)
    return collector.result().correct


def _pt2(program: torch.export.ExportedProgram, facts: str) -> bytes:
    content = io.BytesIO()  # torch aborts the process where it cannot write to a file
    torch.export.save(program, content, extra_files={"sma.json": facts})
    return content.getvalue()


def _run_pt2(path: Path, example: Tensor) -> Tensor:
    return torch.export.load(path).module()(example)


_ONNX = ("onnx", "onnxscript", "onnxruntime")


def _check_onnx(path: Path) -> None:
    missing = [name for name in _ONNX if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--output {path} needs {', '.join(missing)}: pip install {' '.join(_ONNX)}, or choose .pt2")


def _onnx(program: torch.export.ExportedProgram, facts: str) -> bytes:
    made = torch.onnx.export(program, dynamo=True, verbose=False)
    assert made is not None
    made.model.metadata_props["sma"] = facts
    return made.model_proto.SerializeToString()


def _run_onnx(path: Path, example: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: example.numpy()})[0])


def _check_new(path: Path) -> None:
    if path.exists():
        raise UserError(f"--output {path} exists already; delete it or choose another name")
    with writing(f"--output {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)


def make_parser() -> argparse.ArgumentParser:
    """The parser of this tool's command line."""
    parser = SentenceParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, function: Callable[[argparse.Namespace], None], output: str | None) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("file", type=Path, metavar="FILE", help="released, own or exported weights")
        if output:
            command.add_argument("--output", type=Path, required=True, metavar="FILE", help=output)
        return command

    weights = add("weights", export_weights, "a new .safetensors file")
    hub = add("hub", export_hub, "a new folder")
    for command in (weights, hub):
        command.add_argument(
            "--evaluation", type=Path, metavar="FILE",
            help="the evaluation.json of these weights (default: the one next to them, where it is theirs)",
        )  # fmt: skip
    hub.add_argument("--license", metavar="NAME", help="of the weights, for the model card (default: none)")
    add("show", show, None)
    add("back", export_back, "a new .pt file")
    program = add("program", export_program, "a new .pt2 or .onnx file")
    program.add_argument("--size", type=size(32), metavar="N|HxW", help="of the input (default: the recipe's)")
    program.add_argument("--freeze", action="store_true", help="replace the weights of SMA by their means")
    program.add_argument("--samples", type=whole(1), default=1000, metavar="N",
                         help="training samples for the means, evenly spread (default: 1000)")  # fmt: skip
    add_data(program, "data, with --freeze")
    return parser


def main() -> None:
    """Do what the command says."""
    args = make_parser().parse_args()
    args.function(args)


if __name__ == "__main__":
    exit_with_sentence(main)

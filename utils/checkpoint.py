"""Weights and checkpoints: reading released and own files safely, saving whole files only, resuming."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.distributed import Process, gather
from utils.errors import UserError

__all__ = ["Checkpoints", "describe_ms_resnet", "describe_vgg8", "load_weights", "read_weights"]

FORMAT = 1
_WRAPPERS = ("model", "net", "state_dict")
_PREFIXES = ("module.", "_orig_mod.")


def load_weights(net: nn.Module, path: str | Path) -> None:
    """Load the weights of a released or own file into ``net``, all of them or none.

    Prefixes of wrappers (``module.``, ``_orig_mod.``) are removed, dictionaries that wrap the weights (``model``,
    ``net``, ``state_dict``) are opened, and the one released file with other names (N-Caltech101) is renamed.

    Raises:
        UserError: the file is missing, damaged or no weights file, or its names and shapes are not those of ``net``.
    """
    weights, _ = read_weights(path)
    _put_weights(net, weights, path)


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a weights file without running any code of it.

    Returns:
        The state dict under the names of this project, and whatever plain values lay beside it (for a file of this
        project: ``epoch``, ``recipe``, ...; empty for a bare state dict).
    """
    return _unwrap(_read(path), path)


def _unwrap(content: Mapping, path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict inside the content of a file, under our names, and what lies beside it."""
    beside: dict[str, Any] = {}
    while not _is_state_dict(content):
        key = next((k for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None)
        if key is None:
            raise UserError(
                f"file {path} holds no weights: its entries are {sorted(map(str, content))[:8]}, and a state dict or "
                f"one under {', '.join(_WRAPPERS)} is needed"
            )
        beside = {**beside, **{k: v for k, v in content.items() if k != key}}
        content = content[key]
    return {_our_name(name): value for name, value in content.items()}, beside


def describe_vgg8(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tell the constructor arguments of an SMA-VGG8 from the names and shapes of its weights.

    Returns:
        ``num_classes``, ``width``, ``sma_blocks`` and, where there is SMA, ``timesteps`` and ``branch_activation``;
        an empty dictionary where these are not the weights of a VGG8.
    """
    first, last = weights.get("block1.0.0.weight"), weights.get("others.8.weight")
    if first is None or last is None:
        return {}
    blocks = [n for n in range(1, 6) if f"block{n}.1.T_before_attention_conv.weight" in weights]
    found = {"num_classes": last.shape[0], "width": first.shape[0] / 64, "sma_blocks": blocks}
    if blocks:
        sma = f"block{blocks[0]}.1."
        found["timesteps"] = weights[sma + "T_before_attention_conv.weight"].shape[1]
        found["branch_activation"] = "relu" if sma + "S_Convs.0.bn.bn.weight" in weights else "lif"
    return found


def describe_ms_resnet(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tell the constructor arguments of an SMA-MS-ResNet from the names and shapes of its weights.

    Returns:
        ``num_classes``, ``width``, ``net`` (``"resnet18"``, ...), ``sma_blocks`` and, where there is SMA,
        ``timesteps``; an empty dictionary where these are not the weights of one of the three networks.
    """
    first, last = weights.get("conv1.0.weight"), weights.get("fc.weight")
    stages = [len({name.split(".")[1] for name in weights if name.startswith(f"conv{n}_x.")}) for n in range(2, 6)]
    nets = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34", (3, 8, 32, 8): "resnet104"}
    if first is None or last is None or tuple(stages) not in nets:
        return {}
    suffix = ".residual_function.2.T_before_attention_conv.weight"
    with_sma = [name for name in weights if name.endswith(suffix)]
    found = {"num_classes": last.shape[0], "width": first.shape[0] / 64, "net": nets[tuple(stages)]}
    places = {0: "none", 8: "first-two", sum(stages): "all"}
    if len(with_sma) in places and len(places) == 3:  # in ResNet-18 the first two blocks of a stage are all of them
        found["sma_blocks"] = places[len(with_sma)]
    if with_sma:
        found["timesteps"] = weights[with_sma[0]].shape[1]
    return found


def _read(path: str | Path) -> Mapping:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"file {path} does not exist; give the path of a .pt or .pth file")
    try:
        with path.open("rb") as file:
            head = file.read(512).lstrip()
    except OSError as error:
        raise UserError(f"file {path} cannot be read: {error.strerror or error}") from error
    if not head:
        raise UserError(f"file {path} is empty; download or copy it again")
    if head[:1] == b"<":
        raise UserError(
            f"file {path} is a web page, not weights; open the link in a browser and download the file itself"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types on a damaged file
        if "Unsupported global" in str(error):
            raise UserError(
                f"file {path} holds more than tensors and plain values and is not opened, because such a file can run "
                "code; save its state_dict() alone where it came from"
            ) from error
        raise UserError(f"file {path} is damaged or is no weights file; download or copy it again") from error
    if not isinstance(content, Mapping):
        raise UserError(f"file {path} holds a {type(content).__name__} and no state dict")
    return content


def _put_weights(net: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    problem = _mismatch(weights, net.state_dict())
    if problem:
        raise UserError(f"weights file {path} does not fit this network: {problem}")
    net.load_state_dict(weights, strict=True)


def _is_state_dict(content: Mapping) -> bool:
    return bool(content) and all(isinstance(value, Tensor) for value in content.values())


def _our_name(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    # The N-Caltech101 script put the first BatchNorm into the container of its convolution.
    return "block1.1.0." + name.removeprefix("block1.0.1.") if name.startswith("block1.0.1.") else name


def _mismatch(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What differs in names and shapes, in words; empty where nothing does."""
    for name, value in weights.items():
        if name.endswith("T_before_attention_conv.weight") and name in expected:
            theirs, ours = value.shape[1], expected[name].shape[1]
            if theirs != ours:
                return f"it was trained with T={theirs} and the network is built for T={ours}; T is part of the weights"
    found = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": [
            f"{name} {list(value.shape)} instead of {list(expected[name].shape)}"
            for name, value in weights.items()
            if name in expected and value.shape != expected[name].shape
        ],
    }
    return "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in found.items() if names)


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class Checkpoints:
    """``last.pt`` and ``best.pt`` of a run, and continuing from them.

    A file holds the weights under ``model`` (without wrapper prefixes), the states of whatever is named in
    ``parts``, the random state of every process, the epochs done and the recipe: tensors and plain values only.

    Args:
        directory: the output directory; only the first process writes there.
        recipe: the settings that the result depends on, plain values.
        net: the network that is evaluated (itself, not its wrapper): its weights go under ``model``.
        parts: optimiser, schedule, scaler, and the trained network where an average of it is evaluated: everything
            else with ``state_dict`` / ``load_state_dict``. None is left out.
    """

    def __init__(self, directory: Path, recipe: dict[str, Any], process: Process, net: nn.Module, **parts: Any):
        self.directory, self.recipe, self.process = directory, recipe, process
        self.net, self.parts = net, {name: part for name, part in parts.items() if part is not None}
        self.best: dict[str, float] = {"acc1": -1.0, "epoch": 0}

    def resume(self, how: str) -> int:
        """Continue where a run stopped, if there is one.

        Args:
            how: ``"auto"`` continues ``last.pt`` of the output directory where there is one, ``"never"`` insists on
                an empty output directory, anything else is the checkpoint file to continue.

        Returns:
            The number of epochs already done.

        Raises:
            UserError: the run to continue has another recipe, or a run would be overwritten.
        """
        last = self.directory / "last.pt"
        if how == "never":
            if last.exists():
                raise UserError(
                    f"--output-dir {self.directory} already holds a run; choose another --output-dir, or continue it "
                    "with --resume auto"
                )
            return 0
        if how == "auto":
            if not last.exists():
                return 0
            source = last
        else:
            source = Path(how)
            if last.exists() and source.resolve().parent != self.directory.resolve():
                raise UserError(
                    f"--resume {source} would overwrite the run in --output-dir {self.directory}; choose another one"
                )
        state = _read(source)
        missing = {"format", "model", "epoch", "best", "recipe", "rng", *self.parts} - state.keys()
        if missing:
            raise UserError(
                f"file {source} is no checkpoint of a run: it lacks {', '.join(sorted(missing))}; "
                "weights alone are loaded with --weights"
            )
        differing = [
            f"{key} is {state['recipe'].get(key)} there and {value} here"
            for key, value in self.recipe.items()
            if state["recipe"].get(key) != value
        ]
        if differing:
            raise UserError(
                f"the run in {source} has another recipe: {'; '.join(differing)}; give the same settings to continue "
                "it, or another --output-dir"
            )
        _put_weights(self.net, _unwrap(state, source)[0], source)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.best = state["best"]
        if len(state["rng"]) == self.process.world_size:
            _set_random_state(state["rng"][self.process.rank], self.process.device)
        return state["epoch"]

    def save(self, epoch: int, acc1: float) -> None:
        """Save ``last.pt`` after ``epoch`` epochs, and ``best.pt`` where ``acc1`` (percent) is the best so far."""
        rng = gather(_random_state(self.process.device))
        is_best = acc1 > self.best["acc1"]
        if is_best:
            self.best = {"acc1": acc1, "epoch": epoch}
        if not self.process.is_first:
            return
        state = {
            "format": FORMAT,
            "model": self.net.state_dict(),
            **{name: part.state_dict() for name, part in self.parts.items()},
            "rng": rng,
            "epoch": epoch,
            "best": self.best,
            "recipe": self.recipe,
        }
        if is_best:
            _save_whole(state, self.directory / "best.pt")
        _save_whole(state, self.directory / "last.pt")


def _save_whole(state: dict[str, Any], path: Path) -> None:
    """Write beside, flush to the disk, rename: a kill at any moment leaves the old file or the new one."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise UserError(
            f"checkpoint {path} cannot be written: {error.strerror or error}; the previous one is whole"
        ) from error


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)

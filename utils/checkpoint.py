"""Weights and checkpoints: the names inside released and own files, saving and continuing a run."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.checked import check_weights, read_checked, write_checked
from utils.data.splits import changes
from utils.distributed import Process, any_process, gather
from utils.engine import Progress
from utils.errors import UserError
from utils.exported import SUFFIX, read_exported
from utils.files import DamagedFileError, read_text, same_file_as
from utils.versions import versions

__all__ = ["Checkpoints", "load_weights", "put_weights", "read_weights"]

FORMAT = 4  # 3: one dropout mask a step, another ImageNet schedule, another --decay
_WRAPPERS = ("model", "net", "state_dict")
_PREFIXES = ("module.", "_orig_mod.")
_LATER = {"val": 0.0, "tf32": True}  # settings that older runs do not name, as they had them
_SAMPLES = ("split_fingerprint", "samples")  # of a recipe
_MAY_BEGIN_LATER = "azo"  # the record of what AZO replaces changes nothing in a run
# As this program writes them; anything else under these names is ignored.
_KINDS = {
    "epoch": int, "recipe": Mapping, "facts": Mapping, "best": Mapping, "versions": Mapping, "accuracy": Mapping,
    "selection": str, "steps": int,
}  # fmt: skip


def load_weights(net: nn.Module, path: str | Path) -> None:
    """Load the weights of a released, own or exported (safetensors) file into ``net``, all of them or none.

    Prefixes of wrappers (``module.``, ``_orig_mod.``) are removed, dictionaries that wrap the weights (``model``,
    ``net``, ``state_dict``) are opened, and the one released file with other names (N-Caltech101) is renamed.

    Raises:
        UserError: the file is missing, damaged or no weights file, or its names and shapes are not those of ``net``.
    """
    weights, _ = read_weights(path)
    put_weights(net, weights, path)


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a weights file without running any code of it.

    Returns:
        The state dict under the names of this project, and the plain values stored with it (for a file of this
        project: ``epoch``, ``recipe``, ...; empty for a bare state dict).
    """
    path = Path(path)
    return _unwrap(read_exported(path) if path.suffix == SUFFIX else read_checked(path)[0], path)


def _unwrap(content: Mapping, path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict inside the content of a file, under our names, and the plain values stored with it."""
    known: dict[str, Any] = {}
    seen: list[Mapping] = []
    while not _is_state_dict(content):
        key = next((k for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None)
        if key is None:
            raise UserError(
                f"file {path} holds no weights: its entries are {sorted(map(str, content))[:8]}, and a state dict or "
                f"one under {', '.join(_WRAPPERS)} is needed"
            )
        if any(content is one for one in seen):
            raise UserError(f"file {path} holds no weights: its entry {key!r} contains itself; give another file")
        seen.append(content)
        known |= {k: v for k, v in content.items() if k != key and isinstance(v, _KINDS.get(k, object))}
        content = content[key]
    check_weights(content, path)
    return {_our_name(name): value for name, value in content.items()}, known


def put_weights(net: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Put weights read from ``path`` into ``net``, all of them or none.

    Raises:
        UserError: their names and shapes are not those of ``net``.
    """
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
        "of another type": [
            f"{name} {value.dtype} instead of {expected[name].dtype}"
            for name, value in weights.items()
            if name in expected and value.is_floating_point() != expected[name].is_floating_point()
        ],
    }
    return "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in found.items() if names)


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class Checkpoints:
    """``last.pt`` and ``best.pt`` of a run, and continuing from them.

    A file holds the weights under ``model`` (without wrapper prefixes), the states of whatever is named in
    ``parts``, the random state and the progress of every process, the epochs done, the recipe and the versions of the
    libraries: tensors and plain values only, and a checksum. ``previous.pt`` is the checkpoint before ``last.pt``, for
    when that is damaged.

    Args:
        directory: the output directory; only the first process writes there.
        recipe: the settings that the result depends on, plain values.
        net: the network that is evaluated (itself, not its wrapper): its weights go under ``model``.
        progress: of the epoch, in this process.
        keep_every: also keep the checkpoint of every so many epochs, as ``epoch_<n>.pt``; 0: none.
        facts: of the run, plain values: what the weights were trained on.
        manifest: the text of its split's file, which names samples that changed.
        parts: optimiser, schedule, scaler, and the trained network where an average of it is evaluated: everything
            else with ``state_dict`` / ``load_state_dict``. None is left out.
    """

    def __init__(
        self,
        directory: Path,
        recipe: dict[str, Any],
        process: Process,
        net: nn.Module,
        progress: Progress,
        keep_every: int = 0,
        facts: Mapping[str, Any] | None = None,
        manifest: str | None = None,
        **parts: Any,
    ):
        self.directory, self.recipe, self.process, self.keep_every = directory, recipe, process, keep_every
        self.facts, self.manifest = dict(facts or {}), manifest
        self.net, self.progress = net, progress
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.best: dict[str, float] = {"acc1": -1.0, "epoch": 0}
        self.last = directory / "last.pt"
        self._newest: Path | None = None  # the checkpoint that the state of this run was saved to or read from

    def resume(self, how: str) -> int:
        """Continue where a run stopped, if there is one.

        Args:
            how: ``"auto"`` continues ``last.pt`` of the output directory where there is one (where it is damaged, the
                newest checkpoint that is whole), ``"never"`` insists on an output directory without a run, anything
                else is the checkpoint file to continue.

        Returns:
            The number of epochs already done.

        Raises:
            UserError: the run to continue has another recipe, or a run would be overwritten, or none of its checkpoints
                can be read. Nothing is loaded then.
        """
        if self.process.is_first:
            for leftover in self.directory.glob(".*.pt.partial"):  # of a save that was killed
                leftover.unlink()
        existing = self._existing()
        if how == "never":
            if existing:
                raise UserError(
                    f"--output-dir {self.directory} already holds a run; choose another --output-dir, or continue it "
                    "with --resume auto"
                )
            return 0
        if how == "auto":
            if not existing:
                self._agree(None)
                return 0
            source, state, checksum = self._newest_whole(existing)
        else:
            source = Path(how)
            if existing and source.resolve().parent != self.directory.resolve():
                raise UserError(
                    f"--resume {source} would overwrite the run in --output-dir {self.directory}; continue that run "
                    "with --resume auto, or choose another --output-dir"
                )
            state, checksum = self._read(source)
        self._agree((*_position(state), checksum))
        there = {**_LATER, **state["recipe"]}
        differing = [
            f"{key} is {there.get(key)} there and {value} here"
            for key, value in self.recipe.items()
            if there.get(key) != value
        ]
        settings = {key: value for key, value in self.recipe.items() if key not in _SAMPLES}
        if differing and self.manifest is not None and all(there.get(key) == settings[key] for key in settings):
            before = read_text(source.with_name("split.txt"))
            if before is not None and (changed := changes(before, self.manifest)):
                raise UserError(
                    f"the samples of the run in {source} have changed: {_some(changed, 3)}; restore them, or choose "
                    "another --output-dir"
                )
        if differing:
            raise UserError(
                f"the run in {source} has another recipe: {'; '.join(differing)}; give the same settings to continue "
                "it, or another --output-dir"
            )
        same_processes = len(state["processes"]) == self.process.world_size
        if not same_processes and state["processes"][0]["progress"]["step"]:
            raise UserError(
                f"the run in {source} was stopped inside epoch {state['epoch'] + 1} of {len(state['processes'])} "
                f"process(es) and there are {self.process.world_size}; continue it with as many"
            )
        if not same_processes and self.process.is_first:
            print(
                f"the run in {source} had {len(state['processes'])} process(es) and has {self.process.world_size} now: "
                "random states start anew, and a batch per process makes another global batch",
                file=sys.stderr,
            )
        if state["versions"] != versions() and self.process.is_first:
            changed = [f"{name} {was}" for name, was in state["versions"].items() if versions().get(name) != was]
            print(
                f"the run in {source} was made with {', '.join(changed)}: the last digits may differ", file=sys.stderr
            )
        later = how != "auto" and self._has_later(source, _position(state))
        if any_process(later):
            raise UserError(
                f"--resume {source} would go back in --output-dir {self.directory}, which holds later checkpoints; "
                "give another --output-dir"
            )
        self._load(state, source, same_processes)
        earlier = state["facts"].get("starts", [])
        self.facts["starts"] = [*earlier, *(one for one in self.facts.get("starts", []) if one not in earlier)]
        self.best = state["best"]
        self._newest = source
        if self.process.is_first:
            self._keep_best(source, _position(state))
        self.best = gather(self.best)[0]
        return state["epoch"]

    def _agree(self, found: tuple[int, int, str] | None) -> None:
        """Check that all processes found the same checkpoint, or all none: each would go on from its own."""
        founds = gather(found)
        if any(one != founds[0] for one in founds):
            words = ["none" if one is None else f"epoch {one[0]}, step {one[1]}" for one in founds]
            raise UserError(
                f"the processes find different checkpoints in --output-dir {self.directory} ({'; '.join(words)}); "
                "give all of them one folder, on several machines a shared one"
            )

    def _load(self, state: Mapping, source: Path, same_processes: bool) -> None:
        """Load all of a checkpoint; where a part of it does not fit, everything stays as it was."""
        before = {name: copy.deepcopy(part.state_dict()) for name, part in self.parts.items()}
        random_before = _random_state(self.process.device)
        name = "processes"
        try:
            if same_processes:
                own = state["processes"][self.process.rank]
                _set_random_state(own["rng"], self.process.device)
            for name, part in self.parts.items():
                if name == _MAY_BEGIN_LATER and name not in state:
                    continue
                if before[name] and not state[name]:
                    raise ValueError("it is empty")
                part.load_state_dict(state[name])
            put_weights(self.net, _unwrap(state, source)[0], source)
        except Exception as error:  # a part raises whatever its library does on a state that is not its own
            for loaded, part in self.parts.items():
                part.load_state_dict(before[loaded])
            _set_random_state(random_before, self.process.device)
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"checkpoint {source} cannot be continued: its {name} does not fit ({error}); its weights can be "
                "loaded with --weights into another --output-dir"
            ) from error
        if same_processes:
            self.progress.load_state_dict(own["progress"])

    def _has_later(self, source: Path, position: tuple[int, int]) -> bool:
        """Whether the output directory holds a checkpoint of a later moment than ``position``, that of ``source``."""
        for path in self._existing():
            try:
                if path != source and _position(self._read(path)[0]) > position:
                    return True
            except UserError:  # damaged: its own message comes where it is needed
                continue
        return False

    def _keep_best(self, source: Path, position: tuple[int, int]) -> None:
        """In a new output directory ``source`` is the best epoch's file, or the best is unknown and starts anew."""
        if (self.directory / "best.pt").exists():
            return
        if position == (self.best["epoch"], 0):
            self.directory.mkdir(parents=True, exist_ok=True)
            same_file_as(source, self.directory / "best.pt")
        else:
            self.best = {"acc1": -1.0, "epoch": 0}

    def save_inside(self, epochs_done: int) -> None:
        """Save in the middle of the epoch after ``epochs_done``, with its progress."""
        self._save(epochs_done)

    @property
    def best_file(self) -> Path:
        """The checkpoint of the best epoch."""
        return self.directory / "best.pt"

    def save(self, epoch: int, acc1: float) -> None:
        """Save ``last.pt`` after ``epoch`` epochs, and ``best.pt`` where ``acc1`` (percent) is the best so far.

        The progress inside the epoch starts anew.
        """
        self.progress.reset()
        names = [f"epoch_{epoch:04}.pt"] if self.keep_every and epoch % self.keep_every == 0 else []
        if acc1 > self.best["acc1"]:
            self.best = {"acc1": acc1, "epoch": epoch}
            names.append("best.pt")
        self._save(epoch, names)

    def _save(self, epochs_done: int, other_names: Sequence[str] = ()) -> None:
        """Save ``last.pt``, also under other names; where it fails, it fails in every process."""
        weights = self.net.state_dict()
        own = {"rng": _random_state(self.process.device), "progress": self.progress.state_dict()}
        processes = gather(own)
        states = {name: part.state_dict() for name, part in self.parts.items()}
        if not gather(_is_finite([weights, states]))[0]:  # those that would be saved
            raise UserError(
                f"{self.last} stays as it was: a weight, a running statistic or the optimiser is not finite; lower --lr"
            )
        problem = None
        if self.process.is_first:
            state = {
                "format": FORMAT,
                "model": weights,
                **states,
                "processes": processes,
                "epoch": epochs_done,
                "best": self.best,
                "recipe": self.recipe,
                "facts": self.facts,
                "versions": versions(),
            }
            try:
                self._write(state, other_names)
            except UserError as error:
                problem = str(error)
        if problem := gather(problem)[0]:
            raise UserError(problem)

    def _write(self, state: dict[str, Any], other_names: Sequence[str]) -> None:
        previous = self.directory / "previous.pt"
        # A damaged last.pt must not take the place of the whole checkpoint that this run was continued from.
        if self._newest is not None and self._newest.resolve() != previous.resolve():
            same_file_as(self._newest, previous)
        write_checked(state, self.last)
        self._newest = self.last
        for name in other_names:
            same_file_as(self.last, self.directory / name)

    def _existing(self) -> list[Path]:
        """The checkpoints of the run, ``last.pt`` first."""
        others = [
            self.directory / "previous.pt",
            *sorted(self.directory.glob("epoch_*.pt")),
            self.directory / "best.pt",
        ]
        return [path for path in (self.last, *others) if path.exists()]

    def _read(self, path: Path) -> tuple[Mapping, str]:
        """A checkpoint of this program, and its checksum."""
        state, checksum = read_checked(path)
        kinds = {
            "format": int, "model": Mapping, "processes": list, "epoch": int, "best": Mapping, "recipe": Mapping,
            "facts": Mapping, "versions": Mapping,
        }  # fmt: skip
        missing = {*kinds, *self.parts} - state.keys() - {_MAY_BEGIN_LATER}
        if missing:
            raise UserError(
                f"file {path} is no checkpoint of a run: it lacks {', '.join(sorted(missing))}; "
                "weights alone are loaded with --weights"
            )
        if state["format"] != FORMAT:
            raise UserError(
                f"checkpoint {path} has format {state['format']} and this program continues format {FORMAT}: dropout, "
                "the ImageNet schedule and --decay changed in between (CHANGELOG.md); start anew from its weights with "
                "--weights into another --output-dir"
            )
        wrong = [name for name, kind in kinds.items() if not isinstance(state[name], kind)]
        wrong += [name for name in ("processes", "best") if name not in wrong and not _FITS[name](state[name])]
        if wrong or not checksum:
            reason = f"its {', '.join(wrong)} is of another kind" if wrong else "it does not end with its checksum"
            raise DamagedFileError(f"file {path} is damaged: {reason}")
        return state, checksum

    def _newest_whole(self, paths: list[Path]) -> tuple[Path, Mapping, str]:
        whole, damaged = [], []
        for path in paths:
            try:
                whole.append((path, *self._read(path)))
            except DamagedFileError as error:
                damaged.append(str(error))
            if whole and path == self.last:
                break  # nothing is newer
        if not whole:
            raise UserError(
                f"no checkpoint of the run in --output-dir {self.directory} can be read ({'; '.join(damaged)}); "
                "choose another --output-dir"
            )
        path, state, checksum = max(whole, key=lambda one: _position(one[1]))
        if path != self.last and self.process.is_first:
            reason = "; ".join(damaged) or f"{self.last} is not there"
            print(f"{reason}; continuing from {path}, epoch {state['epoch']}", file=sys.stderr)
        return path, state, checksum


def _position(state: Mapping) -> tuple[int, int]:
    """Epochs done, and steps of the next one."""
    return state["epoch"], state["processes"][0]["progress"]["step"]


def _is_process(state: Any) -> bool:
    return (
        isinstance(state, Mapping)
        and isinstance(state.get("rng"), Mapping)
        and isinstance(state["rng"].get("cpu"), Tensor)
        and isinstance(state.get("progress"), Mapping)
        and isinstance(state["progress"].get("sums"), Tensor)
        and all(isinstance(state["progress"].get(name), int) for name in ("step", "count", "skips", "streak"))
    )


# What a checkpoint holds one level down.
_FITS = {
    "processes": lambda states: bool(states) and all(map(_is_process, states)),
    "best": lambda best: isinstance(best.get("acc1"), float) and isinstance(best.get("epoch"), int),
}


def _is_finite(value: Any) -> bool:
    """Whether all floating-point tensors in nested containers are finite."""
    found = [one.isfinite().all() for one in _tensors(value) if one.is_floating_point() and one.numel()]
    by_device: dict[torch.device, list[Tensor]] = {one.device: [] for one in found}
    for one in found:
        by_device[one.device].append(one)
    return all(bool(torch.stack(some).all()) for some in by_device.values())  # one wait for a device


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(one)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)

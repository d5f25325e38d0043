"""The ledger: one small folder of results/ for every run whose numbers this project reports.

    python tools/ledger.py add output/dvs128                       make an entry of a finished run
    python tools/ledger.py table                                   write the tables of docs/results.md
    python tools/ledger.py verify dvs128 --data-dir data/dvs128    run its command again and compare
    python tools/ledger.py verify dvs128 --data-dir data/dvs128 --weights FILE    evaluate its weights only

An entry holds the command, the commit and the machine of every start, versions, data and split by their fingerprints,
metrics.csv, accuracies with counts, and a checksum of the weights; the weights stay outside. With the same commit,
versions, machine and number of threads, a CPU must give the same bits again. Elsewhere two results agree where their
difference is at most 3.29 sqrt(p (1 - p) / N + q (1 - q) / N), for accuracies p and q on N test samples. That is the
99.9 % interval of the sampling error: a wide one, because two trainings that round differently scatter as two seeds do,
which comes on top. The exit code of verify is 0 where the result is confirmed, and 1 where it is not.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not __package__:  # run as a file: the modules of the repository are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.compare import sampling_error
from utils.analysis.runs import read_metrics, read_run_file
from utils.analysis.tables import between, markdown_table
from utils.args import words
from utils.checkpoint import read_weights
from utils.data.splits import RULES
from utils.errors import SentenceParser, UserError, exit_with_sentence
from utils.facts import training_facts
from utils.files import Fields, check_fields, read_json, read_text, write_text, writing
from utils.logger import write_json
from utils.networks import TITLES

__all__ = ["AUTHORS", "add", "compare", "entry_of", "main", "make_parser", "page", "read_entries", "weights_checksum"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
PAGE = ROOT / "docs" / "results.md"
Z = 3.29  # see the top
BEGIN, END = "<!-- ledger: written by tools/ledger.py table -->", "<!-- end of the ledger -->"

_VGG, _RESNET = TITLES["VGG8"], TITLES["sma_ms_resnet104"]
DATA = {
    "dvs128": "DVS128 Gesture",
    "cifar10dvs": "CIFAR10-DVS",
    "ncaltech101": "N-Caltech101",
    "imagenet": "ImageNet-1K",
}
# Percent, from the paper (best test epoch): by data, network and attention.
AUTHORS = {
    ("dvs128", _VGG, "none"): "97.92 (282/288)",
    ("dvs128", _VGG, "SMA"): "98.3 (283/288)",
    ("dvs128", _VGG, "SMA + AZO"): "98.6 (284/288)",
    ("cifar10dvs", _VGG, "SMA"): "82.6",
    ("cifar10dvs", _VGG, "SMA, ReLU branches"): "83.1",
    ("cifar10dvs", _VGG, "SMA + AZO"): "about 84.0 (read off a figure)",
    ("ncaltech101", _VGG, "SMA"): "82.9",
    ("ncaltech101", _VGG, "SMA, ReLU branches"): "83.7",
    ("ncaltech101", _VGG, "SMA + AZO"): "84.6 (quoted by another paper)",
    ("imagenet", _RESNET, "SMA + AZO"): "77.1",
}
_SHOWN = {"seed", "AZO", "sma_blocks", "branch_activation", "net", "demo"}  # in columns of their own

_A_RUN, _AN_ENTRY = "the --output-dir of a run of this version", "the folder of an entry in results/"
_FIELDS: Fields = {
    "starts": list, "versions": dict, "deviations": dict, "data": dict, "split": dict, "network": dict, "batch": dict,
    "device": str,
}  # fmt: skip
# Where a run's files are is nobody's business. What the name stands for in an entry's command; nothing: it is left out.
_PATHS = {"--data-dir": "DIR", "--weights": "FILE", "--split": "FILE"} | dict.fromkeys(
    ("--output-dir", "--model-output-dir", "--log-dir", "--resume", "--local-rank", "--local_rank"), ""
)


def weights_checksum(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict: the same in whatever file it lies."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def entry_of(run: Path) -> dict[str, Any]:
    """What the ledger keeps of a run, but for ``metrics.csv``.

    Raises:
        UserError: its files are missing or damaged, or it was started by another program than the four scripts.
    """
    facts, metrics = read_run_file(run, "args.json"), read_metrics(run)
    path = run / "args.json"
    check_fields(facts, {**_FIELDS, "argv": list}, path, _A_RUN)
    check_fields(facts["args"], {"epochs": int, "seed": int, "demo": bool}, path, _A_RUN)
    epochs, count = facts["args"]["epochs"], facts["split"]["test"]
    finished = metrics["epoch"][-1] == epochs and (run / "evaluation.json").exists()
    curve = metrics.get("test_acc1")  # none of a run that evaluates the test set once, at its end

    def of(row: int, acc1: float) -> dict[str, Any]:
        correct = round(acc1 * count / 100)
        return {"epoch": int(metrics["epoch"][row]), "acc1": 100 * correct / count, "correct": correct, "count": count}

    best = None
    if curve is not None:
        result = {**of(-1, curve[-1]), "loss": metrics["test_loss"][-1], "selection": "final"}
        best = of(max(range(len(curve)), key=curve.__getitem__), max(curve))
    elif not finished:
        raise UserError(f"run {run} is not finished and has no result yet; the same command continues it")
    if finished:
        evaluation = read_run_file(run, "evaluation.json")
        wanted: Fields = {"epoch": int, "acc1": float, "correct": int, "count": int, "loss": float, "selection": str}
        check_fields(evaluation, wanted, run / "evaluation.json", _A_RUN)
        result = {name: evaluation[name] for name in wanted}
    deviations = {
        name: [value if not isinstance(value, str) else Path(value).name for value in values]
        for name, values in facts["deviations"].items()
    }
    split = {**facts["split"], "file": facts["split"].get("file") and Path(facts["split"]["file"]).name}
    return {
        "command": _command(facts),
        "finished": finished,
        "epochs": epochs,
        "seed": facts["args"]["seed"],
        "result": result,
        "best": best,
        "weights": _checksum_of(run, result["epoch"]),
        **{name: facts[name] for name in _FIELDS},
        "data": {name: value for name, value in facts["data"].items() if name != "folder"},
        "split": split,
        "deviations": deviations,
    }


def _command(facts: Mapping[str, Any]) -> list[str]:
    """The command of a run without its paths."""
    script, *given = map(str, facts["argv"])
    if not (ROOT / Path(script).name).is_file():
        raise UserError(
            f"the run was started by {script}, which is none of the four scripts; only their runs can be added"
        )
    processes = facts["batch"]["processes"]
    kept = ["python"] if processes == 1 else ["torchrun", "--nproc_per_node", str(processes)]
    kept.append(Path(script).name)
    rest = iter(given)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag not in _PATHS:
            kept.append(word)
            continue
        value = value if equals else next(rest)
        shown = _PATHS[flag]
        if flag == "--split" and (value in RULES or ROOT in Path(value).resolve().parents):
            shown = value if value in RULES else str(Path(value).resolve().relative_to(ROOT))
        kept += [flag, shown] if shown else []
    return kept if facts["args"]["demo"] or "--data-dir" in kept else [*kept, "--data-dir", "DIR"]


def _checksum_of(run: Path, epoch: int) -> str | None:
    """Of the weights after that epoch, if the run still has them."""
    for path in (run / "last.pt", run / "best.pt"):
        if path.exists():
            weights, known = read_weights(path)
            if known.get("epoch") == epoch and not training_facts(known)["steps"]:
                return weights_checksum(weights)
    return None


def add(run: Path, name: str, changed: bool = False, unfinished: bool = False) -> Path:
    """Make an entry of a run.

    Args:
        run: its output directory.
        name: of the entry's folder.
        changed: also where the code is not that of one commit.
        unfinished: also where the run stopped before its last epoch.

    Returns:
        The folder.

    Raises:
        UserError: the entry exists, or the run is not fit for the ledger.
    """
    entry, folder = entry_of(run), RESULTS / name
    if not re.fullmatch(r"[\w.-]+", name) or folder.exists():
        taken = "exists already; delete it" if folder.exists() else "is no name of letters, digits, _, . and -"
        raise UserError(f"entry {folder.relative_to(RESULTS.parent)} {taken}, or give another --name")
    problem = _problem_of_code(entry["starts"])
    if problem and not changed:
        raise UserError(f"run {run} {problem}; commit, and run it again, or mark the entry with --changed")
    if not entry["finished"] and not unfinished:
        raise UserError(
            f"run {run} is not finished: {entry['result']['epoch']} of {entry['epochs']} epochs; the same command "
            "continues it, or mark the entry with --unfinished"
        )
    if entry["finished"] and entry["weights"] is None:
        raise UserError(
            f"run {run} has no weights of epoch {entry['result']['epoch']} in last.pt or best.pt any more, which the "
            "entry needs for its checksum; run it again"
        )
    with writing(f"entry {folder}"):
        write_json(folder / "entry.json", entry)
        write_text(folder / "metrics.csv", read_text(run / "metrics.csv") or "")
    return folder


def _problem_of_code(starts: Sequence[Mapping[str, Any]]) -> str:
    """Why the code of a run is not that of one commit; empty where it is."""
    commits = {start["commit"] for start in starts}
    if None in commits or not starts:
        return "was not started from a git checkout"
    if any(start["changed"] for start in starts):
        return f"was started from files that differ from commit {starts[0]['commit'][:10]}"
    return f"was continued with other code (commits {', '.join(c[:10] for c in commits)})" if len(commits) > 1 else ""


def read_entry(folder: Path) -> dict[str, Any]:
    """``entry.json`` of an entry.

    Raises:
        UserError: it is missing or damaged.
    """
    fields: Fields = {**_FIELDS, "command": list, "finished": bool, "result": dict, "best": (dict, None), "seed": int}
    return read_json(folder / "entry.json", fields, _AN_ENTRY)


def read_entries() -> dict[str, dict[str, Any]]:
    """All entries, by name."""
    return {path.parent.name: read_entry(path.parent) for path in sorted(RESULTS.glob("*/entry.json"))}


def page(text: str, entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of docs/results.md with the tables of these entries between the marks.

    Raises:
        UserError: it has not both marks.
    """
    published = {name: one for name, one in entries.items() if one["split"]["official"]}
    others = {name: one for name, one in entries.items() if name not in published}
    tables = [_published_table(published), _other_table(others)]
    return between(text, BEGIN, END, "\n\n".join(tables), PAGE)


def _published_table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    head = [
        "data",
        "network",
        "attention",
        "the authors, quoted",
        "final epoch",
        "best test epoch",
        "chosen on held-out",
    ]
    table = [[*head, "seed", "differs from the recipe in", "entry"]]
    keys = {name: (one["data"]["name"], one["network"]["name"], _attention(one)) for name, one in entries.items()}
    all_keys = dict.fromkeys([*AUTHORS, *keys.values()])
    for key in sorted(all_keys, key=lambda key: list(DATA).index(key[0])):
        row = [DATA[key[0]], *key[1:], AUTHORS.get(key, "")]
        ours = [
            [*_accuracies(one), str(one["seed"]), _differs(one), _link(name, one)]
            for name, one in entries.items()
            if keys[name] == key
        ]
        table += [[*row, *cells] for cells in ours or [[""] * 6]]
    return markdown_table(table)


def _other_table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    head = ["data", "samples", "network", "attention", "epochs", "final epoch", "best test epoch", "chosen on held-out"]
    table = [[*head, "seed", "machine", "entry"]]
    for name, one in entries.items():
        network, split, size = one["network"], one["split"], one["data"]["size"]
        samples = f"{split['train']} training, {split['test']} test, split {split['fingerprint']}"
        built = f"{network['name']}, width {network['width']:g}, T = {network['timesteps']}, {size[0]}x{size[1]}"
        made = [str(one["seed"]), one["starts"][-1]["machine"], _link(name, one)]
        results = [str(one["epochs"]), *_accuracies(one)]
        table.append([one["data"]["title"], samples, built, _attention(one), *results, *made])
    return markdown_table(table)


def _attention(entry: Mapping[str, Any]) -> str:
    network = entry["network"]
    if words(network["sma_blocks"]) == "none":
        return "none"
    branches = ", ReLU branches" if network.get("branch_activation") == "relu" else ""
    return f"SMA{branches}{' + AZO' if network['AZO'] else ''}"


def _accuracies(entry: Mapping[str, Any]) -> list[str]:
    """Of the final epoch, of the best on the test set, and of the one that held-out samples chose."""
    result, best = entry["result"], entry["best"]
    if best is not None:
        return [_in_words(result), f"{_in_words(best)}, epoch {best['epoch']}", ""]
    return ["", "", f"{_in_words(result)}, epoch {result['epoch']} ({result['selection']})"]


def _in_words(result: Mapping[str, Any]) -> str:
    return f"{result['acc1']:.2f} % ({result['correct']}/{result['count']})"


def _differs(entry: Mapping[str, Any]) -> str:
    changed = {name: values for name, values in entry["deviations"].items() if name not in _SHOWN}
    return ", ".join(
        f"{name} {words(used) or 'unset'} ({words(was) or 'unset'})" for name, (was, used) in changed.items()
    )


def _link(name: str, entry: Mapping[str, Any]) -> str:
    marks = ["changed files"] * bool(_problem_of_code(entry["starts"])) + ["unfinished"] * (not entry["finished"])
    return f"[{name}](../results/{name}/entry.json)" + (f" ({', '.join(marks)})" if marks else "")


def compare(
    entry: Mapping[str, Any], again: Mapping[str, Any], rows: str = "", rows_again: str = ""
) -> tuple[bool, str]:
    """Whether a second result confirms an entry, and why.

    Args:
        entry, again: as :func:`entry_of` gives them; without ``weights`` where the entry's own were evaluated.
        rows, rows_again: their ``metrics.csv``; none of an evaluation.
    """
    # An evaluation of photographs reads the test set alone, which has other fingerprints.
    for what in ("test", "fingerprint", "contents") if again["split"]["train"] else ("test",):
        if entry["split"][what] != again["split"][what]:
            return False, f"other data: {what} of the split is {again['split'][what]}, not {entry['split'][what]}"
    was, found = entry["result"], again["result"]
    first = _first_difference(rows, rows_again)
    same_weights = again.get("weights", entry["weights"]) == entry["weights"]
    if first is None and same_weights and all(found[name] == was[name] for name in ("correct", "count", "loss")):
        return True, f"bit-equal: {_in_words(found)}, the loss{', every epoch and the weights' if rows else ''}"
    at = "" if first is None else f" from epoch {first} on"
    differing = _set_up_differs(entry, again)
    if not differing:
        return False, f"not bit-equal{at}, with the same commit, versions, machine and threads"
    allowed = Z * sampling_error(found["acc1"], was["acc1"], found["count"], was["count"])
    difference = abs(found["acc1"] - was["acc1"])
    within = difference <= allowed
    return within, (
        f"{'within' if within else 'beyond'} sampling error: {_in_words(found)} here, {_in_words(was)} there, "
        f"{difference:.2f} points apart and {allowed:.2f} allowed; not bit-equal{at}, and not the same: {differing}"
    )


def _first_difference(rows: str, again: str) -> str | None:
    """The first epoch whose row is another, but for the seconds; None where all are equal."""
    tables = []
    for text in (rows, again):
        table = csv.DictReader(io.StringIO(text))
        tables.append([{name: value for name, value in row.items() if name != "seconds"} for row in table])
    longest = max(map(len, tables))
    padded = [table + [{}] * (longest - len(table)) for table in tables]
    return next((str(number) for number, (a, b) in enumerate(zip(*padded, strict=True), 1) if a != b), None)


def _set_up_differs(entry: Mapping[str, Any], again: Mapping[str, Any]) -> str:
    """In what two results were made differently, so that equal bits are not promised; empty where they were not."""

    def about(one: Mapping[str, Any]) -> dict[str, str]:
        starts = {
            name: " and ".join(dict.fromkeys(str(start[name]) for start in one["starts"]))
            for name in ("commit", "machine", "threads")
        }
        return {**one["versions"], **starts}

    here, there = about(again), about(entry)
    found = [
        f"{name} ({here.get(name, 'none')} here, {there.get(name, 'none')} there)"
        for name in dict.fromkeys([*there, *here])
        if here.get(name) != there.get(name)
    ]
    found += ["a GPU may add up in another order"] * any(one["device"] != "CPU" for one in (entry, again))
    found += ["changed files"] * any(start["changed"] for one in (entry, again) for start in one["starts"])
    return "; ".join(found)


def verify(folder: Path, data_dir: Path | None, weights: Path | None) -> tuple[bool, str]:
    """Run the command of an entry again, or evaluate its weights, and :func:`compare`.

    Raises:
        UserError: the entry cannot be verified so, or the run failed.
    """
    entry = read_entry(folder)
    if not entry["finished"]:
        raise UserError(f"entry {folder.name} is of an unfinished run, which has no result to verify")
    launcher, *command = entry["command"]
    if "DIR" in command and data_dir is None:
        raise UserError(f"entry {folder.name} needs --data-dir DIR, the folder of {entry['data']['title']}")
    command = [str(data_dir.resolve()) if data_dir and word == "DIR" else word for word in command]
    command += ["--device", "cpu"] * (entry["device"] == "CPU")  # also where there is a GPU
    if weights is not None:
        found = weights_checksum(read_weights(weights)[0])
        if found != entry["weights"]:
            return False, f"{weights} holds other weights, of checksum {found[:16]}, not {entry['weights'][:16]}"
        if "--weights" in command:  # those that the training started from
            del command[command.index("--weights") : command.index("--weights") + 2]
        command += ["--evaluate", "--weights", str(weights.resolve())]
    if "FILE" in command:
        raise UserError(
            f"entry {folder.name} was made with a file outside the repository, in place of which its command has FILE "
            f"({' '.join(entry['command'])}); run the command by hand"
        )
    python = [sys.executable, *(["-m", "torch.distributed.run"] if launcher == "torchrun" else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(entry["starts"][-1]["threads"])}
    with tempfile.TemporaryDirectory() as output:
        done = subprocess.run([*python, *command, "--output-dir", output], cwd=ROOT, env=environment, check=False)
        if done.returncode:
            raise UserError(f"the command of entry {folder.name} ended with exit code {done.returncode}; see above")
        if weights is not None:
            evaluation = read_run_file(Path(output), "evaluation.json")
            return compare(entry, {**{name: evaluation[name] for name in _FIELDS}, "result": evaluation})
        again, rows = entry_of(Path(output)), read_text(Path(output) / "metrics.csv")
    return compare(entry, again, read_text(folder / "metrics.csv") or "", rows or "")


def make_parser() -> argparse.ArgumentParser:
    """The parser of this tool's command line."""
    parser = SentenceParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="add|table|verify")
    new = commands.add_parser("add", help="make an entry of a finished run", description=__doc__)
    new.add_argument("run", type=Path, metavar="RUN_DIR", help="its output directory, with its weights")
    new.add_argument("--name", help="of the entry (default: the name of RUN_DIR)")
    new.add_argument("--changed", action="store_true", help="also if the code was not that of one commit; it is marked")
    new.add_argument("--unfinished", action="store_true", help="also if the run is not finished; it is marked")
    commands.add_parser("table", help="write the tables of docs/results.md", description=__doc__)
    again = commands.add_parser("verify", help="run an entry's command again and compare", description=__doc__)
    again.add_argument("entry", type=Path, metavar="ENTRY", help="its name, or its folder in results/")
    again.add_argument("--data-dir", type=Path, metavar="DIR", help="folder of the data; a demo needs none")
    again.add_argument(
        "--weights", type=Path, metavar="FILE", help="its weights: they are evaluated, not trained again"
    )
    return parser


def main() -> None:
    """Add, write or verify."""
    args = make_parser().parse_args()
    if args.command == "add":
        folder = add(args.run, args.name or args.run.resolve().name, args.changed, args.unfinished)
        print(f"written to {folder}; then: python tools/ledger.py table")
    elif args.command == "table":
        with writing(str(PAGE)):
            write_text(PAGE, page(PAGE.read_text(encoding="utf-8"), read_entries()))
        print(f"written to {PAGE}")
    else:
        confirmed, why = verify(RESULTS / args.entry.name, args.data_dir, args.weights)
        print(f"{args.entry.name} is {'confirmed' if confirmed else 'NOT confirmed'}: {why}", flush=True)
        sys.exit(not confirmed)


if __name__ == "__main__":
    exit_with_sentence(main, "the same command starts again")

"""The ledger: what becomes an entry and what is refused, the tables, and when a second result confirms a first."""

import copy
import json
import re

import pytest
import torch

from tests.conftest import ROOT, SMALL
from tests.test_operations import run_tool
from tools import ledger
from utils.checkpoint import read_weights
from utils.exported import write_exported

COMMIT = "0123456789abcdef0123456789abcdef01234567"
START = {"commit": COMMIT, "changed": False, "machine": "a CPU, 2 cores, 1 thread(s)", "threads": 1}
WEIGHTS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(3)}


def write_run(path, accuracies=(50.0, 75.0, 62.5), epochs=3, **changes):
    """The files of a run on 8 test samples."""
    path.mkdir(parents=True)
    facts = {
        "starts": [START],
        "versions": {"torch": "2"},
        "deviations": {"seed": [3401, 7], "epochs": [200, epochs], "weights": [None, f"{path}/first.pt"]},
        "data": {"name": "dvs128", "title": "DVS128 Gesture", "folder": str(path), "size": [128, 128]},
        "split": {"rule": "own", "file": None, "fingerprint": "01234567", "contents": "c", "train": 9, "test": 8,
                  "official": True, "demo": False},
        "network": {"name": "SMA-VGG8", "sma_blocks": [2, 3], "branch_activation": "lif", "AZO": True, "width": 1.0,
                    "timesteps": 16},
        "batch": {"processes": 1, "global": 9},
        "device": "CPU",
        **changes,
    }  # fmt: skip
    argv = [f"{path}/vgg8_dvs128_SMA.py", "--data-dir", str(path), f"--output-dir={path}", "--seed", "7"]
    args = {"epochs": epochs, "seed": 7, "demo": False}
    (path / "args.json").write_text(json.dumps({"args": args, "argv": argv, **facts}))
    lines = ["epoch,train_loss,train_acc1,test_loss,test_acc1,lr,seconds"]
    lines += [f"{n},1,50,0.5,{accuracy},0.1,60" for n, accuracy in enumerate(accuracies, 1)]
    (path / "metrics.csv").write_text("\n".join(lines) + "\n")
    done = len(accuracies)
    torch.save({"model": WEIGHTS, "epoch": done, "recipe": {"epochs": epochs}}, path / "last.pt")
    if done == epochs:
        acc1 = accuracies[-1]
        result = {"epoch": done, "acc1": acc1, "correct": int(acc1 * 8 / 100), "count": 8, "loss": 0.5}
        (path / "evaluation.json").write_text(json.dumps({**result, "selection": "final", **facts}))
    return path


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    """A ledger without entries."""
    monkeypatch.setattr(ledger, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def tool(monkeypatch, capsys, *arguments):
    return run_tool(monkeypatch, capsys, ledger.main, *arguments)


def test_an_entry_holds_the_run_without_its_paths(tmp_path, results, monkeypatch, capsys):
    run = write_run(tmp_path / "run1")
    assert tool(monkeypatch, capsys, "add", run)[0] == 0
    text = (results / "run1/entry.json").read_text()
    entry = json.loads(text)
    assert str(tmp_path) not in text
    assert " ".join(entry["command"]) == "python vgg8_dvs128_SMA.py --data-dir DIR --seed 7"
    assert (entry["starts"], entry["split"]["fingerprint"], entry["seed"]) == ([START], "01234567", 7)
    result = {"epoch": 3, "acc1": 62.5, "correct": 5, "count": 8, "loss": 0.5, "selection": "final"}
    assert entry["result"] == result and entry["best"] == {"epoch": 2, "acc1": 75.0, "correct": 6, "count": 8}
    assert entry["weights"] == ledger.weights_checksum(WEIGHTS)
    assert (results / "run1/metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()
    code, _, err = tool(monkeypatch, capsys, "add", run)
    assert code == 2 and "entry results/run1 exists already" in err


@pytest.mark.parametrize(
    ("changes", "flag", "words"),
    [
        ({"starts": [{**START, "changed": True}]}, "--changed", "files that differ from commit 0123456789"),
        ({"starts": [{**START, "commit": None, "changed": None}]}, "--changed", "not started from a git checkout"),
        ({"starts": [START, {**START, "commit": "f" * 40}]}, "--changed", "was continued with other code"),
        ({"epochs": 4}, "--unfinished", "is not finished: 3 of 4 epochs"),
    ],
)
def test_an_unfit_run_is_refused_or_marked(changes, flag, words, tmp_path, results, monkeypatch, capsys):
    run = write_run(tmp_path / "run", **changes)
    code, _, err = tool(monkeypatch, capsys, "add", run)
    assert code == 2 and words in err and not results.exists()
    other = ({"--changed", "--unfinished"} - {flag}).pop()
    assert tool(monkeypatch, capsys, "add", run, other)[0] == 2
    assert tool(monkeypatch, capsys, "add", run, flag)[0] == 0
    mark = "changed files" if flag == "--changed" else "unfinished"
    assert f"(../results/run/entry.json) ({mark}) |" in ledger.page(ledger.BEGIN + ledger.END, ledger.read_entries())


def test_a_run_of_another_program_or_without_its_weights_is_refused(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run")
    torch.save({"model": WEIGHTS, "epoch": 2, "recipe": {"epochs": 3}}, run / "last.pt")
    code, _, err = tool(monkeypatch, capsys, "add", run)
    assert code == 2 and "no weights of epoch 3" in err
    described = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps({**described, "argv": ["study.py"]}))
    code, _, err = tool(monkeypatch, capsys, "add", run)
    assert code == 2 and "started by study.py, which is none of the four scripts" in err
    (run / "args.json").write_text(json.dumps({**described, "starts": None}))
    code, _, err = tool(monkeypatch, capsys, "add", run)
    assert code == 2 and '"starts" in' in err and "a run of this version" in err


def test_an_epoch_chosen_on_held_out_samples_is_in_its_own_column(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run")
    names = ("epoch", "train_loss", "train_acc1", "lr", "seconds", "val_acc1")  # the test set was evaluated once
    monkeypatch.setattr(ledger, "read_metrics", lambda path: {name: [1.0, 2.0, 3.0] for name in names})
    evaluation = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps({**evaluation, "selection": "val"}))
    ledger.add(run, "run")
    assert "|  |  | 62.50 % (5/8), epoch 3 (val) | 7 |" in ledger.page(ledger.BEGIN + ledger.END, ledger.read_entries())
    (run / "evaluation.json").unlink()
    code, _, err = tool(monkeypatch, capsys, "add", run, "--name", "other", "--unfinished")
    assert code == 2 and "is not finished and has no result yet" in err


def test_the_checksum_is_of_the_tensors_not_of_the_file(tmp_path):
    torch.save({"module.a": WEIGHTS["a"], "module.b": WEIGHTS["b"].t().contiguous().t()}, tmp_path / "w.pt")
    write_exported(WEIGHTS, {}, tmp_path / "w.safetensors")
    expected = ledger.weights_checksum(WEIGHTS)
    for file in ("w.pt", "w.safetensors"):
        assert ledger.weights_checksum(read_weights(tmp_path / file)[0]) == expected
    b = WEIGHTS["b"]
    changed = [{"b": b.nextafter(b + 1)}, {"b": b.reshape(3, 2)}, {"b": b.view(torch.int32)}, {"c": b}]
    assert len({expected, *(ledger.weights_checksum({**WEIGHTS, **one}) for one in changed)}) == 5
    assert ledger.weights_checksum({"half": b.bfloat16()}) != ledger.weights_checksum({"half": b.half()})


@pytest.fixture
def entry(tmp_path):
    return ledger.entry_of(write_run(tmp_path / "an_entry"))


def test_equal_bits_confirm_and_other_bits_on_the_same_set_up_do_not(entry):
    rows = "epoch,test_acc1,seconds\n1,50,9\n2,60,9\n"
    assert ledger.compare(entry, copy.deepcopy(entry), rows, rows.replace(",9", ",8")) == (
        True,
        "bit-equal: 62.50 % (5/8), the loss, every epoch and the weights",
    )
    confirmed, why = ledger.compare(entry, entry, rows, rows.replace("60", "61"))
    assert not confirmed and why.startswith("not bit-equal from epoch 2 on, with the same commit")
    assert not ledger.compare(entry, entry, rows, rows + "3,60,9\n")[0]
    confirmed, why = ledger.compare(entry, {**entry, "weights": "0"}, rows, rows)
    assert not confirmed and why.startswith("not bit-equal, with")


# 5 of 8 are 62.5 %. Against 8 or 0 of 8, 3.29 * sqrt(0.625 * 0.375 / 8) = 56.3 points are allowed.
@pytest.mark.parametrize(("correct", "confirmed"), [(8, True), (0, False)])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"versions": {"torch": "3"}}, "not the same: torch (3 here, 2 there)"),
        ({"starts": [{**START, "threads": 2}]}, "not the same: threads (2 here, 1 there)"),
        ({"starts": [{**START, "commit": "f" * 40}]}, f"not the same: commit ({'f' * 40} here, {COMMIT} there)"),
        ({"starts": [{**START, "changed": True}]}, "not the same: changed files"),
        ({"device": "a GPU"}, "not the same: a GPU may add up in another order"),
    ],
)
def test_elsewhere_the_sampling_error_decides(entry, change, words, correct, confirmed):
    result = {**entry["result"], "correct": correct, "acc1": 12.5 * correct}
    found, why = ledger.compare(entry, {**entry, "result": result, **change})
    assert (found, why.startswith("within" if confirmed else "beyond")) == (confirmed, True)
    assert f"({correct}/8) here, 62.50 % (5/8) there" in why and "56.31 allowed" in why and why.endswith(words)


def test_other_data_confirm_nothing(entry):
    other = {**entry["split"], "contents": "d"}
    assert ledger.compare(entry, {**entry, "split": other}) == (False, "other data: contents of the split is d, not c")
    # An evaluation of photographs does not know those of the training.
    assert ledger.compare(entry, {**entry, "split": {**other, "train": 0}})[0]
    confirmed, why = ledger.compare(entry, {**entry, "split": {**other, "train": 0, "test": 9}})
    assert not confirmed and why == "other data: test of the split is 9, not 8"


def test_what_verify_needs_is_a_sentence_and_other_weights_are_not_evaluated(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run")
    ledger.add(run, "run")
    monkeypatch.setattr(ledger.subprocess, "run", None)  # nothing is started
    code, _, err = tool(monkeypatch, capsys, "verify", "run")
    assert code == 2 and "entry run needs --data-dir DIR, the folder of DVS128 Gesture" in err
    torch.save({**WEIGHTS, "a": torch.tensor(4)}, tmp_path / "w.pt")
    code, out, _ = tool(monkeypatch, capsys, "verify", "results/run", "--data-dir", run, "--weights", tmp_path / "w.pt")
    assert code == 1 and out.startswith("run is NOT confirmed:") and "holds other weights" in out
    code, _, err = tool(monkeypatch, capsys, "verify", "nothing")
    assert code == 2 and "does not exist; give the folder of an entry" in err


def test_the_tables_put_ours_beside_the_authors(tmp_path):
    ledger.add(write_run(tmp_path / "run"), "gesture")
    text = ledger.page(f"above\n{ledger.BEGIN}\nold\n{ledger.END}\nbelow\n", ledger.read_entries())
    assert text.startswith("above\n") and text.endswith(f"{ledger.END}\nbelow\n") and "old" not in text
    row = (
        "| DVS128 Gesture | SMA-VGG8 | SMA + AZO | 98.6 (284/288) | 62.50 % (5/8) | 75.00 % (6/8), epoch 2 |  | 7 | "
        "epochs 3 (200), weights first.pt (unset) | [gesture](../results/gesture/entry.json) |"
    )
    assert row in text.splitlines()
    assert "| CIFAR10-DVS | SMA-VGG8 | SMA | 82.6 |  |  |  |  |  |  |" in text.splitlines()
    assert ledger.page(text, ledger.read_entries()) == text


def test_the_committed_page_is_what_the_tool_writes(monkeypatch):
    monkeypatch.setattr(ledger, "RESULTS", ROOT / "results")
    text = ledger.PAGE.read_text(encoding="utf-8")
    entries = ledger.read_entries()
    assert ledger.page(text, entries) == text
    assert {"dvs128_demo", "imagenet_demo"} <= entries.keys()
    for folder in (ROOT / "results").iterdir():
        assert sorted(path.name for path in folder.iterdir()) == ["entry.json", "metrics.csv"]
        assert not re.search(r'"/', (folder / "entry.json").read_text())  # no path of a machine


def test_the_authors_numbers_are_those_of_the_readme():
    results = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Results")[2].partition("\n## ")[0]
    for quoted in ledger.AUTHORS.values():
        assert quoted in results, quoted


@pytest.mark.slow
def test_a_run_is_confirmed_by_its_command_and_by_its_weights(script, gesture_data, tmp_path, monkeypatch, capsys):
    run, flags = tmp_path / "run", ["--data-dir", gesture_data]
    assert script("dvs128", *SMALL, *flags, "--epochs", 2, "--RTR", 2, "--output-dir", run)[0] == 0
    ledger.add(run, "run", changed=True)
    code, out, err = tool(monkeypatch, capsys, "verify", "run", *flags)
    assert code == 0 and "run is confirmed: bit-equal:" in out and "and the weights" in out, out + err
    code, out, err = tool(monkeypatch, capsys, "verify", "run", *flags, "--weights", run / "last.pt")
    assert code == 0 and re.search(r"run is confirmed: bit-equal: .*, the loss$", out, re.MULTILINE), out + err


@pytest.mark.slow
def test_the_demo_of_the_ledger_is_confirmed(launch):
    done = launch(["tools/ledger.py", "verify", "dvs128_demo"], timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("dvs128_demo is confirmed: ")

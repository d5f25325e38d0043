"""Runs side by side: statistics against numbers worked out by hand, and what must not be compared."""

import csv
import json
import math
import shutil

import pytest

from tests.conftest import SMALL, rows
from tests.test_operations import run_tool
from tools import compare


def write_run(
    path, seed, accuracies, count=200, epochs=None, data="DVS128 Gesture", contents="a", batch=36, **settings
):
    """The files of a finished run."""
    path.mkdir(parents=True)
    lines = ["epoch,train_loss,train_acc1,test_loss,test_acc1,lr,seconds"]
    lines += [f"{n},1,50,1,{accuracy},0.1,2" for n, accuracy in enumerate(accuracies, 1)]
    (path / "metrics.csv").write_text("\n".join(lines) + "\n")
    args = {"seed": seed, "epochs": epochs or len(accuracies), "AZO": True, "output_dir": str(path), **settings}
    facts = {
        "data": {"name": "dvs128", "title": data, "folder": str(path)}, "batch": {"global": batch},
        "split": {"rule": "own", "fingerprint": "01234567", "contents": contents},
    }  # fmt: skip
    (path / "args.json").write_text(json.dumps({"args": args, **facts}))
    evaluation = {"acc1": accuracies[-1], "count": count, "selection": "final", **facts}
    (path / "evaluation.json").write_text(json.dumps(evaluation))
    return path


@pytest.fixture
def five(tmp_path):
    """Three seeds with AZO and two without."""
    runs = [write_run(tmp_path / f"azo{n}", n, [50, 92, final]) for n, final in enumerate((88, 90, 92))]
    return runs + [write_run(tmp_path / f"no{n}", n, [10, 80, final], AZO=False) for n, final in enumerate((70, 74))]


def test_mean_standard_deviation_and_n_over_seeds(five):
    with_azo, without = compare.group_runs([compare.read_run(path) for path in five])
    assert (with_azo.name, without.name) == ("AZO on", "AZO off")
    assert (len(with_azo.runs), with_azo.mean("final"), with_azo.std("final")) == (3, 90, 2)
    assert (without.mean("final"), without.std("final")) == (72, pytest.approx(math.sqrt(8)))
    assert (with_azo.mean("best"), [run.best_epoch for run in with_azo.runs]) == (92, [2, 2, 2])


def test_a_difference_is_held_against_both_errors(five):
    final, best = compare.differences(compare.group_runs([compare.read_run(path) for path in five]))
    assert (final["epoch"], final["difference"]) == ("final", -18)
    # sqrt(0.9 * 0.1 / 200 + 0.72 * 0.28 / 200), in points
    assert final["sampling_error"] == pytest.approx(3.8183766)
    assert final["seed_error"] == pytest.approx(math.sqrt(4 / 3 + 8 / 2))
    assert final["above_sampling_error"] and final["above_seed_error"]
    assert best["seed_error"] == 0 and best["above_sampling_error"]


def test_a_small_difference_of_one_seed_each_says_nothing(tmp_path, monkeypatch, capsys):
    runs = [write_run(tmp_path / "a", 1, [90]), write_run(tmp_path / "b", 1, [93], AZO=False)]
    code, out, err = run_tool(monkeypatch, capsys, compare.main, *runs, "--csv")
    assert code == 0, err
    assert "| AZO on | AZO off | final | +3.00 | 2.78 | no |  | one seed |" in out
    assert "A group of one seed has no standard deviation" in out and "selected on the test set" in out
    assert (tmp_path / "compare.md").read_text() in out
    with (tmp_path / "compare.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["group"], first["n"], first["final_mean"], first["final_std"]) == ("AZO on", "1", "90", "")
    assert second["runs"] == str(runs[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": "CIFAR10-DVS", "contents": "b"}, "differ in data (CIFAR10-DVS / DVS128 Gesture)"),
        ({"contents": "b"}, "differ in data (a / b)"),
        ({"count": 100}, "differ in test samples (100 / 200)"),
        ({"seed": 1, "accuracies": [80]}, "same settings and seed 1"),
        ({"epochs": 9}, "is not finished: 1 of 9 epochs"),
    ],
)
def test_what_must_not_be_compared_is_refused(change, words, tmp_path, monkeypatch, capsys):
    runs = [write_run(tmp_path / "a", 1, [90])]
    runs.append(write_run(tmp_path / "b", **{"seed": 2, "accuracies": [80], **change}))
    code, _, err = run_tool(monkeypatch, capsys, compare.main, *runs)
    assert code == 2 and words in err and not (tmp_path / "compare.md").exists()


def test_unlike_runs_are_compared_only_with_a_warning_in_the_table(tmp_path, monkeypatch, capsys):
    runs = [write_run(tmp_path / "a", 1, [90]), write_run(tmp_path / "b", 2, [80], count=100)]
    code, out, _ = run_tool(monkeypatch, capsys, compare.main, *runs, "--unlike", "--output-dir", tmp_path / "new")
    assert code == 0 and out.startswith("**Not the same test samples (100 / 200)")
    assert (tmp_path / "new/compare.md").exists()


def test_a_run_with_held_out_samples_stands_in_its_own_column(tmp_path, monkeypatch, capsys):
    runs = [write_run(tmp_path / "a", 1, [90]), write_run(tmp_path / "b", 2, [80, 70], val=0.1)]
    metrics, evaluation = runs[1] / "metrics.csv", runs[1] / "evaluation.json"
    head = "epoch,train_loss,train_acc1,test_loss,test_acc1,lr,seconds,val_loss,val_acc1"
    metrics.write_text(f"{head}\n1,1,50,,,0.1,2,1,80\n2,1,50,,,0.1,2,1,70\n")
    evaluation.write_text(json.dumps({**json.loads(evaluation.read_text()), "selection": "val", "acc1": 75.5}))
    found = json.loads((runs[1] / "args.json").read_text())
    found["split"]["fingerprint"] = "89abcdef"
    (runs[1] / "args.json").write_text(json.dumps(found))
    code, _, err = run_tool(monkeypatch, capsys, compare.main, *runs)
    assert code == 2 and "differ in split (01234567 / 89abcdef)" in err
    code, out, _ = run_tool(monkeypatch, capsys, compare.main, *runs, "--unlike", "--csv")
    assert code == 0 and "| final epoch, % | best epoch, % | epoch chosen on held-out samples, % |" in out
    assert "| epochs 1, val unset | 1 | 1 | 200 | 90.00 | 90.00 |  | 1 |" in out
    assert "| epochs 2, val 0.1 | 1 | 2 | 200 |  |  | 75.50 | 1 |" in out
    assert "sampling error" not in out  # no two accuracies of one kind
    with (tmp_path / "compare.csv").open(newline="") as file:
        assert [(row["final_mean"], row["val_mean"]) for row in csv.DictReader(file)] == [("90", ""), ("", "75.5")]


def test_runs_of_other_numbers_of_processes_are_no_seeds_of_one_group(tmp_path):
    runs = [write_run(tmp_path / f"{n}", n, [90], batch_size=9, batch=batch) for n, batch in enumerate((36, 36, 9))]
    groups = compare.group_runs([compare.read_run(path) for path in runs])
    assert [(group.name, len(group.runs)) for group in groups] == [("global batch 36", 2), ("global batch 9", 1)]


def test_seeds_on_copies_of_the_data_are_one_group_and_other_contents_are_not(tmp_path):
    runs = [write_run(tmp_path / f"{n}", n, [90], data=f"copy{n}, laid out as DVS128 Gesture") for n in range(5)]
    runs.append(write_run(tmp_path / "other", 9, [90], data="DVS128 Gesture", contents="b"))
    groups = compare.group_runs([compare.read_run(path) for path in runs])
    assert [(group.name, len(group.runs)) for group in groups] == [
        ("copy0, laid out as DVS128 Gesture", 5), ("DVS128 Gesture", 1),
    ]  # fmt: skip
    # Frames of another T cannot be compared: the names of the samples decide.
    runs = [write_run(tmp_path / f"T{n}", n, [90], contents=str(n), timesteps=n) for n in (4, 8)]
    assert compare.what_differs(compare.group_runs([compare.read_run(path) for path in runs])) == []


@pytest.mark.slow
def test_five_seeds_on_folders_of_their_own_are_one_group(script, gesture_data, tmp_path, monkeypatch, capsys):
    """Runs as the script writes them, on copies of the data; one was continued in another folder."""
    command = [*SMALL, "--epochs", 2, "--keep-every", 1]
    runs = []
    for seed in range(5):
        data, output = tmp_path / f"data{seed}", tmp_path / f"run{seed}"
        shutil.copytree(gesture_data / "events_np", data / "events_np")
        code, _, err = script("dvs128", *command, "--data-dir", data, "--seed", seed, "--output-dir", output)
        assert code == 0, err
        runs.append(output)
    more = ["--data-dir", data, "--seed", seed, "--resume", runs[-1] / "epoch_0001.pt"]
    assert script("dvs128", *command, *more, "--output-dir", tmp_path / "continued")[0] == 0
    assert rows(tmp_path / "continued") == rows(runs.pop())
    runs.append(tmp_path / "continued")
    # An evaluation next to the weights, of other data, is none of the run's results.
    before = [(run / "evaluation.json").read_bytes() for run in runs]
    arguments = ["--evaluate", "--weights", runs[0] / "last.pt", "--data-dir", gesture_data, "--device", "cpu"]
    assert script("dvs128", *arguments)[0] == 0 and script("dvs128", *arguments, "--output-dir", runs[0])[0] == 0
    assert (runs[0] / "evaluation_of_last.json").exists()
    assert [(run / "evaluation.json").read_bytes() for run in runs] == before

    code, out, err = run_tool(monkeypatch, capsys, compare.main, *runs, "--csv")
    assert code == 0, err
    with (tmp_path / "compare.csv").open(newline="") as file:
        (group,) = csv.DictReader(file)
    assert (group["n"], group["seeds"], group["test_samples"]) == ("5", "0 1 2 3 4", "11") and "| all runs | 5 |" in out


def test_a_table_that_cannot_be_written_is_a_sentence(five, tmp_path, monkeypatch, capsys):
    (tmp_path / "out/compare.md").mkdir(parents=True)
    code, _, err = run_tool(monkeypatch, capsys, compare.main, *five, "--output-dir", tmp_path / "out")
    assert code == 2 and f"--output-dir {tmp_path}/out cannot be written: Is a directory" in err


def test_a_folder_that_is_no_run_is_a_sentence(tmp_path, monkeypatch, capsys):
    code, _, err = run_tool(monkeypatch, capsys, compare.main, tmp_path / "nothing")
    assert code == 2 and "give the --output-dir of a run" in err

"""Training samples that are held out (--val): which ones, that they select the epoch, and that the test comes once."""

import dataclasses
import hashlib
import itertools
import json
import os
import signal

import pytest
import torch

from tests.conftest import SCRIPTS, SMALL, rows, same_weights
from tests.test_operations import run_tool
from tests.test_train_amp import SMALL as SMALL_IMAGES
from tests.test_train_amp import write_images
from tools import compare, export, visualize
from utils import engine
from utils.analysis.runs import read_metrics
from utils.checked import write_checked
from utils.checkpoint import read_weights
from utils.data.events import flip_and_shift, load_event_data
from utils.data.images import load_image_data
from utils.data.loaders import make_loaders
from utils.data.splits import held_out
from utils.distributed import Process
from utils.errors import UserError
from utils.exported import read_exported

FRAMES = {"frame_size": (32, 32)}
EVENTS = [*SMALL, "--RCR", "4"]


def by_rule(classes, fraction):
    """What is held out, straight from the rule in the documentation."""
    found = set()
    for label, samples in classes.items():
        order = sorted(samples, key=lambda name: hashlib.sha256(f"val/{label}/{name}".encode()).hexdigest())
        found |= {f"{label}/{name}" for name in order[: int(fraction * len(order) + 0.5)]}
    return found


def names_of(samples):
    return [f"{path.parent.name}/{path.stem}" for path, _ in (samples.dataset.files[i] for i in samples.indices)]


# Which samples --------------------------------------------------------------------------------------------------------


def test_a_fraction_of_each_class_is_held_out_by_name_alone():
    classes = {"ant": [f"image_{n}" for n in range(25)], "bee": [str(n) for n in range(8)], "cat": ["only"]}
    names = [f"{label}/{name}" for label, samples in classes.items() for name in samples]
    held = held_out(names, 0.1)
    assert held == held_out(names[::-1], 0.1) == by_rule({**classes, "cat": []}, 0.1)
    assert [sum(name.startswith(label) for name in held) for label in classes] == [3, 1, 0]  # 2.5 and 0.8 are rounded
    assert held < held_out(names, 0.3)  # a part of what a larger fraction holds out
    assert len(held_out(names, 0.99)) == 24 + 7  # one of each class stays


@pytest.mark.parametrize("frames", ["packed", "npz"])
def test_event_data_are_divided_and_what_is_held_out_is_not_augmented(frames, folder_data):
    load = {**FRAMES, "frames": frames, "seed": 3}
    whole = load_event_data("ncaltech101", folder_data, 4, augment=flip_and_shift, **load)
    plain = load_event_data("ncaltech101", folder_data, 4, **load)
    data = load_event_data("ncaltech101", folder_data, 4, augment=flip_and_shift, val=0.3, **load)
    names = [f"{path.parent.name}/{path.stem}" for path, _ in whole.train.files]
    classes = {label: [n.split("/")[1] for n in names if n.startswith(label)] for label in ("ant", "bass", "crab")}
    expected = by_rule(classes, 0.3)
    assert len(expected) == 9 and set(names_of(data.val)) == expected
    assert names_of(data.train) == [name for name in names if name not in expected]
    assert [(path, label) for path, label in data.test.files] == [(path, label) for path, label in whole.test.files]
    assert (data.info.train, data.info.val, data.info.test) == (18, 9, 3)
    assert data.fingerprint != whole.fingerprint and data.info.contents != whole.info.contents

    (train, val, test) = make_loaders(data, 1, 0, 0, Process(0, 0, 1, torch.device("cpu")))
    assert (len(train), len(val), len(test)) == (18, 9, 3)
    for (sample, label), name in zip(val, names_of(data.val), strict=True):
        unchanged, same = plain.train[names.index(name)]
        assert torch.equal(sample[0].float(), unchanged) and label.item() == same
    for index, name in enumerate(names_of(data.train)):  # augmented as without --val
        assert torch.equal(data.train[index][0], whole.train[names.index(name)][0])


def test_the_split_file_of_a_run_holds_the_same_samples_out_again(folder_data, tmp_path):
    data = load_event_data("ncaltech101", folder_data, 4, val=0.2, **FRAMES)
    lines = data.manifest.splitlines()
    assert f"fingerprint {data.fingerprint}: 21 training, 6 held out and 3 test" in lines[0]
    assert [sum(line.startswith(part) for line in lines) for part in ("train,", "val,", "test,")] == [21, 6, 3]
    path = tmp_path / "split.txt"
    path.write_text(data.manifest)
    again = load_event_data("ncaltech101", folder_data, 4, split=str(path), **FRAMES)
    assert again.fingerprint == data.fingerprint and names_of(again.val) == names_of(data.val)
    with pytest.raises(UserError, match=r"--val 0\.2: the split file .*split.txt has val lines already"):
        load_event_data("ncaltech101", folder_data, 4, split=str(path), val=0.2, **FRAMES)
    with pytest.raises(UserError, match=r"--val 0\.01 holds out none of the 27 training samples"):
        load_event_data("ncaltech101", folder_data, 4, val=0.01, **FRAMES)


def test_held_out_images_are_read_as_test_images_are(tmp_path):
    root = write_images(tmp_path)
    data, whole = load_image_data(root, 32, val=0.3), load_image_data(root, 32)
    names = [os.path.relpath(path, root / "train") for path, _ in whole.train.samples]
    classes = {label: [n.split("/")[1] for n in names if n.startswith(label)] for label in whole.classes}
    expected = by_rule(classes, 0.3)
    assert {names[index] for index in data.val.indices} == expected and len(expected) == 6
    assert sorted([*data.train.indices, *data.val.indices]) == list(range(18))
    for place, index in enumerate(data.val.indices):
        assert torch.equal(data.val[place][0], data.test.transform(data.test._read(whole.train.samples[index][0])))
    assert torch.equal(data.train[0][0], whole.train[data.train.indices[0]][0])
    counts = dataclasses.asdict(data.info)
    assert [counts[part] for part in ("train", "val", "test")] == [12, 6, 9]
    assert data.info.fingerprint != whole.info.fingerprint
    assert sum(line.startswith("val,") for line in data.manifest.splitlines()) == 6


# A run ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def selected(monkeypatch):
    """Evaluations find these accuracies in turn; the list that is given fills with (samples, weights) of each."""
    seen, evaluate = [], engine.evaluate

    def found(net, *arguments, **keywords):
        result = evaluate(net, *arguments, **keywords)
        seen.append((result["count"], {name: value.clone() for name, value in net.state_dict().items()}))
        return {**result, "acc1": (50.0, 90.0, 70.0, 33.0)[len(seen) - 1]}

    monkeypatch.setattr(engine, "evaluate", found)
    return seen


@pytest.mark.parametrize("name", ["ncaltech101", "imagenet"])
def test_the_best_held_out_epoch_is_tested_once(name, selected, script, folder_data, tmp_path, monkeypatch, capsys):
    data = folder_data if name == "ncaltech101" else write_images(tmp_path / "images")
    counts = (9, 3) if name == "ncaltech101" else (6, 9)
    small = EVENTS if name == "ncaltech101" else [*SMALL_IMAGES, "--ema", "0.5"]
    run = tmp_path / "run"
    command = [*small, "--data-dir", data, "--epochs", 3, "--val", 0.3, "--output-dir", run]
    code, out, err = script(name, *command)
    assert code == 0, err
    assert [count for count, _ in selected] == [counts[0]] * 3 + [counts[1]]
    tested, (best, _) = selected[-1][1], read_weights(run / "best.pt")
    assert all(torch.equal(tested[key], selected[1][1][key]) and torch.equal(tested[key], best[key]) for key in best)
    assert all(torch.equal(selected[2][1][key], value) for key, value in read_weights(run / "last.pt")[0].items())

    evaluation = json.loads((run / "evaluation.json").read_text())
    assert (evaluation["selection"], evaluation["epoch"], evaluation["acc1"]) == ("val", 2, 33.0)
    assert evaluation["best"] == {"acc1": 90.0, "epoch": 2} and evaluation["split"]["val"] == counts[0]
    assert "val 0.3 instead of 0" in out and f"{counts[0]} held out, {counts[1]} test" in out
    assert f"best epoch: 2 with acc1 90.00 % of the {counts[0]} held-out training samples" in out
    assert "test set, once, with the weights of that epoch (best.pt): " in out

    header = (run / "metrics.csv").read_text().splitlines()[0]
    assert header == "epoch,train_loss,train_acc1,test_loss,test_acc1,lr,seconds,val_loss,val_acc1"
    assert [(row["val_acc1"], row["test_acc1"]) for row in rows(run)] == [("50", ""), ("90", ""), ("70", "")]
    metrics = read_metrics(run)
    assert metrics["val_acc1"] == [50, 90, 70] and "test_acc1" not in metrics
    code, out, err = run_tool(monkeypatch, capsys, compare.main, run)
    assert code == 0 and "| all runs | 1 |" in out and "| 33.00 | 2 |" in out and "selected on the test" not in out, (
        out + err
    )
    assert run_tool(monkeypatch, capsys, visualize.main, "curves", run)[0] == 0

    for file, selection, accuracy in (("best.pt", "val", 33.0), ("last.pt", "final", None)):
        output = tmp_path / f"{file}.safetensors"
        code, out, err = run_tool(monkeypatch, capsys, export.main, "weights", run / file, "--output", output)
        assert code == 0, err
        known = read_exported(output)
        assert (known["selection"], known.get("accuracy", {}).get("acc1")) == (selection, accuracy)
    assert run_tool(monkeypatch, capsys, export.main, "hub", run / "best.pt", "--output", tmp_path / "hub")[0] == 0
    card = (tmp_path / "hub/README.md").read_text()
    assert "Accuracy 33.00 %" in card and "the best so far on held-out training samples" in card


def test_a_stopped_run_with_held_out_samples_continues_to_the_bit_and_only_with_the_same(
    script, folder_data, tmp_path, monkeypatch
):
    command = ["ncaltech101", *EVENTS, "--data-dir", folder_data, "--epochs", 2, "--val", 0.3]
    assert script(*command, "--output-dir", tmp_path / "whole")[0] == 0

    def stopped(at):
        """Stop at the ``at``-th evaluation of this start."""
        calls, evaluate = itertools.count(1), engine.evaluate

        def found(*arguments, **keywords):
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGINT)
            return evaluate(*arguments, **keywords)

        with monkeypatch.context() as patched:
            patched.setattr(engine, "evaluate", found)
            code, _, err = script(*command, "--output-dir", tmp_path / "stopped")
        assert code == 130, err

    stopped(2)  # that of the second epoch
    for fraction in (0.2, 0):
        code, _, err = script(*command, "--output-dir", tmp_path / "stopped", "--val", fraction)
        assert code == 2 and f"val is 0.3 there and {float(fraction)} here" in err
    stopped(2)  # the test: the weights of best.pt are in the network
    assert same_weights(tmp_path / "whole/last.pt", tmp_path / "stopped/last.pt")
    assert script(*command, "--output-dir", tmp_path / "stopped")[0] == 0
    for file in ("last.pt", "best.pt"):
        assert same_weights(tmp_path / "whole" / file, tmp_path / "stopped" / file)
    assert rows(tmp_path / "whole") == rows(tmp_path / "stopped")
    whole, after = (json.loads((tmp_path / run / "evaluation.json").read_text()) for run in ("whole", "stopped"))
    assert whole == after


def test_a_run_from_before_there_were_validation_and_tf32_continues(script, folder_data, tmp_path):
    command = ["ncaltech101", *EVENTS, "--data-dir", folder_data, "--epochs", 1, "--output-dir", tmp_path]
    assert script(*command)[0] == 0
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["recipe"].pop("val") == 0.0 and state["facts"]["split"].pop("val") == 0
    assert state["recipe"].pop("tf32") is True
    write_checked(state, tmp_path / "last.pt")
    assert script(*command)[0] == 0
    code, _, err = script(*command, "--val", 0.3)
    assert code == 2 and "val is 0.0 there and 0.3 here" in err


def test_two_processes_evaluate_every_held_out_sample_once(launch, folder_data, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    command = [SCRIPTS["ncaltech101"], *EVENTS, "--data-dir", folder_data, "--epochs", 2, "--val", 0.3]
    done = launch([*launcher, *command, "--output-dir", tmp_path / "two"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("/9) loss") == 2 and done.stdout.count("test set, once") == 1
    evaluation = json.loads((tmp_path / "two/evaluation.json").read_text())
    assert (evaluation["count"], evaluation["selection"]) == (3, "val")
    weights = ["--weights", tmp_path / "two/best.pt", "--evaluate", "--output-dir", tmp_path / "alone"]
    done = launch([SCRIPTS["ncaltech101"], *weights, "--data-dir", folder_data, "--device", "cpu", "--num-workers", 0])
    assert done.returncode == 0, done.stderr
    alone = json.loads((tmp_path / "alone/evaluation.json").read_text())
    assert (alone["correct"], alone["count"], alone["selection"]) == (evaluation["correct"], 3, evaluation["selection"])
    assert alone["split"]["fingerprint"] == evaluation["split"]["fingerprint"]

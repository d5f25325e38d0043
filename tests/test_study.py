"""The study: each variant trains in its place, differences are paired, rows survive and are made once."""

import sys
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from docs.study import camera, study, tables
from models import SMA, VGG8
from utils.errors import exit_with_sentence


@pytest.mark.parametrize("title", study.VARIANTS)
def test_every_variant_stands_behind_two_convolutions_and_gets_gradients(title):
    settings, variant = study.Settings(epochs=1, width=0.125), study.VARIANTS[title]
    net = study.build(variant, settings, classes=3, seed=0)
    plain = study.build(study.VARIANTS[study.BASELINE], settings, classes=3, seed=0)
    if variant.width == 1:
        assert torch.equal(net.block1[0][0].weight, plain.block1[0][0].weight)
        assert torch.equal(net.others[8].weight, plain.others[8].weight)  # the same first weights around the attention
    net(torch.rand(4, 2, 2, 32, 32) * 4).sum().backward()
    for block in (net.block2, net.block3):
        assert len(block) == 5
        weights = list(block[1].parameters())
        assert (not weights) == title.startswith(study.BASELINE)
        assert all(weight.grad is not None for weight in weights)


def test_sma_in_its_place_is_the_published_network():
    torch.manual_seed(0)
    built = study.put_after_convolutions(VGG8(4, 3, 0.125, sma_blocks=()), study.VARIANTS["SMA"].make)
    published = VGG8(4, 3, 0.125)
    assert {k: v.shape for k, v in built.state_dict().items()} == {
        k: v.shape for k, v in published.state_dict().items()
    }
    assert isinstance(built.block2[1], SMA)


class Samples(list):
    """Samples of given labels, with the list of files that an event data set has."""

    @property
    def files(self):
        return [("", label) for label in self]


def test_held_out_samples_are_of_every_class_and_no_sample_is_in_two_parts():
    data = SimpleNamespace(train=Samples([0] * 20 + [1] * 40), test=Samples([0, 1]))
    training, held_out, test = study.parts("N-MNIST", data)
    assert (sorted(training), sorted(held_out), sorted(test)) == (
        [0] * 12 + [1] * 24, [0] * 3 + [1] * 6, [0] * 6 + [1] * 11
    )  # fmt: skip
    assert not {*training.indices} & {*held_out.indices} | {*training.indices} & {*test.datasets[1].indices}
    training, held_out, test = study.parts("objects", data)
    assert (sorted(training), sorted(held_out)) == ([0] * 16 + [1] * 32, [0] * 4 + [1] * 8)
    assert test is data.test


def test_the_camera_sees_an_edge_pass_as_the_logarithm_says():
    edge = np.zeros((41, 41), np.uint8)
    edge[:, 20:] = 255
    events = camera.record(Image.fromarray(edge))
    assert set(events) == {"t", "x", "y", "p"} and (np.diff(events["t"]) >= 0).all()
    assert events["t"].min() > 0 and events["t"].max() <= 300_000
    first = (events["t"] <= 100_000) & (events["y"] == 5)  # the view moves right by 4 pixels, so the edge moves left
    whole = int(np.log(1.05 / 0.05) / 0.2)
    assert np.bincount(events["x"][first], minlength=32).tolist() == [whole if 16 <= x < 20 else 0 for x in range(32)]
    assert (events["p"][first] == 1).all()
    assert len(camera.record(Image.fromarray(np.full((50, 50), 90, np.uint8)))["t"]) == 0


def rows(accuracies, kind=study.TEST, lr=0.001, data="N-MNIST"):
    """Rows from {variant: accuracies of seeds 1, 2, ...}."""
    setting = study.asdict(study.DATA[data])
    return [
        {**dict.fromkeys(study.COLUMNS, ""), **{k: str(v) for k, v in setting.items()}, "data": data,
         "variant": variant, "seed": str(seed), "parameters": "1000000", "lr": str(lr), "kind": kind,
         "correct": str(value), "count": "100", "held_out_correct": str(value), "held_out_count": "100",
         "held_out_loss": "0.5", "energy_uj": "10", "train_acc1": "50", "reversed": "1", "mean_step": "2",
         "held_out_curve": "10 20", "scale_weights": "0.1 0.2 0.3 0.4", "time_weight": "0.1"}
        for variant, values in accuracies.items()
        for seed, value in enumerate(values, 1)
    ]  # fmt: skip


def test_differences_are_paired_over_seeds_and_corrected_for_their_number():
    found = rows({study.BASELINE: [60, 70, 80], "SMA": [63, 72, 84, 99]})
    one = tables.paired(found, "N-MNIST", "SMA", study.BASELINE)
    assert (one.seeds, one.mean) == (3, pytest.approx(3))
    assert one.half == pytest.approx(4.302653 * 1 / 3**0.5, rel=1e-6)  # Student's t of 2 degrees of freedom
    assert str(one) == "+3.00 (+0.52 to +5.48)"
    seven = tables.paired(found, "N-MNIST", "SMA", study.BASELINE, comparisons=7)
    assert seven.half == pytest.approx(11.769 * 1 / 3**0.5, rel=1e-3)  # the quantile 1 - 0.025 / 7
    assert tables.paired(found, "objects", "SMA", study.BASELINE) is None


def test_the_learning_rate_is_chosen_on_held_out_samples_alone():
    choices = [*rows({"SMA": [60]}, study.CHOICE, 0.001), *rows({"SMA": [70]}, study.CHOICE, 0.003)]
    tied = rows({"SMA-L": [70]}, study.CHOICE, 0.001) + rows({"SMA-L": [70]}, study.CHOICE, 0.003)
    tied[0]["held_out_loss"] = "0.4"
    tested = rows({"SMA": [99], "SMA-L": [99]}, lr=0.1)
    assert study.chosen_rates([*tested, *choices, *tied]) == {("N-MNIST", "SMA"): 0.003, ("N-MNIST", "SMA-L"): 0.001}


def test_only_runs_without_a_row_are_trained_and_each_is_written_when_it_ends(tmp_path, monkeypatch):
    path = tmp_path / "s.csv"
    study.write_rows(path, study.COLUMNS, rows({"SMA": [60]}))
    trained = []

    def train(task, data_dir):
        trained.append(task.seed)
        return {**rows({"SMA": [60 + task.seed]})[0], "seed": task.seed, "lr": task.lr}

    class Now:
        """A pool that does at once what it is given."""

        def submit(self, function, *arguments):
            future = Future()
            future.set_result(function(*arguments))
            return future

    monkeypatch.setattr(study, "train", train)
    tasks = [study.Task("N-MNIST", "SMA", seed, 0.001, study.TEST) for seed in (1, 2, 3)]
    study._train_missing(Now(), SimpleNamespace(rows=path, data_dir=tmp_path), tasks)
    assert trained == [2, 3]
    found = {row["seed"]: row["correct"] for row in study.read_rows(path, study.COLUMNS)}
    assert found == {"1": "60", "2": "62", "3": "63"}
    study._train_missing(Now(), SimpleNamespace(rows=path, data_dir=tmp_path), tasks)
    assert trained == [2, 3]


@pytest.fixture
def tool(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["study.py", *map(str, arguments)])
        try:
            exit_with_sentence(study.main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_a_row_that_a_kill_cut_off_is_left_out_and_the_tables_are_rebuilt(tmp_path, tool):
    path = tmp_path / "s.csv"
    study.write_rows(path, study.COLUMNS, rows({study.BASELINE: [60, 70], "SMA": [63, 72]}))
    with path.open("a") as file:
        file.write("N-MNIST,SMA,3,0.0")
    assert len(study.read_rows(path, study.COLUMNS)) == 4
    study._append(path, rows({"SMA": [63, 72, 84]})[2])
    assert [row["seed"] for row in study.read_rows(path, study.COLUMNS)] == ["1", "2", "1", "2", "3"]
    code, _, error = tool("table", "--rows", path)
    assert code == 2 and "must have the lines" in error
    for name in ("README.md", "objects.md"):
        (tmp_path / name).write_text(
            "before\n<!-- written by docs/study/study.py table -->\nold\n<!-- end -->\nafter\n"
        )
    assert tool("table", "--rows", path)[0] == 0
    text = (tmp_path / "README.md").read_text()
    assert "| N-MNIST | SMA | 0.001 | 3 | 73.00 ± 10.54 | +2.50 (-3.85 to +8.85) |  | 10 | 1.000 M |" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_tables_are_those_of_the_committed_rows(tmp_path, tool):
    folder = study.ROOT / "docs" / "study"
    names = ["README.md", "objects.md"]
    for name in ("study.csv", "study_cost.csv", *names):
        (tmp_path / name).write_text((folder / name).read_text())
    assert tool("table", "--rows", tmp_path / "study.csv")[0] == 0
    for name in names:
        assert (tmp_path / name).read_text() == (folder / name).read_text()


def test_mistakes_end_in_a_sentence(tmp_path, tool):
    path = tmp_path / "s.csv"
    code, _, error = tool("table", "--rows", path)
    assert code == 2 and "holds no rows yet" in error
    other = rows({"SMA": [63]})
    other[0]["epochs"] = "99"
    study.write_rows(path, study.COLUMNS, other)
    code, _, error = tool("table", "--rows", path)
    assert code == 2 and "runs of other settings" in error
    path.write_text("a,b\n1,2\n")
    code, _, error = tool("table", "--rows", path)
    assert code == 2 and "its columns differ" in error
    code, _, error = tool("run", "--data-dir", tmp_path / "absent", "--rows", tmp_path / "new.csv")
    assert code == 2 and "absent" in error and len(error.splitlines()) == 1

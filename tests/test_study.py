"""The study tool: every variant trains in its place, differences are paired, rows survive and are done once."""

import sys
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

from docs.study import study
from models import SMA, VGG8
from utils.errors import exit_with_sentence


@pytest.mark.parametrize("variant", study.VARIANTS)
def test_every_variant_stands_behind_two_convolutions_and_gets_gradients(variant):
    settings = study.Settings(epochs=1, width=0.125)
    net = study._build(variant, settings, classes=3, seed=0)
    plain = study._build(study.BASELINE, settings, classes=3, seed=0)
    assert torch.equal(net.block1[0][0].weight, plain.block1[0][0].weight)
    assert torch.equal(net.others[8].weight, plain.others[8].weight)  # the same first weights around the attention
    net(torch.rand(4, 2, 2, 32, 32) * 4).sum().backward()
    for block in (net.block2, net.block3):
        assert len(block) == 5
        weights = list(block[1].parameters())
        assert (not weights) == (variant == study.BASELINE)
        assert all(weight.grad is not None for weight in weights)


def test_sma_in_its_place_is_the_published_network():
    torch.manual_seed(0)
    built = study.put_after_convolutions(VGG8(4, 3, 0.125, sma_blocks=()), study.VARIANTS["SMA"])
    published = VGG8(4, 3, 0.125)
    assert {k: v.shape for k, v in built.state_dict().items()} == {
        k: v.shape for k, v in published.state_dict().items()
    }
    assert isinstance(built.block2[1], SMA)


def rows(accuracies, measured_on=study.TEST, lr=0.001):
    """Rows of N-MNIST from {variant: accuracies of seeds 1, 2, ...}."""
    setting = study.asdict(study.SETTINGS["N-MNIST"])
    return [
        {**dict.fromkeys(study.COLUMNS, ""), **{k: str(v) for k, v in setting.items()}, "data": "N-MNIST",
         "variant": variant, "seed": str(seed), "acc1": str(value), "parameters": "1000000", "count": "100",
         "lr": str(lr), "measured_on": measured_on, "correct": str(value), "loss": "0.5"}
        for variant, values in accuracies.items()
        for seed, value in enumerate(values, 1)
    ]  # fmt: skip


def test_differences_are_paired_over_seeds():
    costs = [{"data": "N-MNIST", "variant": "SMA", "ratio": "2.5"}]
    plain, sma = study.summary(rows({study.BASELINE: [60, 70, 80], "SMA": [63, 72, 84]}), costs)
    assert (plain["mean"], plain["std"], plain["difference"]) == (70, 10, None)
    assert sma["difference"] == pytest.approx(3)
    assert sma["half"] == pytest.approx(4.302653 * 1 / 3**0.5, rel=1e-6)  # Student's t of 2 degrees of freedom
    assert "| +3.00 (+0.52 to +5.48) | 2.50 | 1.000 M |" in study.to_markdown([plain, sma])


def test_the_learning_rate_is_chosen_on_held_out_samples_alone():
    held_out = [*rows({"SMA": [60]}, study.HELD_OUT, 0.001), *rows({"SMA": [70]}, study.HELD_OUT, 0.003)]
    tied = rows({"SMA-L": [70]}, study.HELD_OUT, 0.001) + rows({"SMA-L": [70]}, study.HELD_OUT, 0.003)
    tied[0]["loss"] = "0.4"
    tested = rows({"SMA": [99], "SMA-L": [99]}, lr=0.1)
    assert study.chosen_rates([*tested, *held_out, *tied]) == {("N-MNIST", "SMA"): 0.003, ("N-MNIST", "SMA-L"): 0.001}
    lines = study.summary([*held_out, *tested], [])
    assert [(line["variant"], line["mean"], line["n"]) for line in lines] == [("SMA", 99, 1), ("SMA-L", 99, 1)]


def test_findings_pair_azo_with_sma_and_average_the_weights():
    found = rows({"SMA": [60, 70, 80], "SMA + AZO": [63, 72, 84]})
    for row in found:
        row |= {"scale_weights": "0.10 0.20 0.30 0.40", "scale_largest": "0 0 0.5 0.5", "time_weight_untrained": "0.01",
                "time_weight_trained": "0.02", "time_weight_over_samples": "0.0003"}  # fmt: skip
    found[0]["scale_weights"] = "0.40 0.20 0.30 0.10"
    text = study.findings(found)
    assert "N-MNIST: SMA + AZO minus SMA +3.00 (+0.52 to +5.48) points" in text
    assert "| N-MNIST | SMA | 0.20, 0.20, 0.30, 0.30 | 0, 0, 50, 50 | 0.010, 0.020 | 0.0003 |" in text


def test_only_runs_without_a_row_are_trained_and_each_is_written_when_it_ends(tmp_path, monkeypatch):
    path = tmp_path / "s.csv"
    study._write(path, study.COLUMNS, rows({"SMA": [60]}))
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
    found = {row["seed"]: row["acc1"] for row in study.read_rows(path, study.COLUMNS)}
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


def test_a_row_that_a_kill_cut_off_is_left_out_and_the_table_is_rebuilt(tmp_path, tool):
    path, figure = tmp_path / "s.csv", tmp_path / "s.png"
    study._write(path, study.COLUMNS, rows({study.BASELINE: [60, 70], "SMA": [63, 72]}))
    with path.open("a") as file:
        file.write("N-MNIST,SMA,3,0.0")
    assert len(study.read_rows(path, study.COLUMNS)) == 4
    study._append(path, rows({"SMA": [63, 72, 84]})[2])
    assert [row["seed"] for row in study.read_rows(path, study.COLUMNS)] == ["1", "2", "1", "2", "3"]
    code, out, _ = tool("table", "--rows", path, "--figure", figure)
    assert code == 0 and "| N-MNIST | SMA | 0.001 | 73.00 ± 10.54 | 3 |" in out
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_mistakes_end_in_a_sentence(tmp_path, tool):
    path = tmp_path / "s.csv"
    code, _, error = tool("table", "--rows", path)
    assert code == 2 and "holds no rows yet" in error
    other = rows({"SMA": [63]})
    other[0]["epochs"] = "99"
    study._write(path, study.COLUMNS, other)
    code, _, error = tool("table", "--rows", path)
    assert code == 2 and "runs of other settings" in error
    path.write_text("a,b\n1,2\n")
    code, _, error = tool("table", "--rows", path)
    assert code == 2 and "its columns differ" in error
    code, _, error = tool("run", "--data-dir", tmp_path / "absent", "--rows", tmp_path / "new.csv")
    assert code == 2 and "absent" in error and len(error.splitlines()) == 1

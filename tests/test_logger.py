"""What a run writes: rows of metrics.csv, the line of an epoch, and a disk without room."""

import contextlib
import errno
import io
import itertools
import json
import math
import os

import pytest
import torch

from tests.conftest import rows
from utils.distributed import Process
from utils.errors import UserError
from utils.logger import RunLog, print_epoch, progress_bar, write_json

ALONE = Process(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
TRAIN = {"loss": 1.0, "acc1": 50.0, "skips": 0}
TEST = {"loss": 1.0, "acc1": 50.0, "correct": 1, "count": 2}


def opened(folder, epochs_done, earlier=None):
    log = RunLog(folder, ALONE, folder)
    log.open({}, {}, epochs_done, earlier=earlier)
    return log


def test_a_run_continued_from_elsewhere_has_each_epoch_once(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    log = opened(there, 0)
    for epoch in (1, 2, 3):
        log.epoch(epoch, {**TRAIN, "loss": 7.0}, TEST, 0.1, 1.0)
    log = opened(here, 2, there)  # --resume there/FILE, of epoch 2
    for epoch in (3, 4):
        log.epoch(epoch, TRAIN, TEST, 0.1, 1.0)
    opened(here, 3).epoch(4, TRAIN, TEST, 0.1, 1.0)  # killed before epoch 4 was saved
    found = [(row["epoch"], float(row["train_loss"])) for row in rows(here)]
    assert found == [("1", 7.0), ("2", 7.0), ("3", 1.0), ("4", 1.0)]
    opened(here, 2, there)  # the same command again: its own rows count
    assert [row["epoch"] for row in rows(here)] == ["1", "2"]


def test_a_run_continued_from_a_folder_without_rows_starts_with_none(tmp_path):
    opened(tmp_path, 2, tmp_path / "nowhere").epoch(3, TRAIN, TEST, 0.1, 1.0)
    assert [row["epoch"] for row in rows(tmp_path)] == ["3"]


def test_a_row_that_a_kill_cut_off_is_removed(tmp_path):
    log = opened(tmp_path, 0)
    log.epoch(1, TRAIN, TEST, 0.1, 1.0)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("2,0.5,9")
    opened(tmp_path, 2)
    assert [row["epoch"] for row in rows(tmp_path)] == ["1"]


def test_steps_that_the_scaler_skipped_are_said(capsys):
    print_epoch(1, 9, {**TRAIN, "skips": 3}, TEST, 0.1, 1.0)
    assert "3 step(s) skipped by the fp16 scaler" in capsys.readouterr().out
    print_epoch(2, 9, TRAIN, TEST, 0.1, 1.0)
    assert "scaler" not in capsys.readouterr().out


def test_a_log_that_cannot_be_written_is_one_sentence_in_every_process(tmp_path, monkeypatch):
    log = opened(tmp_path, 0)
    before = (tmp_path / "metrics.csv").read_bytes()

    def no_room(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", no_room)
    full = rf"the log in --output-dir {tmp_path} cannot be written: No space left on device"
    with pytest.raises(UserError, match=full):
        log.epoch(1, TRAIN, TEST, 0.1, 1.0)
    assert (tmp_path / "metrics.csv").read_bytes() == before and not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match=full):
        opened(tmp_path, 0)
    # The second process hears of it.
    monkeypatch.setattr("utils.distributed.gather", lambda own: ["no room", own])
    second = RunLog(tmp_path, Process(1, 1, 2, torch.device("cpu")), tmp_path)
    with pytest.raises(UserError, match="no room"):
        second.epoch(1, TRAIN, TEST, 0.1, 1.0)


@pytest.mark.parametrize(
    ("epochs", "train", "test", "lr"),
    [
        (300, (100.0, 4.6151), {"acc1": 99.89, "correct": 870, "count": 871, "loss": 4.6151}, 0.000997),  # N-Caltech101
        (200, (76.54, 6.9078), {"acc1": 77.12, "acc5": 93.45, "loss": 6.9078}, 0.0000987),  # ImageNet
    ],
)
def test_the_longest_line_of_an_epoch_fits_100_columns(epochs, train, test, lr, capsys):
    train = {"acc1": train[0], "loss": train[1], "skips": 25}
    print_epoch(epochs, epochs, train, test, lr, 12345.6)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"epoch {epochs}/{epochs}  train ") and lines[0].endswith("  12346 s")
    assert max(map(len, lines)) <= 100, lines


def test_the_line_of_an_epoch(capsys):
    test = {"acc1": 75.0, "correct": 66, "count": 88, "loss": 0.0473}
    print_epoch(3, 20, {"acc1": 71.59, "loss": 0.0512, "skips": 0}, test, 0.003, 2.14)
    expected = "epoch 3/20  train 71.59 % loss 0.0512  test 75.00 % (66/88) loss 0.0473  lr 0.003  2.1 s\n"
    assert capsys.readouterr().out == expected


def test_without_a_terminal_every_epoch_is_a_line_of_its_own(monkeypatch):
    log, clock = io.StringIO(), itertools.count(step=100)  # a step of an epoch takes minutes
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        for epoch in (1, 2):
            for _ in progress_bar(range(5), f"train {epoch}/2", ALONE):
                pass
            print_epoch(epoch, 2, TRAIN, TEST, 0.1, 1.0)
    lines = log.getvalue().split("\n")
    assert "\r" not in log.getvalue() and any(line.startswith("train 1/2:") for line in lines)
    assert [line[:9] for line in lines if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]


def test_a_value_that_is_not_finite_becomes_null(tmp_path):
    write_json(tmp_path / "a.json", {"loss": math.nan, "rows": [math.inf, 1.5], "path": tmp_path})
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert found == {"loss": None, "rows": [None, 1.5], "path": str(tmp_path)}

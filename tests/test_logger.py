"""What a run writes: rows of metrics.csv, the line of an epoch, and a disk without room."""

import errno
import os

import pytest
import torch

from tests.conftest import rows
from utils.distributed import Process
from utils.errors import UserError
from utils.logger import RunLog

ALONE = Process(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
TRAIN = {"loss": 1.0, "acc1": 50.0, "skips": 0}
TEST = {"loss": 1.0, "acc1": 50.0, "correct": 1, "count": 2}


def opened(folder, epochs_done):
    log = RunLog(folder, ALONE, folder)
    log.open({}, {}, epochs_done)
    return log


def test_a_run_continued_from_elsewhere_has_each_epoch_once(tmp_path):
    log = opened(tmp_path, 2)  # --resume FILE: its first two rows are in another folder
    for epoch in (3, 4):
        log.epoch(epoch, 9, TRAIN, TEST, 0.1, 1.0)
    opened(tmp_path, 3).epoch(4, 9, TRAIN, TEST, 0.1, 1.0)  # killed before epoch 4 was saved
    assert [row["epoch"] for row in rows(tmp_path)] == ["3", "4"]


def test_a_row_that_a_kill_cut_off_is_removed(tmp_path):
    log = opened(tmp_path, 0)
    log.epoch(1, 9, TRAIN, TEST, 0.1, 1.0)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("2,0.5,9")
    opened(tmp_path, 2)
    assert [row["epoch"] for row in rows(tmp_path)] == ["1"]


def test_steps_that_the_scaler_skipped_are_told(tmp_path, capsys):
    opened(tmp_path, 0).epoch(1, 9, {**TRAIN, "skips": 3}, TEST, 0.1, 1.0)
    assert "3 step(s) skipped by the fp16 scaler" in capsys.readouterr().out
    opened(tmp_path, 1).epoch(2, 9, TRAIN, TEST, 0.1, 1.0)
    assert "scaler" not in capsys.readouterr().out


def test_a_log_that_cannot_be_written_is_one_sentence_in_every_process(tmp_path, monkeypatch):
    log = opened(tmp_path, 0)
    before = (tmp_path / "metrics.csv").read_bytes()

    def no_room(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", no_room)
    full = rf"the log in --output-dir {tmp_path} cannot be written: No space left on device"
    with pytest.raises(UserError, match=full):
        log.epoch(1, 9, TRAIN, TEST, 0.1, 1.0)
    assert (tmp_path / "metrics.csv").read_bytes() == before and not list(tmp_path.glob(".*"))
    with pytest.raises(UserError, match=full):
        opened(tmp_path, 0)
    # The second process hears of it.
    monkeypatch.setattr("utils.distributed.gather", lambda own: ["no room", own])
    second = RunLog(tmp_path, Process(1, 1, 2, torch.device("cpu")), tmp_path)
    with pytest.raises(UserError, match="no room"):
        second.epoch(1, 9, TRAIN, TEST, 0.1, 1.0)

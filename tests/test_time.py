"""report.py --time: what a change of the input does to a sample, and what is refused."""

import numpy as np
import pytest
import torch

from models import VGG8, sma_ms_resnet18
from tests.test_report import run_as_user
from tools import report
from utils.analysis.changes import CHANGES, ChangedFrames
from utils.data.events import load_event_data


def changed(name, counts, seed=0):
    return np.asarray(CHANGES[name](counts, np.random.default_rng(seed)))


@pytest.fixture
def counts():
    """Frames [T, 2, H, W] with as many events in every step, in other places."""
    return np.random.default_rng(0).poisson(2.0, (6, 2, 20, 20)).astype(np.int64)


def test_steps_are_moved_and_nothing_else(counts):
    assert np.array_equal(changed("steps reversed", counts), counts[::-1])
    for seed in range(30):
        found = changed("steps shuffled", counts[:2], seed)
        assert np.array_equal(found, counts[1::-1])  # of two orders the other one
    found = changed("steps shuffled", counts)
    assert sorted(step.tobytes() for step in found) == sorted(step.tobytes() for step in counts)
    assert all(np.array_equal(step, counts[0]) for step in changed("first step at all steps", counts))
    mean = changed("mean of the steps at all steps", counts)
    assert np.allclose(mean.sum(0), counts.sum(0)) and np.array_equal(mean[0], mean[-1])


def test_events_are_dropped_and_added_at_the_stated_rates(counts):
    total = counts.sum()
    found = changed("25 % of the events dropped", counts)
    assert (found <= counts).all() and found.sum() == pytest.approx(0.75 * total, rel=0.02)
    found = changed("noise: 50 % more events", counts)
    assert (found >= counts).all() and found.sum() - total == round(total / 2)
    silent = np.zeros_like(counts)
    assert all(not changed(name, silent).any() for name in CHANGES)


def test_a_sample_is_changed_in_the_same_way_in_every_order_and_resized_afterwards(gesture_data):
    test = load_event_data("dvs128", gesture_data, 4, frame_size=(32, 32)).test
    name = "50 % of the events dropped"
    one, other = (ChangedFrames(test, name, CHANGES[name]) for _ in range(2))
    backwards = [other[index][0] for index in reversed(range(3))][::-1]
    assert all(torch.equal(one[index][0], backwards[index]) for index in range(3))
    assert not torch.equal(one[0][0], one[1][0]) and one[0][0].shape == (4, 2, 32, 32)
    same = ChangedFrames(test, "none", lambda counts, _: counts)
    assert torch.equal(same[1][0], test[1][0]) and same[1][1] == test[1][1]


def test_what_has_no_time_is_refused(tmp_path, gesture_data):
    torch.save(VGG8(T=1, num_classes=11, width=0.125, sma_blocks=[]).state_dict(), tmp_path / "one.pt")
    common = ["--device", "cpu", "--time", "--latency-runs", 1]
    arguments = ["--weights", tmp_path / "one.pt", "-T", 1, "--data-dir", gesture_data, "--frame-size", 32]
    code, _, err = run_as_user(report.main, *arguments, *common)
    assert code == 2 and "--time needs a network with at least 2 time steps" in err
    torch.save(sma_ms_resnet18(T=2, num_classes=6, width=0.0625).state_dict(), tmp_path / "image.pt")
    code, _, err = run_as_user(report.main, "--weights", tmp_path / "image.pt", "--demo", "--image-size", 32, *common)
    assert code == 2 and "--time is for event data" in err

"""The built-in demo data: reproducible, laid out as promised, whole or absent, and not solvable without motion."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from utils.data import demo
from utils.data.demo import GESTURES, TEST_SUBJECTS, TRAIN_SUBJECTS, TRIALS, render_events, write_demo

REPOSITORY = Path(__file__).resolve().parent.parent

# What a linear classifier of the per-pixel event counts may reach, in percent, its strength and its features chosen on
# the test data in its favour (that is worth some 5 points). Perfect knowledge of a gesture's group and guessing inside
# it gives 5 of 11, or 45.
LINEAR_PROBE_BOUND = 57.0


@pytest.fixture(scope="module")
def gesture_set(tmp_path_factory) -> Path:
    return write_demo(tmp_path_factory.mktemp("cache"), "gesture", (128, 128))


def check_events(events, height: int, width: int) -> None:
    assert set(events) == {"t", "x", "y", "p"}
    t, x, y, p = (events[key] for key in "txyp")
    assert len(t) == len(x) == len(y) == len(p)
    assert 1000 <= len(t) <= 20000
    assert t.dtype == np.int64 and t[0] == 0 and (np.diff(t) >= 0).all()
    assert 0.5e6 < t[-1] < 4e6  # a gesture takes seconds, in microseconds
    for values, limit in ((x, width), (y, height), (p, 2)):
        assert np.issubdtype(values.dtype, np.integer)
        assert values.min() >= 0 and values.max() < limit
    assert x.max() > 0.8 * width and y.max() > 0.8 * height and set(np.unique(p)) == {0, 1}


def test_gestures_are_eleven_and_sorted():
    assert len(set(GESTURES)) == 11
    assert list(GESTURES) == sorted(GESTURES)  # labels are the same by number and by folder name


@pytest.mark.parametrize("gesture", range(11))
def test_a_recording_is_a_function_of_its_arguments(gesture):
    events = render_events(gesture, 3, 1)
    check_events(events, 128, 128)
    render_events((gesture + 1) % 11, 4, 0)  # nothing made in between may matter
    demo._hand_picture.cache_clear()
    again = render_events(gesture, 3, 1)
    assert all(np.array_equal(events[key], again[key]) for key in events)
    for other in (
        render_events(gesture, 3, 0),
        render_events(gesture, 2, 1),
        render_events((gesture + 1) % 11, 3, 1),
        render_events(gesture, 3, 1, seed=1),
    ):
        assert not np.array_equal(events["t"], other["t"])


@pytest.mark.parametrize("arguments", [(11, 0, 0), (-1, 0, 0), (0, -1, 0), (0, 0, -1)])
def test_impossible_recordings_are_refused(arguments):
    with pytest.raises(ValueError, match=r"gesture|negative"):
        render_events(*arguments)


def test_layout_of_dvs128_gesture(gesture_set):
    events_np = gesture_set / "events_np"
    assert sorted(p.name for p in events_np.iterdir()) == ["test", "train"]
    for part, subjects in (("train", TRAIN_SUBJECTS), ("test", TEST_SUBJECTS)):
        assert sorted(int(p.name) for p in (events_np / part).iterdir()) == list(range(11))
        for label in range(11):
            names = sorted(p.name for p in (events_np / part / str(label)).iterdir())
            assert names == sorted(f"subject{s:02d}_trial{t}.npz" for s in subjects for t in range(TRIALS))
    for path in sorted(events_np.rglob("*.npz"))[::37]:
        with np.load(path) as events:
            check_events(dict(events), 128, 128)
    with np.load(events_np / "test" / "7" / f"subject{TEST_SUBJECTS[0]:02d}_trial1.npz") as events:
        expected = render_events(7, TEST_SUBJECTS[0], 1)
        assert all(np.array_equal(events[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("sensor", "num_classes"), [((128, 128), 10), ((180, 240), 11)])
def test_layout_of_one_folder_per_class(tmp_path, sensor, num_classes, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN_SUBJECTS", TRAIN_SUBJECTS[:3])  # fewer people, the same rules
    monkeypatch.setattr(demo, "TEST_SUBJECTS", TEST_SUBJECTS[:1])
    root = write_demo(tmp_path, "folders", sensor, num_classes)
    assert sorted(p.name for p in (root / "events_np").iterdir()) == list(GESTURES[:num_classes])
    rows = [line.split(",") for line in (root / "split.csv").read_text().splitlines()]
    assert {part for part, _ in rows} == {"train", "test"}
    files = sorted(path.relative_to(root / "events_np").with_suffix("") for path in root.rglob("*.npz"))
    assert sorted(Path(name) for _, name in rows) == files
    assert len(files) == num_classes * 4 * TRIALS
    for part, name in rows:
        subject = int(Path(name).name.removeprefix("subject").split("_")[0])
        assert subject in (TRAIN_SUBJECTS if part == "train" else TEST_SUBJECTS)
        with np.load(root / "events_np" / f"{name}.npz") as events:
            check_events(dict(events), *sensor)


def test_a_larger_sensor_shows_the_same_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN_SUBJECTS", TRAIN_SUBJECTS[:1])
    monkeypatch.setattr(demo, "TEST_SUBJECTS", ())
    root = write_demo(tmp_path, "folders", (180, 240))
    small = render_events(0, TRAIN_SUBJECTS[0], 0)
    with np.load(root / "events_np" / GESTURES[0] / f"subject{TRAIN_SUBJECTS[0]:02d}_trial0.npz") as large:
        assert np.array_equal(small["t"], large["t"]) and np.array_equal(small["p"], large["p"])
        assert np.abs((large["x"] + 0.5) * 128 / 240 - (small["x"] + 0.5)).max() <= 1
        assert np.abs((large["y"] + 0.5) * 128 / 180 - (small["y"] + 0.5)).max() <= 1


def test_subjects_are_many_and_disjoint():
    assert len(set(TRAIN_SUBJECTS) | set(TEST_SUBJECTS)) >= 10
    assert not set(TRAIN_SUBJECTS) & set(TEST_SUBJECTS)


@pytest.mark.parametrize(
    "arguments",
    [("frames", (128, 128), 11), ("gesture", (128, 128), 12), ("gesture", (128, 128), 0), ("gesture", (0, 9))],
)
def test_impossible_sets_are_refused_before_anything_is_written(tmp_path, arguments):
    with pytest.raises(ValueError):
        write_demo(tmp_path / "cache", *arguments)
    assert not (tmp_path / "cache").exists()


def test_a_second_call_writes_nothing(gesture_set, monkeypatch):
    monkeypatch.setattr(demo, "render_events", None)  # would fail if it were called
    before = {path: path.stat().st_mtime_ns for path in gesture_set.parent.rglob("*")}
    assert write_demo(gesture_set.parent, "gesture", (128, 128)) == gesture_set
    assert before == {path: path.stat().st_mtime_ns for path in gesture_set.parent.rglob("*")}
    assert [path.name for path in gesture_set.parent.iterdir()] == [gesture_set.name]  # nothing left over


def test_a_new_version_of_the_generator_makes_a_new_set(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN_SUBJECTS", TRAIN_SUBJECTS[:1])
    monkeypatch.setattr(demo, "TEST_SUBJECTS", TEST_SUBJECTS[:1])
    old = write_demo(tmp_path, "gesture", (128, 128), 2)
    monkeypatch.setattr(demo, "VERSION", demo.VERSION + 1)
    assert write_demo(tmp_path, "gesture", (128, 128), 2) != old


WRITE = """
import sys
from pathlib import Path
from utils.data import demo
demo.TRAIN_SUBJECTS, demo.TEST_SUBJECTS = (0, 1, 2), (12,)
if len(sys.argv) > 2:  # die, as by kill -9, before this recording
    import os
    render, left = demo.render_events, iter(range(int(sys.argv[2])))
    demo.render_events = lambda *key: render(*key) if next(left, None) is not None else os._exit(9)
print(demo.write_demo(Path(sys.argv[1]), "gesture", (128, 128)))
"""


def start_writer(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITE, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def test_a_killed_write_is_not_taken_for_a_data_set(tmp_path):
    killed = start_writer(tmp_path, 20)
    assert killed.communicate()[0] == "" and killed.returncode == 9
    assert list(tmp_path.rglob("*.npz"))  # it had begun
    whole = start_writer(tmp_path)
    root = Path(whole.communicate()[0].strip())
    assert whole.returncode == 0
    assert len(list((root / "events_np").rglob("*.npz"))) == 11 * 4 * TRIALS


def test_a_set_that_is_not_whole_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN_SUBJECTS", TRAIN_SUBJECTS[:1])
    monkeypatch.setattr(demo, "TEST_SUBJECTS", TEST_SUBJECTS[:1])
    root = write_demo(tmp_path, "gesture", (128, 128), 2)
    (root / "demo.json").unlink()  # as after a copy that was interrupted
    next(root.rglob("*.npz")).unlink()
    assert write_demo(tmp_path, "gesture", (128, 128), 2) == root
    assert len(list(root.rglob("*.npz"))) == 2 * 2 * TRIALS
    assert [path.name for path in tmp_path.iterdir()] == [root.name]


def test_two_processes_at_once_end_with_one_whole_set(tmp_path):
    writers = [start_writer(tmp_path), start_writer(tmp_path)]
    roots = {writer.communicate()[0].strip() for writer in writers}
    assert [writer.returncode for writer in writers] == [0, 0]
    assert [str(path) for path in tmp_path.iterdir()] == [*roots]  # one set, nothing left over
    paths = list(Path(*roots).rglob("*.npz"))
    assert len(paths) == 11 * 4 * TRIALS
    for path in paths:
        with np.load(path) as events:
            check_events(dict(events), 128, 128)


def count_events(subjects: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Events per polarity and 4 x 4 block of pixels of the whole recording [n, 2, 32, 32], and labels [n]."""
    counts, labels = [], []
    for gesture in range(11):
        for subject in subjects:
            for trial in range(TRIALS):
                events = render_events(gesture, subject, trial)
                place = (events["p"] * 32 + events["y"] // 4) * 32 + events["x"] // 4
                counts.append(np.bincount(place, minlength=2 * 32 * 32).reshape(2, 32, 32))
                labels.append(gesture)
    return np.array(counts, dtype=np.float64), np.array(labels)


def probe_accuracy(train: np.ndarray, labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """Test accuracy in percent of ridge regression to one-hot labels, its strength chosen in favour of the probe."""
    train, test = train.reshape(len(train), -1), test.reshape(len(test), -1)
    mean, deviation = train.mean(0), train.std(0) + 1e-3
    train, test = (train - mean) / deviation, (test - mean) / deviation
    one_hot = np.eye(11)[labels]
    kernel, test_kernel = train @ train.T, test @ train.T
    best = 0.0
    for strength in 10 ** np.arange(0, 7, 0.5):
        weights = np.linalg.solve(kernel + strength * np.eye(len(kernel)), one_hot - one_hot.mean(0))
        predicted = (test_kernel @ weights + one_hot.mean(0)).argmax(1)
        best = max(best, 100 * float(np.mean(predicted == test_labels)))
    return best


def test_event_counts_alone_do_not_tell_the_gestures_apart():
    train, labels = count_events(TRAIN_SUBJECTS)
    test, test_labels = count_events(TEST_SUBJECTS)
    features = {
        "counts": lambda counts: counts,
        "log counts": np.log1p,
        "sum of polarities": lambda counts: counts[:, 1] - counts[:, 0],
        "total count": lambda counts: counts.sum(1),
    }
    accuracy = {
        name: probe_accuracy(feature(train), labels, feature(test), test_labels) for name, feature in features.items()
    }
    assert max(accuracy.values()) <= LINEAR_PROBE_BOUND, accuracy

"""Event files and their folders: what is wrong is a bad sample by name, what has changed is made again."""

import ast
import io
import os
import shutil
import tempfile
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.conftest import write_events
from utils.data.events import check_event_data, load_event_data
from utils.data.folders import BadFile, Stamp, listing
from utils.data.splits import changes
from utils.errors import UserError
from utils.prepare.arrays import read_array
from utils.prepare.datasets import DATA_SETS
from utils.prepare.events import read_events
from utils.prepare.frames import Facts, read_record, write_record
from utils.prepare.recordings import RecordingError

SENSOR = (128, 128)


@pytest.fixture
def root(tmp_path):
    """Two classes of ten samples."""
    for label, name in enumerate(("ant", "bee")):
        for number in range(10):
            write_events(tmp_path / f"data/events_np/{name}/{number}.npz", 100 * label + number)
    return tmp_path / "data"


def load(root, **options):
    return load_event_data("ncaltech101", root, 3, sensor_size=SENSOR, **options)


def check(root):
    """What ``--check`` says is bad."""
    about = DATA_SETS["cifar10dvs"]  # of the sensor 128x128
    return check_event_data(about, root, 3)[0]


def rewrite(path, **arrays_):
    with np.load(path) as file:
        np.savez(path, **{**file, **arrays_})


# Arrays ---------------------------------------------------------------------------------------------------------------


def test_polarities_of_minus_one_and_one_are_understood(root):
    expected = [frames for frames, _ in load(root).train]
    shutil.rmtree(root / "frames_number_3_split_by_number")
    for path in root.glob("events_np/*/*.npz"):
        with np.load(path) as file:
            events = dict(file)
        np.savez(path, **{**events, "p": 2 * events["p"].astype(np.int8) - 1})
    for (frames, _), same in zip(load(root).train, expected, strict=True):
        assert np.array_equal(frames, same) and frames[:, 0].sum() > 0 and frames[:, 1].sum() > 0


WRONG = {
    "NaN": ({"t": np.where(np.arange(400) == 7, np.nan, np.arange(400.0))}, "has times that are no finite numbers"),
    "text": ({"t": np.full(400, "a")}, "has times that are no finite numbers"),
    "backwards": ({"t": np.arange(400)[::-1]}, "has times that are not in order (399 events are late, by up to 1)"),
    "jump": (
        {"t": np.r_[np.arange(200) + 5000, np.arange(200)]},
        "has times that are not in order (1 events are late, by up to 5199)",
    ),
    "shuffled": ({"t": np.random.default_rng(0).permutation(400)}, "has times that are not in order"),
    "three polarities": ({"p": np.arange(400) % 3 - 1}, "has polarities from -1 to 1; they must be 0 and 1, or -1 and"),
    "polarity 2": ({"p": np.arange(400) % 3}, "has polarities from 0 to 2"),
    "unsigned": ({"p": (np.arange(400) % 2 - 1).astype(np.uint8)}, "has polarities from 0 to 255"),
    "negative x": ({"x": np.arange(400) % 100 - 1}, "has events at x -1, y "),
    "large y": ({"y": np.arange(400) % 129}, "has events up to x 127, y 128, and the sensor has 128x128 pixels"),
    "fractions": ({"x": np.linspace(0, 100, 400)}, "has x, y or p that are no whole numbers"),
    "lengths": ({"x": np.arange(399) % 100}, "has t, x, y and p of different lengths"),
    "two axes": ({name: np.zeros((20, 20), int) for name in "txyp"}, "has t, x, y and p of different lengths"),
    "nothing": ({name: np.zeros(0, int) for name in "txyp"}, "has no events"),
    "objects": ({"x": np.array([None] * 400)}, "cannot be read"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_with_an_array_is_a_bad_sample_by_name(kind, root):
    content, what = WRONG[kind]
    rewrite(root / "events_np/bee/4.npz", **content)
    with pytest.raises(UserError) as caught:
        load(root)
    assert "1 bad files" in str(caught.value) and f"events_np/bee/4.npz: {what}" in str(caught.value)
    assert [f"{file.path.name}: {file.what}".startswith(f"4.npz: {what}") for file in check(root)] == [True]
    assert len(load(root, on_bad_sample="skip").train) == 17


def test_a_few_events_that_are_a_little_late_stay_where_they_are(root):
    t = np.arange(0, 4000, 10)
    t[200] = 1500
    rewrite(root / "events_np/bee/4.npz", t=t)
    assert np.array_equal(read_events(root / "events_np/bee/4.npz")["t"], t) and len(load(root).train) == 18


ANY = st.one_of(
    arrays.array_shapes(min_dims=0, max_dims=2, max_side=4).flatmap(
        lambda shape: arrays.arrays(arrays.scalar_dtypes(), shape)
    ),
    arrays.arrays(np.int64, st.integers(0, 6), elements=st.integers(-2, 200)),
)


@settings(max_examples=300, deadline=2000)
@given(st.fixed_dictionaries(dict.fromkeys("txyp", ANY)))
def test_any_arrays_give_valid_events_or_a_named_error(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.npz"
        np.savez(path, **content)
        try:
            events = read_events(path, SENSOR)
        except RecordingError as error:
            assert str(path) in str(error)
            return
    assert len({values.shape for values in events.values()}) == 1 and len(events["t"])
    assert set(events["p"].tolist()) <= {0, 1} and np.isfinite(events["t"]).all()
    assert all(events[axis].min() >= 0 and events[axis].max() < 128 for axis in "xy")


@settings(max_examples=100, deadline=2000)
@given(st.binary(max_size=300), st.integers(0, 2**20), st.booleans())
def test_any_bytes_are_a_named_error(content, position, foreign):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.npz"
        write_events(path, 0)
        whole = path.read_bytes()
        position %= len(whole)
        path.write_bytes(content if foreign else whole[:position] + content + whole[position + len(content) :])
        try:
            events = read_events(path, SENSOR)
        except RecordingError as error:
            assert str(path) in str(error)
        else:
            assert len(events["t"]) == 400  # zip does not look at every byte


# Folders --------------------------------------------------------------------------------------------------------------


def test_classes_and_samples_behind_links_are_read(root, tmp_path):
    expected = load(root)
    shutil.rmtree(root / "frames_number_3_split_by_number")
    (root / "events_np/ant").rename(tmp_path / "ant")
    (root / "events_np/ant").symlink_to(tmp_path / "ant")
    (root / "events_np/bee/3.npz").rename(tmp_path / "3.npz")
    (root / "events_np/bee/3.npz").symlink_to(tmp_path / "3.npz")
    again = load(root)
    assert (len(again.train), len(again.test)) == (18, 2) and again.info == expected.info
    assert check(root) == []
    frames = root / "frames_number_3_split_by_number"
    shutil.move(frames / "bee", tmp_path / "bee")
    (frames / "bee").symlink_to(tmp_path / "bee")
    assert load(root).info == expected.info


LINKS = {
    "events_np/ant/up": ("..", "is a folder inside a class and is not read"),
    "events_np/up": (".", "is a link to .*, which is read already"),
    "events_np/cow": ("ant", "is a link to .*/ant, which is read already"),
    "events_np/ant/10.npz": ("9.npz", "is a link to a sample that is read already"),
    "events_np/ant/11.npz": ("../bee/9.npz", "is a link to a sample that is read already"),
    "events_np/dog": ("nowhere", "is a link to nothing"),
    "events_np/ant/12.npz": ("nowhere", "is a link to nothing"),
    "frames_number_3_split_by_number/ant/up": ("..", "is a folder inside a class and is not read"),
    "frames_number_3_split_by_number/ant/13.npz": ("9.npz", "is a link to a sample that is read already"),
}


@pytest.mark.parametrize("name", LINKS)
def test_a_link_cannot_make_two_samples_of_one_and_what_it_hides_is_named(name, root):
    load(root)
    target, what = LINKS[name]
    (root / name).symlink_to(target)
    with pytest.raises(UserError, match=rf"1 bad files .*\n.*{name}: {what}"):
        load(root)
    assert [str(file).startswith(f"{root / name}: ") for file in check(root)] == [True]
    assert len(load(root, on_bad_sample="skip").train) == 18


@pytest.mark.parametrize("place", ["events_np", "frames_number_3_split_by_number"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_is_named_and_never_opened(make, place, root):
    load(root)
    make(root / place / "bee/10.npz")
    with pytest.raises(
        UserError, match=r"1 bad files .*\n.*bee/10\.npz: is a (named pipe and no file|folder inside a)"
    ):
        load(root)
    assert [file.path.name for file in check(root)] == ["10.npz"]


def test_samples_outside_of_a_class_and_of_a_part_are_named(gesture_data, root, tmp_path):
    shutil.copy(root / "events_np/ant/0.npz", root / "events_np/alone.npz")
    with pytest.raises(UserError, match=r"alone\.npz: does not lie in the folder of a class"):
        load(root)
    shutil.copytree(gesture_data / "events_np", tmp_path / "gesture/events_np")
    (tmp_path / "gesture/events_np/test").rename(tmp_path / "gesture/events_np/valid")
    with pytest.raises(UserError, match="events_np/valid: is neither of the folders train, test"):
        load_event_data("dvs128", tmp_path / "gesture", 3)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_a_folder_that_cannot_be_read_is_named(root):
    (root / "events_np/bee").chmod(0)
    try:
        with pytest.raises(UserError, match=r"events_np/bee: cannot be read \(Permission denied\)"):
            load(root)
    finally:
        (root / "events_np/bee").chmod(0o755)


def test_names_may_be_any_bytes(root):
    name = os.fsdecode(b"caf\xe9")
    (root / "events_np/bee").rename(root / f"events_np/{name}")
    data = load(root)
    assert data.classes == ["ant", name] and load(root).info == data.info


def test_very_many_bad_files_of_one_kind_are_summed_up():
    bad = [BadFile(Path(f"d/{n:04}"), f"has events up to x {n}") for n in range(1100)] + [BadFile(Path("e"), "is gone")]
    lines = listing(bad).splitlines()
    assert len(lines) == 1 + 3 + 1 + 1 and "... and 1097 more with the same fault" in listing(bad)
    assert "d/0000: has events up to x 0" in listing(bad) and "e: is gone" in listing(bad)


# What has changed -----------------------------------------------------------------------------------------------------


def test_frames_older_than_their_events_are_made_again(root, capsys):
    before = load(root)
    write_events(root / "events_np/bee/4.npz", 4711)
    assert [str(file.path.name) for file in check(root)] == ["4.npz"] and "is older than its events" in check(root)[
        0
    ].what
    capsys.readouterr()
    after = load(root)
    out = capsys.readouterr().out
    assert "making 3 frames of 1 samples" in out and "1 samples have changed since" in out
    assert after.info.fingerprint == before.info.fingerprint and after.info.contents != before.info.contents
    (change,) = changes(before.manifest, after.manifest)
    assert change.endswith("bee/4 has other contents")
    with np.load(root / "events_np/bee/4.npz") as events:
        expected = np.zeros((128, 128))
        np.add.at(expected, (events["y"], events["x"]), 1)
    files = {path.stem: frames for (path, _), (frames, _) in zip(after.train.files, after.train, strict=True)
             if path.parent.name == "bee"}  # fmt: skip
    assert np.array_equal(files["4"].sum((0, 1)), expected)
    capsys.readouterr()
    load(root)
    assert capsys.readouterr().out == ""


def test_events_that_were_replaced_by_older_ones_are_noticed(root, capsys):
    load(root)
    path = root / "events_np/bee/4.npz"
    write_events(path, 4711)
    os.utime(path, (0, 0))
    capsys.readouterr()
    load(root)
    assert "making 3 frames of 1 samples" in capsys.readouterr().out


def test_a_recording_that_was_replaced_is_converted_again(tmp_path, capsys):
    for number in range(10):
        path = tmp_path / f"extract/Caltech101/ant/{number}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(np.random.default_rng(number).integers(0, 100, 500).astype(np.uint8).reshape(-1, 5).tobytes())
    for path in tmp_path.rglob("*.bin"):
        content = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 5).copy()
        content[:, 2:4], content[:, 4] = 0, np.arange(100)
        path.write_bytes(content.tobytes())
    load(tmp_path)
    content[:, 0] = 5
    (tmp_path / "extract/Caltech101/ant/3.bin").write_bytes(content.tobytes())
    capsys.readouterr()
    load(tmp_path)
    out = capsys.readouterr().out
    assert "converting 1 recordings" in out and "making 3 frames of 1 samples" in out
    assert set(read_events(tmp_path / "events_np/ant/3.npz")["x"].tolist()) == {5}


@settings(max_examples=100, deadline=2000)
@given(st.integers(0, 2**20), st.text(max_size=40))
def test_a_damaged_record_is_read_as_far_as_it_goes(position, foreign):
    stamp, facts = Stamp(10, 2**60), Facts("0" * 16, "f" * 16, 3, 100, 120)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record"
        write_record(path, {f"ant/image {n}": (stamp, stamp, facts) for n in range(5)})
        assert len(read_record(path)) == 5
        text = path.read_text()
        position %= len(text)
        path.write_text(text[:position] + foreign + text[position + len(foreign) :])
        assert all(isinstance(known, Facts) for _, _, known in read_record(path).values())


@pytest.mark.parametrize("kind", ["reversed frames", "one count", "swapped classes"])
def test_changed_frames_have_another_checksum_and_are_named(kind, root):
    before = load(root)
    frames = root / "frames_number_3_split_by_number"
    if kind == "swapped classes":
        for number in range(10):
            one, other = frames / f"ant/{number}.npz", frames / f"bee/{number}.npz"
            one.rename(root / "swap")
            other.rename(one)
            (root / "swap").rename(other)
    else:
        content = np.load(frames / "ant/3.npz")["frames"]
        content = (
            content[::-1]
            if kind == "reversed frames"
            else content + (np.arange(content.size) == 77).reshape(content.shape)
        )
        np.savez(frames / "ant/3.npz", frames=content)
    after = load(root)
    assert after.info.fingerprint == before.info.fingerprint and after.info.contents != before.info.contents
    found = changes(before.manifest, after.manifest)
    if kind == "swapped classes":
        assert len(found) == 20
    else:
        what = "other frames of the same events" if kind == "reversed frames" else "other contents"
        assert len(found) == 1 and found[0].endswith(f"ant/3 has {what}")


def test_the_file_of_a_split_is_never_rewritten(root, capsys):
    load(root)
    (path,) = (root / "splits").iterdir()
    written = path.read_text()
    write_events(root / "events_np/bee/4.npz", 4711)
    load(root)
    assert path.read_text() == written and len(list((root / "splits").iterdir())) == 2
    assert f"1 samples have changed since {path} was written" in capsys.readouterr().out


def test_a_copy_is_the_same_data(root, tmp_path):
    before = load(root)
    time.sleep(0.01)
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)  # new times
    after = load(tmp_path / "copy")
    assert after.info == before.info and changes(before.manifest, after.manifest) == []


# Slips that cost minutes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "said"), [((34, 34), "34x34"), ((260, 346), "260x346")])
def test_recordings_of_another_camera_are_noticed_before_frames_are_made(size, said, tmp_path):
    for number in range(40):
        write_events(tmp_path / f"events_np/ant/{number}.npz", number, *size, count=4000)
    with pytest.raises(UserError, match=rf"fill {said} pixels and .* has 180x240; give .* --sensor-size, .* {said}"):
        load_event_data("ncaltech101", tmp_path, 3)
    assert not list(tmp_path.glob("*frames*"))
    assert len(load_event_data("ncaltech101", tmp_path, 3, sensor_size=size).train) == 36


def test_another_number_of_classes_is_noticed_before_anything_is_made(root):
    with pytest.raises(UserError, match="has 2 classes and the network 101"):
        load(root, num_classes=101)
    assert not list(root.glob("*frames*"))
    assert load(root, num_classes=2).classes == ["ant", "bee"]


def test_headers_of_arrays_are_parsed_one_at_a_time_as_python_3_11_needs_it(root, monkeypatch):
    parse, inside, most = ast.literal_eval, [], []

    def watched(text):
        inside.append(text)
        most.append(len(inside))
        time.sleep(0.001)  # another thread's turn
        try:
            return parse(text)
        finally:
            inside.pop()

    monkeypatch.setattr(ast, "literal_eval", watched)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read_events, root.glob("events_np/*/*.npz")))
    assert len(found) == 20 and len(most) >= 80 and max(most) == 1
    load(root, workers=4)
    assert max(most) == 1


@pytest.mark.parametrize("order", "CF")
def test_an_array_is_read_as_numpy_reads_it(tmp_path, order):
    array = np.asarray(np.random.default_rng(0).integers(0, 9, (3, 2, 5)), order=order)
    np.save(tmp_path / "a.npy", array)
    with (tmp_path / "a.npy").open("rb") as file:
        np.testing.assert_array_equal(read_array(file), np.load(tmp_path / "a.npy"), strict=True)


def test_an_array_of_objects_is_refused_and_nothing_is_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], object))
    with (tmp_path / "a.npy").open("rb") as file, pytest.raises(ValueError):
        read_array(file)


@pytest.mark.parametrize("shape", [(-1,), (-1, -1), (10**9,)])
def test_a_header_that_does_not_fit_what_follows_is_refused(tmp_path, shape):
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
        file.write(np.zeros(6).tobytes())
    with (tmp_path / "a.npy").open("rb") as file, pytest.raises(ValueError):
        read_array(file)


def test_no_more_is_unpacked_than_the_header_says(tmp_path):
    one = io.BytesIO()
    np.save(one, np.arange(3))
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("t.npy", one.getvalue() + bytes(2**28))
    tracemalloc.start()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive, archive.open("t.npy") as file:
        assert read_array(file).tolist() == [0, 1, 2]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24

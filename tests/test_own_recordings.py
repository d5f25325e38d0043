"""A folder of recordings in any format becomes a data set that every event script trains on."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import SMALL
from tests.test_prepare_data import error_of, prepare  # noqa: F401 - a fixture
from tests.test_recordings import HEADER2, HEADER3, aedat2, aedat3, events, five_bytes, packet
from utils.data.events import load_event_data
from utils.prepare.formats import SUFFIXES, read_recording
from utils.prepare.recordings import RecordingError


def structured(of):
    array = np.zeros(len(of["t"]), [("t", "<u8"), ("x", "<u2"), ("y", "<u2"), ("on", "?")])
    for name, values in of.items():
        array["on" if name == "p" else name] = values
    return array


def write(path, of):
    """A recording in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **of)
    elif path.suffix == ".npy":
        np.save(path, structured(of))
    elif path.suffix == ".bin":
        path.write_bytes(five_bytes(of))
    elif path.stem.startswith("old"):
        path.write_bytes(aedat2(of))
    else:
        path.write_bytes(aedat3(packet(of)))


def smaller(of, height, width):
    return {**of, "x": of["x"] % width, "y": of["y"] % height}


def folder(root, names=("a.npz", "b.npy", "c.bin", "d.aedat", "old.aedat"), parts=("",), size=(128, 128)):
    for place, part in enumerate(parts):
        for label in range(3):
            for number, name in enumerate(names):
                of = smaller(events(600, 1000 * place + 100 * label + number), *size)
                write(root / part / f"class{label}" / name, of)
    return root


def test_every_format_becomes_the_same_frames(prepare, tmp_path):  # noqa: F811
    of = events(500, 1)
    for label in "ab":
        for number, name in enumerate(("a.npz", "b.npy", "c.bin", "d.aedat")):
            write(tmp_path / label / name, {**of, "x": (of["x"] + 10 * number + (label == "b")) % 128})
    code, out, err = prepare("folder", "--data-dir", tmp_path, "-T", 2, "--split", tmp_path / "none")
    assert code == 2 and "8 recordings in 2 classes, of a camera with 128x128 pixels (events fill 128x128" in out
    (tmp_path / "split.txt").write_text("test,a/a\ntest,b/a\ntrain,*\n")
    code, out, err = prepare("folder", "--data-dir", tmp_path, "-T", 2, "--split", tmp_path / "split.txt")
    assert code == 0, err
    data = load_event_data("dvs128", tmp_path, 2, split=str(tmp_path / "split.txt"))
    assert data.title == tmp_path.name and not data.info.official
    for (path, _), (frames, _) in zip(data.train.files, data.train, strict=True):
        number = "abcd".index(path.stem)
        expected = np.zeros((128, 128))
        np.add.at(expected, (of["y"], (of["x"] + 10 * number + (path.parent.name == "b")) % 128), 1)
        assert np.array_equal(frames.sum((0, 1)), expected)


@pytest.mark.parametrize("parts", [("",), ("train", "test"), ("Train", "Test")])
def test_the_split_is_that_of_the_folders_where_there_is_one(parts, prepare, tmp_path):  # noqa: F811
    folder(tmp_path, parts=parts, names=[f"{n}.bin" for n in range(10)], size=(34, 34))
    code, out, err = prepare("folder", "--data-dir", tmp_path, "-T", 3)
    assert code == 0 and "in 3 classes, of a camera with 34x34 pixels" in out, err
    data = load_event_data("cifar10dvs", tmp_path, 3)
    expected = (27, 3, "random") if parts == ("",) else (30, 30, "own")
    assert (len(data.train), len(data.test), data.info.rule) == expected
    assert data.classes == ["class0", "class1", "class2"] and data.frame_size == (34, 34)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}
    assert prepare("folder", "--data-dir", tmp_path, "-T", 3)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"} == before
    code, out, err = prepare("folder", "--data-dir", tmp_path, "-T", 3, "--check")
    assert code == 0 and "all whole" in out, err


@pytest.mark.parametrize("name", ["dvs128", "cifar10dvs", "ncaltech101"])
def test_every_event_script_trains_on_it(name, script, prepare, tmp_path):  # noqa: F811
    root = folder(tmp_path / "data", names=[f"{n}.bin" for n in range(10)], size=(40, 50))
    assert prepare("folder", "--data-dir", root, "-T", 4)[0] == 0
    arguments = ["--data-dir", root, *SMALL, "--RCR", 4, "--epochs", 1, "--output-dir", tmp_path / "out"]
    code, out, err = script(name, *arguments)
    assert code == 0 and "27 training, 3 test, 3 classes" in out, err
    assert json.loads((tmp_path / "out/evaluation.json").read_text())["count"] == 3


@pytest.mark.parametrize(
    ("size", "found"), [((34, 34), "34x34"), ((126, 127), "128x128"), ((260, 340), "260x346"), ((60, 70), "60x70")]
)
def test_the_size_of_the_camera_is_found(size, found, prepare, tmp_path):  # noqa: F811
    for number in range(10):
        write(tmp_path / f"one/{number}.npz", {**events(9000, number), **{
            axis: np.random.default_rng(number).integers(0, side, 9000) for axis, side in zip("yx", size, strict=True)
        }})  # fmt: skip
    code, out, err = prepare("folder", "--data-dir", tmp_path, "-T", 2)
    assert code == 0 and f"of a camera with {found} pixels" in out, err
    code, out, err = prepare("folder", "--data-dir", tmp_path, "-T", 3, "--sensor-size", "400x500")
    assert code == 0 and "of a camera with 400x500 pixels (as given" in out, err
    code, out, err = prepare("folder", "--data-dir", tmp_path, "-T", 3)
    assert code == 0 and "of a camera with 400x500 pixels (as found before" in out, err


def test_a_recording_that_came_later_is_added_and_a_bad_one_is_named(prepare, tmp_path):  # noqa: F811
    root = folder(tmp_path, names=[f"{n}.bin" for n in range(10)], size=(34, 34))
    assert prepare("folder", "--data-dir", root, "-T", 2)[0] == 0
    write(root / "class1/10.bin", smaller(events(600, 7), 34, 34))
    write(root / "class1/11.bin", events(600, 8))
    (root / "class2/12.bin").write_bytes(bytes(7))
    error = error_of(prepare("folder", "--data-dir", root, "-T", 2))
    assert "1 bad files" in error and "class2/12.bin: is cut off inside an event" in error
    (root / "class2/12.bin").unlink()
    error = error_of(prepare("folder", "--data-dir", root, "-T", 2))
    assert "1 bad files" in error and "class1/11.npz: has events up to x 127" in error
    code, out, _ = prepare("folder", "--data-dir", root, "-T", 2, "--on-bad-sample", "skip")
    assert code == 0 and "left out: 1 bad files" in out


def test_two_recordings_of_one_name_are_not_mixed_up(prepare, tmp_path):  # noqa: F811
    root = folder(tmp_path, names=["a.bin", "b.npz"])
    shutil.copy(root / "class0/b.npz", root / "class0/a.npz")
    error = error_of(prepare("folder", "--data-dir", root, "-T", 2))
    assert "class0/a.npz: and " in error or "class0/a.bin: and " in error
    assert "are one sample by their names" in error


@pytest.mark.parametrize(("suffix", "package"), [(".aedat4", "aedat"), (".raw", "faery"), (".dat", "faery")])
def test_a_package_that_is_missing_is_asked_for_by_name(suffix, package, prepare, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "one").mkdir()
    (tmp_path / f"one/a{suffix}").write_bytes(b"% evt 3.0\n")
    error = error_of(prepare("folder", "--data-dir", tmp_path))
    assert f"a{suffix}: needs the package {package} to be read: pip install {package}" in error


@pytest.mark.parametrize("suffix", [".raw", ".dat"])
def test_files_of_prophesee_cameras_are_those_that_were_written(suffix, tmp_path):
    faery = pytest.importorskip("faery")
    of = structured(events(500, 3)).astype(faery.EVENTS_DTYPE)
    path = tmp_path / f"a{suffix}"
    faery.events_stream_from_array(of, (346, 260)).to_file(path)
    found, sensor = read_recording(path)
    assert sensor == (260, 346) and all(np.array_equal(found[name], of[name]) for name in "xy")
    assert np.array_equal(found["p"], of["on"]) and np.array_equal(np.diff(found["t"]), np.diff(of["t"].astype(int)))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RecordingError, match="is cut off inside an event, at byte"):
        read_recording(path)


def test_nothing_to_prepare_and_a_foreign_description_are_sentences(prepare, tmp_path):  # noqa: F811
    assert "folder needs --data-dir DIR" in error_of(prepare("folder"))
    for root in (tmp_path, tmp_path / "nowhere"):
        assert "has no recordings; put <class>/<recording> there" in error_of(prepare("folder", "--data-dir", root))
    assert "is not prepared; leave --check out" in error_of(prepare("folder", "--data-dir", tmp_path, "--check"))
    for text in ("", "[]", "{}", '{"sensor": [0, 5], "parts": []}', '{"sensor": ["a", 5], "parts": []}', "[" * 9000):
        (tmp_path / "data.json").write_text(text)
        assert "data.json does not describe recordings" in error_of(prepare("folder", "--data-dir", tmp_path))
    (tmp_path / "data.json").unlink()
    os.mkfifo(tmp_path / "data.json")
    assert "has no recordings" in error_of(prepare("folder", "--data-dir", tmp_path))


CONTENT = st.one_of(
    st.binary(max_size=300),
    st.binary(max_size=300).map(lambda data: HEADER2 + data),
    st.binary(max_size=300).map(lambda data: HEADER3 + data),
    st.binary(max_size=200).map(lambda data: b"\x93NUMPY\x01\x00v\x00{'descr': '<u4', 'fortran_order': False" + data),
    st.binary(max_size=200).map(lambda data: b"% evt 3.0\n% format EVT3;width=346;height=260\n" + data),
)


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=80, deadline=3000)
@given(content=CONTENT)
def test_any_bytes_give_valid_events_or_a_named_error(suffix, content):
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"any{suffix}"
        path.write_bytes(content)
        try:
            found, sensor = read_recording(path)
        except RecordingError as error:
            assert str(path) in str(error)
            return
    assert set(found) == set("txyp") and len({values.shape for values in found.values()}) == 1 and len(found["t"])
    assert set(np.unique(found["p"]).tolist()) <= {0, 1} and min(found["x"].min(), found["y"].min()) >= 0
    assert sensor is None or (found["y"].max() < sensor[0] and found["x"].max() < sensor[1])

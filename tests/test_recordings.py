"""Raw recordings: SpikingJelly's events, and a named error for any other bytes."""

import importlib
import struct
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from utils.prepare.recordings import RecordingError, Span, read_aedat2, read_aedat3, read_bin, read_spans
from utils.prepare.spikingjelly_data import _function, _torchaudio_or_placeholder

HEADER3 = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n"
HEADER2 = b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n"
READERS = {"aedat3": read_aedat3, "aedat2": read_aedat2, "bin": read_bin, "csv": read_spans}


def events(count, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "t": np.sort(rng.integers(0, 2**22, count)),
        "x": rng.integers(0, 128, count),
        "y": rng.integers(0, 128, count),
        "p": rng.integers(0, 2, count),
    }


def packet(of, overflow=0, kind=1, capacity=None):
    """A packet of AEDAT 3.1."""
    address = (of["x"] << 17) | (of["y"] << 2) | (of["p"] << 1) | 1
    data = np.stack([address, of["t"]], 1).astype("<u4").tobytes()
    count = len(of["t"])
    return (
        struct.pack("<HHIIIIII", kind, 1, 8, 4, overflow, count if capacity is None else capacity, count, count) + data
    )


def aedat3(*packets):
    return HEADER3 + b"".join(packets)


def aedat2(of):
    address = (of["y"] << 8) | (of["x"] << 1) | of["p"]
    return HEADER2 + np.stack([address, of["t"]], 1).astype(">u4").tobytes()


def five_bytes(of):
    words = (of["x"] << 32) | (of["y"] << 24) | (of["p"] << 23) | of["t"]
    return b"".join(int(word).to_bytes(5, "big") for word in words)


def same(ours, theirs, types=True):
    return ours.keys() == theirs.keys() and all(
        np.array_equal(ours[name], theirs[name]) and (not types or ours[name].dtype == theirs[name].dtype)
        for name in ours
    )


# The same as SpikingJelly --------------------------------------------------------------------------------------------


def test_aedat3_is_spikingjelly_s_to_the_bit(tmp_path):
    path = tmp_path / "user01.aedat"
    special = struct.pack("<HHIIIIII", 0, 1, 8, 4, 0, 3, 3, 3) + bytes(24)
    path.write_bytes(aedat3(packet(events(500)), special, packet(events(0)), packet(events(300, 1), overflow=3)))
    ours, cut = read_aedat3(path)
    assert not cut and same(ours, _function("load_aedat_v3")(str(path)))
    assert len(ours["t"]) == 800 and ours["t"][-1] == (3 << 31) | events(300, 1)["t"][-1]


def test_a_last_packet_that_ends_behind_a_whole_event_is_read_as_far_as_it_goes(tmp_path):
    path = tmp_path / "user01.aedat"
    path.write_bytes(aedat3(packet(events(100)), packet(events(40, 1), capacity=50)))
    ours, cut = read_aedat3(path)
    assert cut and same(ours, _function("load_aedat_v3")(str(path)))


def test_bin_is_spikingjelly_s_to_the_bit(tmp_path):
    path = tmp_path / "image_0001.bin"
    path.write_bytes(five_bytes(events(700)))
    assert same(read_bin(path), _function("load_ATIS_bin")(str(path)))


def test_aedat2_is_spikingjelly_s(tmp_path, monkeypatch):
    """0.0.0.0.14 needs the binary ``np.fromstring`` of older numpy."""
    with _torchaudio_or_placeholder():
        module = importlib.import_module("spikingjelly.datasets.cifar10_dvs")
    if hasattr(module, "np"):
        monkeypatch.setattr(module, "np", SimpleNamespace(**{**vars(np), "fromstring": np.frombuffer, "bool": bool}))
    path = tmp_path / "cifar10_bird_0.aedat"
    path.write_bytes(aedat2(events(600)))
    theirs = getattr(module, "_load_origin_data", None) or module.CIFAR10DVS.load_origin_data  # 2.x, 0.0.0.0.14
    assert same(read_aedat2(path), theirs(str(path)), types=False)


def test_aedat2_axes_are_exchanged_and_mirrored(tmp_path):
    path = tmp_path / "a.aedat"
    path.write_bytes(HEADER2 + struct.pack(">II", (3 << 8) | (10 << 1) | 1, 77))  # x 10, y 3, polarity 1, 77 us
    assert {name: values.tolist() for name, values in read_aedat2(path).items()} == {
        "t": [77], "x": [124], "y": [117], "p": [0],
    }  # fmt: skip


def test_spans_count_classes_from_zero(tmp_path):
    path = tmp_path / "user01_labels.csv"
    path.write_bytes(b"class,startTime_usec,endTime_usec\r\n1,80048239,85092709\r\n11,89431170,95231007\r\n\r\n")
    assert read_spans(path) == [Span(0, 80048239, 85092709), Span(10, 89431170, 95231007)]


# Anything else --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "content", "what"),
    [
        ("aedat3", b"", "is no AEDAT 3 recording"),
        ("aedat3", b"<html>", "is no AEDAT 3 recording"),
        ("aedat3", HEADER3 + b"12345", "is cut off inside the header of a packet"),
        ("aedat3", aedat3(packet(events(50)))[:-3], "cut off inside an event"),
        (
            "aedat3",
            HEADER3 + struct.pack("<HHIIIIII", 1, 1, 2**31, 4, 0, 2**31, 1, 1) + bytes(80),
            "damaged or cut off",
        ),
        ("aedat2", b"", "is no AEDAT 2.0 recording"),
        ("aedat2", HEADER2, "has no events"),
        ("aedat2", aedat2(events(50))[:-3], "is cut off inside an event"),
        ("bin", b"", "is empty"),
        ("bin", bytes(12), "is cut off inside an event: 12 bytes"),
        ("csv", b"class,start,end\n", "has no labelled spans"),
        ("csv", b"class,start,end\n12,1,2\n", "line 2: class 12 is not one of 1 to 11"),
        ("csv", b"class,start,end\n1,2,3\n1,-2,3\n", "line 3: '1,-2,3'"),
        ("csv", b"class,start,end\n1,2\n", "line 2: '1,2'"),
        ("csv", b"\xff\xfe\x00", "is no text"),
    ],
)
def test_what_is_wrong_is_said_with_the_path(kind, content, what, tmp_path):
    path = tmp_path / f"file.{kind}"
    path.write_bytes(content)
    with pytest.raises(RecordingError) as caught:
        READERS[kind](path)
    assert what in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("kind", READERS)
def test_a_folder_and_a_missing_file_are_errors(kind, tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(RecordingError, match="is not there, or no file"):
            READERS[kind](path)


PACKETS = st.builds(
    lambda fields, data: struct.pack("<HHIIIIII", *fields) + data,
    st.tuples(
        st.sampled_from([0, 1, 2]), st.integers(0, 65535),
        *[st.one_of(st.integers(0, 64), st.integers(0, 2**32 - 1)) for _ in range(6)],
    ),
    st.binary(max_size=200),
)  # fmt: skip
CONTENT = st.one_of(
    st.binary(max_size=400),
    st.lists(PACKETS, max_size=4).map(lambda packets: HEADER3 + b"".join(packets)),
    st.binary(max_size=400).map(lambda data: HEADER2 + data),
    st.text("0123456789,\r\n-+ .e", max_size=60).map(lambda text: b"class,start,end\n" + text.encode()),
)


@pytest.mark.parametrize("kind", READERS)
@settings(max_examples=250, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=CONTENT)
def test_any_bytes_give_valid_events_or_a_named_error_in_little_memory(kind, content, tmp_path):
    path = tmp_path / "any"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        found = READERS[kind](path)
    except RecordingError as error:
        assert str(path) in str(error)
        return
    finally:
        assert tracemalloc.get_traced_memory()[1] < 40 * len(content) + 100_000
        tracemalloc.stop()
    if kind == "csv":
        assert found and all(0 <= span.label < 11 for span in found)
        return
    found = found[0] if kind == "aedat3" else found
    assert list(found) == ["t", "x", "y", "p"] and len({len(values) for values in found.values()}) == 1
    assert set(found["p"].tolist()) <= {0, 1} and all(values.min(initial=0) >= 0 for values in found.values())


def test_threads_that_import_at_once_do_not_take_the_placeholder_from_each_other():
    began = threading.Barrier(8)

    def enter(_):
        began.wait()
        for _ in range(50):
            with _torchaudio_or_placeholder():
                assert "torchaudio" in sys.modules

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(8)))

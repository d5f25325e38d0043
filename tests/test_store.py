"""Packed frames: the same counts, from files that are never misread."""

import dataclasses
import multiprocessing
import os
import pickle
import tempfile
from pathlib import Path

import blosc2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from utils.data.store import Contents, count_type, damage, encode, open_store, write_store
from utils.errors import DataError

CONTENTS = Contents(3, 20, 30, part="train", split="12345678", count=4, samples="abc", dtype="uint8")
SHAPE = (3, 2, 20, 30)


def samples(largest=9, seed=0):
    rng = np.random.default_rng(seed)
    return [np.where(rng.random(SHAPE) < share, rng.integers(1, largest + 1, SHAPE), 0) for share in (0, 0.01, 0.3, 1)]


def write(path, contents, content):
    write_store(path, contents, (encode(sample, contents.dtype) for sample in content))


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "s.b2nd", CONTENTS, samples())
    return tmp_path / "s.b2nd"


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(
        np.int32,
        arrays.array_shapes(min_dims=1, max_dims=1, max_side=3).map(lambda shape: (*shape, 2, 5, 7)),
        elements=st.one_of(st.just(0), st.integers(0, 5), st.integers(0, 2**31 - 1)),
        fill=st.just(0),
    )
)
def test_any_counts_come_back(counts):
    dtype = count_type(int(counts.max(initial=0)))
    contents = Contents(len(counts), 5, 7, "test", "1", 1, "a", dtype.name)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "s", contents, [counts])
        again = open_store(Path(folder) / "s", contents)[0]
    assert again.dtype == dtype and np.array_equal(again, counts)


@pytest.mark.parametrize(("largest", "expected"), [(255, "uint8"), (256, "int16"), (32767, "int16"), (32768, "int32")])
def test_the_smallest_type_that_holds_all_counts_is_used(largest, expected, tmp_path):
    content = samples()
    content[2][0, 0, 0, 0] = largest
    contents = dataclasses.replace(CONTENTS, dtype=count_type(largest).name)
    write(tmp_path / "s", contents, content)
    store = open_store(tmp_path / "s", contents)
    for index, sample in enumerate(content):
        assert store[index].dtype == np.dtype(expected) and np.array_equal(store[index], sample)
    assert not list(tmp_path.glob(".*"))


def test_the_file_is_an_array_of_blosc2(path):
    array = blosc2.open(str(path), mode="r")
    assert array.shape == (4, *SHAPE) and np.array_equal(array[:], samples())


def test_a_store_travels_to_another_process_without_its_array(path):
    store = open_store(path, CONTENTS)
    assert np.array_equal(store[3], samples()[3])
    message = pickle.dumps(store)
    assert len(message) < 2000
    assert np.array_equal(pickle.loads(message)[3], samples()[3])


def test_processes_read_the_same_store_at_once(path):
    store, results = open_store(path, CONTENTS), multiprocessing.get_context("fork").Queue()
    _ = store[0]  # opened before the fork

    def read():
        results.put(all(np.array_equal(store[i % 4], samples()[i % 4]) for i in range(100)))

    workers = [multiprocessing.get_context("fork").Process(target=read) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [True] * 3
    for worker in workers:
        worker.join()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Contents)])
def test_a_store_of_anything_else_is_not_opened(field, path):
    value = getattr(CONTENTS, field)
    other = dataclasses.replace(CONTENTS, **{field: value + 1 if isinstance(value, int) else value + "x"})
    assert open_store(path, other) is None
    assert open_store(path, CONTENTS) is not None


def test_every_flipped_byte_is_found(path):
    whole = path.read_bytes()
    for position in [*range(0, 1100, 7), *range(len(whole) - 900, len(whole), 5)]:
        content = bytearray(whole)
        content[position] ^= 0x10
        path.write_bytes(content)
        store = open_store(path, CONTENTS)
        if store is not None:  # it is in a sample
            with pytest.raises(DataError, match=r"are damaged \(checksum of sample [123]\); delete the file"):
                _ = [store[index] for index in range(4)]
        assert damage(path), position


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 200), st.integers(0, 2**32))
def test_a_store_with_foreign_bytes_is_refused_or_read_right(position, length, seed):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        write(path, CONTENTS, samples())
        whole = path.read_bytes()
        position %= len(whole)
        foreign = np.random.default_rng(seed).bytes(length)
        path.write_bytes(whole[:position] + foreign + whole[position + length :])
        store = open_store(path, CONTENTS)
        for index in range(4) if store is not None else ():
            try:
                assert np.array_equal(store[index], samples()[index])
            except DataError:
                continue


@pytest.mark.parametrize("content", [b"", b"EVFRAME1", b"<html>" * 500, b"b2nd" * 3000, bytes(5000), b"\xff" * 40])
def test_what_is_no_store_is_not_opened(content, path):
    path.write_bytes(content)
    assert open_store(path, CONTENTS) is None and damage(path)


def test_a_store_of_another_version_is_not_opened(path):
    """Even where its checksum is right."""
    other = dataclasses.make_dataclass("Contents", [*CONTENTS.__dict__, "another"], bases=(Contents,), frozen=True)
    write(path, other(**CONTENTS.__dict__, another=1), samples())
    assert open_store(path, CONTENTS) is None and damage(path)


@pytest.mark.parametrize("kept", [1, 500, 1100, -1])
def test_a_store_that_is_cut_off_is_not_opened(kept, path):
    path.write_bytes(path.read_bytes()[:kept])
    assert open_store(path, CONTENTS) is None


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_is_not_opened(kind, path, tmp_path):
    path.rename(tmp_path / "elsewhere")
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert open_store(path, CONTENTS) is None and damage(path)


def test_a_write_that_fails_leaves_the_old_store(path):
    def failing():
        yield encode(samples()[0], "uint8")
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        write_store(path, CONTENTS, failing())
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["s.b2nd"]


def test_nothing_that_is_in_the_way_of_a_write_is_touched(path):
    victim = path.with_name("victim")
    victim.write_text("mine")
    path.with_name(".s.b2nd.partial").symlink_to(victim)
    with pytest.raises(OSError, match="is no file of this program"):
        write(path, CONTENTS, samples())
    assert victim.read_text() == "mine"

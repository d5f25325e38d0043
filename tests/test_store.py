"""Packed frames: the same counts, from files that are never misread."""

import dataclasses
import hashlib
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from utils.data.packing import count_type, decode_counts, encode_counts
from utils.data.store import Contents, damage, open_store, pack, write_store
from utils.errors import DataError

CONTENTS = Contents(T=3, height=20, width=30, part="train", split="12345678", count=4, samples="abc")
SHAPE = (3, 2, 20, 30)


def samples(largest=9, seed=0):
    rng = np.random.default_rng(seed)
    return [np.where(rng.random(SHAPE) < share, rng.integers(1, largest + 1, SHAPE), 0) for share in (0, 0.01, 0.3, 1)]


@pytest.fixture
def path(tmp_path):
    write_store(tmp_path / "s.frames", CONTENTS, (pack(sample) for sample in samples()))
    return tmp_path / "s.frames"


@settings(max_examples=200, deadline=None)
@given(
    arrays.arrays(
        np.int32,
        arrays.array_shapes(min_dims=1, max_dims=4, max_side=40),
        elements=st.one_of(st.just(0), st.integers(0, 5), st.integers(0, 2**31 - 1)),
        fill=st.just(0),
    )
)
def test_any_counts_come_back(counts):
    dtype = count_type(int(counts.max(initial=0)))
    again = decode_counts(encode_counts(counts), counts.shape, dtype)
    assert again.dtype == dtype and np.array_equal(again, counts)


@pytest.mark.parametrize(("largest", "expected"), [(255, "uint8"), (256, "int16"), (32767, "int16"), (32768, "int32")])
def test_the_smallest_type_that_holds_all_counts_of_the_file_is_used(largest, expected, tmp_path):
    content = samples()
    content[2][0, 0, 0, 0] = largest
    write_store(tmp_path / "s", CONTENTS, (pack(sample) for sample in content))
    store = open_store(tmp_path / "s", CONTENTS)
    for index, sample in enumerate(content):
        assert store[index].dtype == np.dtype(expected) and np.array_equal(store[index], sample)
    assert not list(tmp_path.glob(".*"))


def test_a_store_travels_to_another_process_without_its_mapping(path):
    store = open_store(path, CONTENTS)
    assert np.array_equal(store[3], samples()[3])
    message = pickle.dumps(store)
    assert len(message) < 2000
    assert np.array_equal(pickle.loads(message)[3], samples()[3])


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Contents)])
def test_a_store_of_anything_else_is_not_opened(field, path):
    value = getattr(CONTENTS, field)
    other = dataclasses.replace(CONTENTS, **{field: value + 1 if isinstance(value, int) else value + "x"})
    assert open_store(path, other) is None
    assert open_store(path, CONTENTS) is not None


def test_every_flipped_byte_is_found(path):
    whole = path.read_bytes()
    for position in [*range(0, 1100, 7), *range(len(whole) - 300, len(whole), 5)]:
        content = bytearray(whole)
        content[position] ^= 0x10
        path.write_bytes(content)
        assert damage(path), position
        store = open_store(path, CONTENTS)
        if store is not None:  # it is in a sample
            with pytest.raises(DataError, match=r"are damaged \(checksum of sample 3\); delete the file"):
                _ = [store[index] for index in range(4)]


def header(**changes):
    described = {**dataclasses.asdict(CONTENTS), "dtype": "uint8", **changes}
    return b"EVFRAME1" + json.dumps(described).encode().ljust(2000)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"EVFRAME1", b"EVFRAME1" + b"{" * 2000, b"EVFRAME1" + b"[" * 2000, b"<html>" * 500),
        *(b"EVFRAME1" + text.ljust(2000) for text in (b"3", b'"text"', b"[]", b"{}", b"null", b"NaN")),
        *(header(count=count) for count in (-1, 10**15, 10**30, 1.5, "4", None, [4], True)),
        *(header(dtype=dtype) for dtype in ("float99", "O", {}, [[]])),
        header(another=1),
    ],
)
def test_what_is_no_store_is_not_opened(content, path):
    path.write_bytes(content)
    assert open_store(path, CONTENTS) is None and damage(path)


@pytest.mark.parametrize("changes", [{"dtype": "float99"}, {"dtype": None}, {"another": 1}, {"part": None}])
def test_a_store_of_another_version_is_not_opened(changes, path):
    """Even where its checksum is right."""
    whole = path.read_bytes()
    table = whole[8 + 1016 + 32 :][: 12 * CONTENTS.count + 8]
    head = header(**changes)[8 : 8 + 1016]
    path.write_bytes(b"EVFRAME1" + head + hashlib.sha256(head + table).digest() + whole[8 + 1016 + 32 :])
    assert open_store(path, CONTENTS) is None


@pytest.mark.parametrize("kept", [1, 500, 1100, -1])
def test_a_store_that_is_cut_off_is_not_opened(kept, path):
    path.write_bytes(path.read_bytes()[:kept])
    assert open_store(path, CONTENTS) is None


def test_a_write_that_fails_leaves_the_old_store(path):
    def failing():
        yield pack(samples()[0])
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    with pytest.raises(OSError, match="No space left"):
        write_store(path, CONTENTS, failing())
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["s.frames"]

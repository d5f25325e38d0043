"""Splits: the rules, their files, and those that ship with the repository."""

import random

import pytest
from torch.utils.data import Dataset

from tests.conftest import ROOT
from utils.data.splits import make_split, read_split
from utils.errors import UserError
from utils.prepare.datasets import DATA_SETS
from utils.prepare.spikingjelly_data import _function

CIFAR = [f"{label}/cifar10_{label}_{number}" for label in DATA_SETS["cifar10dvs"].class_names for number in range(1000)]


class Names(Dataset):
    """Samples of two classes in the order of their files."""

    def __init__(self, names):
        self.names = sorted(names, key=lambda name: f"{name}.npz")

    def __getitem__(self, index):
        return self.names[index], int(self.names[index][0])

    def __len__(self):
        return len(self.names)


@pytest.mark.parametrize("seed", [0, 3402])
def test_random_draws_from_the_sorted_names_of_each_class_by_the_seed(seed):
    names = [f"{label}/image_{number:04}" for label in ("ant", "bee") for number in range(1, 38)]
    split = make_split("random", random.Random(5).sample(names, len(names)), seed)
    expected = []
    for label in ("ant", "bee"):
        of_class = [name for name in names if name.startswith(label)]
        random.Random(f"{seed}/{label}").shuffle(of_class)
        expected += sorted(of_class[: int(0.9 * 37)])
    assert list(split.train) == expected
    assert set(split.train).isdisjoint(split.test) and {*split.train, *split.test} == set(names)


def test_first90_is_spikingjelly_s_split():
    names = [f"{label}/{number}" for label in (0, 1) for number in range(23 + label)]
    split = make_split("first90", names, 0)
    train, test = _function("split_to_train_test_set")(0.9, Names(names), 2)
    assert list(split.train) == [name for name, _ in train] and list(split.test) == [name for name, _ in test]


def test_tebn_takes_the_first_hundred_by_number_for_the_test():
    split = make_split("tebn", CIFAR, 0)
    assert len(split.train) == 9000
    assert {name.rpartition("_")[2] for name in split.test} == {str(number) for number in range(100)}
    with pytest.raises(UserError, match="goes by the numbers of CIFAR10-DVS and sample ant/image has none"):
        make_split("tebn", ["ant/image"], 0)


@pytest.mark.parametrize("rule", ["random_seed3404", "first90", "tebn"])
def test_the_files_that_ship_hold_the_rule_s_samples(rule):
    made = make_split(rule.partition("_")[0], CIFAR, DATA_SETS["cifar10dvs"].split_seed)
    path = ROOT / f"splits/cifar10dvs_{rule}.txt"
    read = read_split(path, CIFAR)
    assert (read.train, read.test) == (made.train, made.test) and made.name == rule
    assert f"fingerprint {made.fingerprint}: 9000 training and 1000 test\n" in path.read_text()
    assert path.stat().st_size < 40_000


def test_the_fingerprint_is_that_of_earlier_runs():
    assert make_split("random", CIFAR, 3404).fingerprint == "5c19e8b8"


def test_a_written_split_is_read_again(tmp_path):
    names = [f"ant/image, {number}" for number in range(20)]  # a comma in a name
    split = make_split("random", names, 1)
    path = tmp_path / "split.txt"
    path.write_text(split.manifest("N-Caltech101", {name: f"{number:016x}" for number, name in enumerate(names)}))
    read = read_split(path, names)
    assert (read.train, read.test, read.fingerprint) == (split.train, split.test, split.fingerprint)
    assert read.checksums["ant/image, 13"] == f"{13:016x}"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train,a/1\ntest,a/1\n", "line 2: 'test,a/1'"),
        ("train,a/1\n# fine\nvalid,a/2\n", "line 3: 'valid,a/2'"),
        ("train,*\ntest,*\n", "line 2"),
        ("train,a/1,abc\ntest,a/9,abc\n", "line 2: 'test,a/9,abc'"),
        ("\x00\x01", "line 1"),
    ],
)
def test_a_line_that_is_wrong_is_named(text, line, tmp_path):
    path = tmp_path / "split.txt"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_split(path, ["a/1", "a/2"])
    assert line in str(caught.value) and str(path) in str(caught.value)


def test_what_is_no_text_is_an_error(tmp_path):
    (tmp_path / "s").write_bytes(b"\xff\xfe\xff")
    for path in (tmp_path / "s", tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError, match="neither one of random, first90, tebn nor a readable file"):
            read_split(path, ["a/1"])

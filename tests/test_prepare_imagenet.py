"""tools/prepare_imagenet.py as a user runs it: real processes on small archives of the official form."""

import ctypes
import hashlib
import io
import os
import pty
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import termios
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from tests.conftest import ROOT

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
IN_DEVKIT = "ILSVRC2012_devkit_t12/data/"
# By ILSVRC2012_ID, which is not the order of the names.
WNIDS = ["n01484850", "n01440764", "n01443537"]
TRUTH = [2, 3, 1, 1, 2, 3, 3, 2, 1, 2, 1, 3]
TOOL = ROOT / "tools" / "prepare_imagenet.py"


def content(name, size):
    """Random bytes, the same for the same name."""
    return np.random.default_rng(list(name.encode())).bytes(size)


def tar_of(members, mode="w"):
    """A tar of ``{name: bytes}``, or of TarInfo objects without data."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=tarfile.GNU_FORMAT) as tar:
        for member, data in members.items() if isinstance(members, dict) else members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def special(name, kind, target=""):
    """A member that is no plain file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def val_name(number):
    return f"ILSVRC2012_val_{number:08}.JPEG"


def meta_mat(wnids=WNIDS):
    """The synsets as the devkit has them: a struct array, leaves and one inner node."""
    fields = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children")]
    rows = [(float(i), wnid, "fish, a fish", "it swims", 0.0, np.zeros(0)) for i, wnid in enumerate(wnids, start=1)]
    rows.append((1001.0, "n00001740", "entity", "all", 3.0, np.arange(1.0, 4)))
    out = io.BytesIO()
    savemat(out, {"synsets": np.array(rows, dtype=fields).reshape(-1, 1)})
    return out.getvalue()


def devkit(files=None, truth=TRUTH):
    files = {"meta.mat": meta_mat()} if files is None else files
    truth_file = {"ILSVRC2012_validation_ground_truth.txt": "".join(f"{i}\n" for i in truth).encode()}
    return tar_of({IN_DEVKIT + name: data for name, data in (truth_file | files).items()}, "w:gz")


def train_images(wnids=WNIDS, count=4, size=700):
    """Sizes around the block of a tar, and one image beyond the buffer of the tool."""
    sizes = [size, 512, 1, (1 << 20) + 3] if count == 4 else [size] * count
    names = {wnid: [f"{wnid}_{7 * i + 1}.JPEG" for i in range(count)] for wnid in wnids}
    return {wnid: {n: content(n, s) for n, s in zip(names[wnid], sizes, strict=True)} for wnid in wnids}


def val_images(count=12):
    return {val_name(i): content(val_name(i), 600 + i) for i in range(1, count + 1)}


def train_tar(images):
    return tar_of({f"{wnid}.tar": tar_of(files) for wnid, files in images.items()})


def labelled(truth=TRUTH):
    return {val_name(i): WNIDS[number - 1] for i, number in enumerate(truth, start=1)}


@pytest.fixture
def data(tmp_path):
    """A folder for the archives and the images, inside one that shows what is written elsewhere."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def put_all(folder):
    """All three archives; gives what must come out of them."""
    folder.mkdir(exist_ok=True)
    (folder / TRAIN).write_bytes(train_tar(train_images()))
    (folder / VAL).write_bytes(tar_of(val_images()))
    (folder / DEVKIT).write_bytes(devkit())
    train = {f"train/{wnid}/{name}": data for wnid, files in train_images().items() for name, data in files.items()}
    return train | {f"val/{wnid}/{name}": val_images()[name] for name, wnid in labelled().items()}


def start(data, *flags, any_count=True, **keywords):
    command = [sys.executable, TOOL, "--data-dir", data, *flags, *(["--any-count"] if any_count else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | keywords.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | keywords
    return subprocess.Popen([*map(str, command)], env=environment, text=True, **pipes)


def run(data, *flags, **keywords):
    """The finished process: exit code, stdout, stderr."""
    process = start(data, *flags, **keywords)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def succeed(data, *flags, **keywords):
    code, out, err = run(data, *flags, **keywords)
    assert (code, err) == (0, "")
    return out


def refused(data, *flags, **keywords):
    """The sentence of a process that must stop with one."""
    code, _, err = run(data, *flags, **keywords)
    assert code == 2 and err.startswith("prepare_imagenet.py: error: ") and err.count("\n") == 1, err
    assert not list(data.rglob("*.partial"))
    return err


def tree(data):
    """Every image, also in hidden folders."""
    return {str(path.relative_to(data)): path.read_bytes() for path in data.rglob("*.JPEG")}


def times(data):
    return {
        str(path.relative_to(data)): path.stat().st_mtime_ns
        for part in ("train", "val")
        if (data / part).exists()
        for path in [data / part, *(data / part).rglob("*")]
    }


def table(out):
    """The rows of the table: part -> classes, images, bytes written."""
    rows = [line.split() for line in out.splitlines()]
    return {row[0]: tuple(map(int, row[1:4])) for row in rows if row[0] in ("train", "val") and row[-1][-1:].isdigit()}


@pytest.mark.parametrize("place", ["", "download"])
def test_every_file_comes_out_in_its_class_and_a_second_run_touches_nothing(data, place):
    expected = put_all(data / place)
    archives = {path.name: path.read_bytes() for path in (data / place).iterdir() if path.is_file()}
    out = succeed(data)
    assert tree(data) == expected
    sizes = {part: sum(len(d) for name, d in expected.items() if name.startswith(part)) for part in ("train", "val")}
    assert table(out) == {"train": (3, 12, sizes["train"]), "val": (3, 12, sizes["val"])}
    assert {path.name: path.read_bytes() for path in (data / place).glob("*.tar*")} == archives

    before = times(data)
    # Zeros over the first class, not over its header: a run that reads it would stop.
    with (data / place / TRAIN).open("r+b") as file:
        file.seek(512)
        file.write(bytes(5000))
    assert table(succeed(data)) == {"train": (3, 12, 0), "val": (3, 12, 0)}
    assert times(data) == before


def test_archives_elsewhere_and_a_new_data_folder(tmp_path):
    expected = put_all(tmp_path / "far")
    far = [tmp_path / "far" / name for name in (TRAIN, VAL, DEVKIT)]
    for path in far:
        path.rename(path.with_suffix(".x"))
    train, val, kit = (path.with_suffix(".x") for path in far)
    succeed(tmp_path / "a" / "b", "--train-tar", train, "--val-tar", val, "--devkit", kit)
    assert tree(tmp_path / "a" / "b") == expected


@pytest.mark.parametrize("part", ["train", "val"])
def test_one_part_alone_is_done_and_the_other_named(data, part):
    expected = put_all(data)
    (data / {"train": VAL, "val": TRAIN}[part]).unlink()
    out = succeed(data)
    assert tree(data) == {name: content for name, content in expected.items() if name.startswith(part)}
    assert f"put {({'train': VAL, 'val': TRAIN})[part]} into" in out


def test_validation_images_without_labels_wait_for_them(data):
    expected = put_all(data)
    (data / DEVKIT).unlink()
    out = succeed(data)
    assert not (data / "val").exists() and f"val is not there: put {DEVKIT} (or --val-labels)" in out
    (data / DEVKIT).write_bytes(devkit())
    succeed(data)
    assert tree(data) == expected


FORMS = {
    "space": lambda image, wnid: f"{image} {wnid}",
    "tab, no suffix": lambda image, wnid: f"{image.removesuffix('.JPEG')}\t{wnid}",
    "comma, more columns": lambda image, wnid: f"{image},{wnid},tench,0",
    "kaggle": lambda image, wnid: f"{image.removesuffix('.JPEG')},{wnid} 85 1 499 272 {wnid} 1 2 3 4",
    "one a line": lambda image, wnid: wnid,
}


HEADER = "\ufeffImageId,PredictionString\r\n"


@pytest.mark.parametrize(
    ("form", "header"), [*((form, "") for form in FORMS), ("kaggle", HEADER), ("one a line", HEADER)]
)
def test_every_form_of_labels_gives_the_same_folders(data, tmp_path, form, header):
    (data / VAL).write_bytes(tar_of(val_images()))
    lines = [FORMS[form](image, wnid) for image, wnid in labelled().items()]
    if form != "one a line":
        lines = lines[::-1]
    (tmp_path / "labels").write_text(header + "\r\n".join(lines) + "\n\n", encoding="utf-8")
    succeed(data, "--val-labels", tmp_path / "labels")
    assert tree(data) == {f"val/{wnid}/{name}": val_images()[name] for name, wnid in labelled().items()}


MANY = [f"n{10_000_000 + i}" for i in range(12)]


@pytest.fixture
def large(data):
    """Twelve classes of 150 images: long enough to meet a process at work."""
    train = train_images(MANY, 150, 3000)
    val = val_images(600)
    wnids = dict(zip(val, MANY * 50, strict=True))
    (data / TRAIN).write_bytes(train_tar(train))
    (data / VAL).write_bytes(tar_of(val))
    (data / "labels").write_text("".join(f"{image} {wnid}\n" for image, wnid in wnids.items()))
    expected = {f"train/{wnid}/{name}": image for wnid, files in train.items() for name, image in files.items()}
    return expected | {f"val/{wnids[name]}/{name}": image for name, image in val.items()}


def classes_there(data):
    return sorted(path.name for path in (data / "train").glob("n*"))


def test_killed_at_any_moment_it_leaves_whole_classes_and_goes_on(data, large):
    moments = [
        lambda: (data / ".val.partial").exists(),
        lambda: (data / "val").exists(),
        *(lambda n=n: len(classes_there(data)) > n for n in (0, 3, 6)),
    ]
    rng, killed, first = random.Random(5), 0, {}
    for moment in moments:
        process = start(data, "--val-labels", data / "labels", stdout=subprocess.DEVNULL)
        while process.poll() is None and not moment():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        there = {name: image for name, image in tree(data).items() if "/." not in f"/{name}"}
        whole = tuple(f"train/{wnid}/" for wnid in classes_there(data)) + ("val/",) * (data / "val").exists()
        assert there == {name: image for name, image in large.items() if name.startswith(whole)}
        first = {name: (data / name).stat().st_ino for name in there} | first
    assert killed >= 3  # on a busy machine a process may end before its signal
    succeed(data, "--val-labels", data / "labels")
    assert tree(data) == large and not list(data.rglob("*.partial"))
    assert {name: (data / name).stat().st_ino for name in first} == first  # nothing whole was written twice


def test_two_processes_at_once_share_the_work(data, large):
    processes = [start(data, "--val-labels", data / "labels") for _ in range(2)]
    results = [process.communicate(timeout=60) for process in processes]
    assert [(p.returncode, err) for p, (_, err) in zip(processes, results, strict=True)] == [(0, "")] * 2
    assert tree(data) == large
    written = [sum(row[2] for row in table(out).values()) for out, _ in results]
    assert sorted(written) == [0, sum(map(len, large.values()))]


def test_images_unpacked_by_something_else_are_compared_and_left(data):
    expected = put_all(data)
    for name, image in expected.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(image)
    before = times(data)
    assert table(succeed(data)) == {"train": (3, 12, 0), "val": (3, 12, 0)}
    assert times(data) == before
    (data / "train" / WNIDS[0] / f"{WNIDS[0]}_1.JPEG").unlink()  # also where the tool knows the class
    sentence = refused(data)
    assert (
        f"{data / 'train' / WNIDS[0]} was there before and holds 3 images" in sentence and f"{WNIDS[0]}_1" in sentence
    )
    assert len(tree(data)) == 23


@pytest.mark.parametrize("what", ["cut image", "wrong class", "loose files"])
def test_a_folder_that_differs_is_named_and_left(data, what):
    put_all(data)
    image = val_name(1)
    right, wrong = data / "val" / labelled()[image], data / "val" / WNIDS[0]
    if what == "cut image":
        folder = data / "train" / WNIDS[1]
        folder.mkdir(parents=True)
        for name, content in train_images()[WNIDS[1]].items():
            (folder / name).write_bytes(content[:-1])
    elif what == "wrong class":
        succeed(data)
        (right / image).rename(wrong / image)
        folder = data / "val"
    else:
        folder = data / "val"
        folder.mkdir()
        (folder / image).write_bytes(b"image")
    before = {name: image for name, image in tree(data).items() if (data / name).is_relative_to(folder)}
    assert f"{folder} was there before and holds" in refused(data)
    assert {name: image for name, image in tree(data).items() if (data / name).is_relative_to(folder)} == before


def test_an_empty_folder_is_filled(data):
    expected = put_all(data)
    (data / "val").mkdir()
    (data / "train" / WNIDS[0]).mkdir(parents=True)
    succeed(data)
    assert tree(data) == expected


def test_official_numbers_are_demanded_and_keep_the_archives(data):
    put_all(data)
    assert "has 12 labels and 50000 are needed" in refused(data, "--delete-archives", any_count=False)
    (data / VAL).unlink()
    sentence = refused(data, "--delete-archives", any_count=False)
    assert "3 classes (-997) and 12 images (-1281155), and ImageNet-1K has 1000 and 1281167" in sentence
    assert (data / TRAIN).exists() and (data / DEVKIT).exists() and len(tree(data)) == 12


def test_the_official_validation_numbers_pass_and_uneven_classes_do_not(data):
    (data / "image").write_bytes(b"x")
    for i in range(1000):
        folder = data / "val" / f"n{10_000_000 + i}"
        folder.mkdir(parents=True)
        for number in range(50 * i + 1, 50 * i + 51):
            os.link(data / "image", folder / val_name(number))
    assert table(succeed(data, any_count=False)) == {"val": (1000, 50_000, 0)}
    (data / "val/n10000000" / val_name(1)).rename(data / "val/n10000001" / val_name(1))
    assert "n10000000 holds 49 images and each" in refused(data, any_count=False)
    (data / "val/n10000001" / val_name(1)).unlink()
    assert "1000 classes (+0) and 49999 images (-1)" in refused(data, any_count=False)


def test_archives_go_only_when_asked_and_only_when_all_is_right(data):
    expected = put_all(data)
    (data / "train" / "n09999999").mkdir(parents=True)
    (data / "train" / "n09999999" / "other.JPEG").write_bytes(b"x")
    sentence = refused(data, "--delete-archives")
    assert "1 only in train (n09999999), 0 only in val ()" in sentence
    assert {path.name for path in data.glob("*.tar*")} == {TRAIN, VAL, DEVKIT}
    shutil.rmtree(data / "train" / "n09999999")
    succeed(data, "--delete-archives")
    assert not list(data.glob("*.tar*")) and tree(data) == expected
    assert table(succeed(data)) == {"train": (3, 12, 0), "val": (3, 12, 0)}  # the images are enough


def test_md5_is_compared_with_the_published_one(data, tmp_path):
    put_all(data)
    package = tmp_path / "fake" / "torchvision" / "datasets"  # the import of the true one takes seconds
    package.mkdir(parents=True)
    for path in (package / "__init__.py", package.parent / "__init__.py"):
        path.touch()
    true = Path(find_spec("torchvision").origin).parent / "datasets" / "imagenet.py"
    start, _, _ = true.read_text().partition("}")
    (package / "imagenet.py").write_text(start[start.index("ARCHIVE_META = {") :] + "}")
    sentence = refused(data, "--md5", env={"PYTHONPATH": str(tmp_path / "fake")})
    assert f"{data / TRAIN} has the MD5 {hashlib.md5((data / TRAIN).read_bytes()).hexdigest()}" in sentence
    assert "1d675b47d978889d74fa0da5fadfb00e is published" in sentence and tree(data) == {}
    sums = {name: (name, hashlib.md5((data / name).read_bytes()).hexdigest()) for name in (TRAIN, VAL, DEVKIT)}
    (package / "imagenet.py").write_text(f"ARCHIVE_META = {sums!r}")
    succeed(data, "--md5", env={"PYTHONPATH": str(tmp_path / "fake")})
    assert len(tree(data)) == 24


def test_a_terminal_sees_rate_and_time_left(data):
    put_all(data)
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (24, 100))
    process = start(data, stderr=there)
    process.communicate(timeout=60)
    os.close(there)
    shown = os.read(here, 100_000).decode()
    os.close(here)
    assert process.returncode == 0 and "val: 100%" in shown and "train: 100%" in shown and "B/s]" in shown


WNID = WNIDS[1]
IMAGE = f"{WNID}_1.JPEG"
INNER = train_tar({WNID: {IMAGE: content("a", 3000), f"{WNID}_2.JPEG": content("b", 3000)}})


def bad_header(archive, at):
    """The archive with a damaged header at byte ``at``."""
    return archive[:at] + b"n0000000" + archive[at + 8 :]


BAD_TRAIN = {
    "no member of that form": (tar_of({f"../{WNID}.tar": b""}), f"has the member '../{WNID}.tar'"),
    "absolute": (tar_of({f"/{WNID}.tar": b""}), f"has the member '/{WNID}.tar'"),
    "a line break": (tar_of({f"{WNID}.tar\n": b""}), f"has the member '{WNID}.tar\\n'"),
    "folder": (tar_of([(special(f"{WNID}.tar", tarfile.DIRTYPE), b"")]), f"has the member '{WNID}.tar'"),
    "way out": (train_tar({WNID: {f"../../../{IMAGE}": b"x"}}), f"has the member '../../../{IMAGE}'"),
    "other class": (train_tar({WNID: {f"{WNIDS[0]}_1.JPEG": b"x"}}), f"has the member '{WNIDS[0]}_1.JPEG'"),
    "twice": (tar_of({f"{WNID}.tar": tar_of([(IMAGE, b"x"), (IMAGE, b"y")])}), f"has the member '{IMAGE}'"),
    **{
        kind: (tar_of({f"{WNID}.tar": tar_of([(special(IMAGE, number, "/etc/passwd"), b"")])}), f"member '{IMAGE}'")
        for kind, number in (
            ("symlink", tarfile.SYMTYPE), ("hard link", tarfile.LNKTYPE), ("device", tarfile.CHRTYPE),
            ("fifo", tarfile.FIFOTYPE),
        )
    },
    "empty file": (b"", "is damaged or cut off (empty file)"),
    "no members": (tar_of({}), "is damaged or cut off (it ends after 0 members"),
    "empty class": (tar_of({f"{WNID}.tar": b""}), f"{WNID}.tar in --train-tar"),
    "page": (b"\n <!DOCTYPE html><html>log in</html>", "is an HTML page and no archive"),
    "noise": (content("noise", 9000), "is damaged or cut off"),
    "cut in an image": (INNER[:3000], f"{WNID}.tar in --train-tar"),
    "cut in a header": (INNER[: 512 + 100], "is damaged or cut off"),
    "cut behind an image": (INNER[: 512 + 512 + 3072], f"{WNID}.tar in --train-tar"),
    "bad first header": (bad_header(INNER, 512), f"{WNID}.tar in --train-tar"),
    "bad second header": (bad_header(INNER, 512 + 512 + 3072), "(it ends after 1 members"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TRAIN)
def test_a_bad_training_archive_is_one_sentence_and_no_class(data, tmp_path, case):
    archive, fragment = BAD_TRAIN[case]
    (data / TRAIN).write_bytes(archive)
    sentence = refused(data)
    assert fragment in sentence and str(data / TRAIN) in sentence
    assert tree(tmp_path) == {} and classes_there(data) == []


@pytest.mark.parametrize("cut", ["in a class", "between classes"])
def test_classes_before_the_damage_stay_and_a_whole_archive_goes_on(data, cut):
    images = train_images()
    two = train_tar({wnid: images[wnid] for wnid in WNIDS[:2]})
    with tarfile.open(fileobj=io.BytesIO(two)) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + last.size
    (data / TRAIN).write_bytes(train_tar(images)[: end + (100_000 if cut == "in a class" else 0)])
    assert f"--train-tar {data / TRAIN} is damaged or cut off" in refused(data)
    assert classes_there(data) == sorted(WNIDS[:2])
    kept = times(data)
    (data / TRAIN).write_bytes(train_tar(images))
    succeed(data)
    assert classes_there(data) == sorted(WNIDS) and len(tree(data)) == 12
    assert {name: time for name, time in times(data).items() if name in kept and name != "train"} == {
        name: time for name, time in kept.items() if name != "train"
    }


GOOD_VAL = tar_of(val_images())
BAD_VAL = {
    "name": (tar_of({"val/" + val_name(1): b"x"}), devkit(), f"has the member 'val/{val_name(1)}'"),
    "link": (tar_of([(special(val_name(1), tarfile.SYMTYPE, "/etc/passwd"), b"")]), devkit(), "has the member"),
    "cut": (GOOD_VAL[:5000], devkit(), f"{VAL} is damaged or cut off"),
    "page": (b"<html>", devkit(), f"{VAL} is an HTML page"),
    "kit page": (GOOD_VAL, b"<html>", f"{DEVKIT} is an HTML page"),
    "kit empty": (GOOD_VAL, b"", f"{DEVKIT} is damaged or cut off"),
    "kit cut": (GOOD_VAL, devkit()[:-60], f"{DEVKIT} is damaged or cut off"),
    "kit without meta": (GOOD_VAL, devkit({}), "data/meta.mat' not found"),
    "kit of noise": (GOOD_VAL, devkit({"meta.mat": content("noise", 500)}), "has no proper meta.mat"),
    "kit with a path": (GOOD_VAL, devkit({"meta.mat": meta_mat(["../../up", "a", "b"])}), "not n and 8 digits"),
    "inner node": (GOOD_VAL, devkit(truth=[1001] * 12), "has no proper meta.mat and ground truth (KeyError: 1001)"),
    "few labels": (GOOD_VAL, devkit(truth=TRUTH[:-1]), f"has no label for {val_name(12)}"),
}


@pytest.mark.parametrize("case", BAD_VAL)
def test_a_bad_validation_archive_or_devkit_is_one_sentence_and_no_folder(data, tmp_path, case):
    archive, kit, fragment = BAD_VAL[case]
    (data / VAL).write_bytes(archive)
    (data / DEVKIT).write_bytes(kit)
    assert fragment in refused(data)
    assert tree(tmp_path) == {} and not (data / "val").exists()


BAD_LABELS = {
    "class numbers": (b"ILSVRC2012_val_00000001.JPEG 65\n", "has 'ILSVRC2012_val_00000001.JPEG 65' as line 1"),
    "second form inside": (b"n01440764\nILSVRC2012_val_00000002 n01440764\n", "as line 2"),
    "path": (b"ILSVRC2012_val_00000001 ../n01440764\n", "as line 1"),
    "gap": (b"n01440764\n\nn01440764\n", "has '' as line 2"),
    "two classes": (b"ILSVRC2012_val_00000001 n01440764\nILSVRC2012_val_00000001 n01443537\n", "and n01443537 for"),
    "no text": (b"\xff\xfe\x00\x81", "is no text file"),
    "empty": (b"", "has no label for ILSVRC2012_val_00000001.JPEG"),
    "too few": (b"n01440764\n" * 11, "has no label for ILSVRC2012_val_00000012.JPEG"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels_are_one_sentence_and_no_folder(data, tmp_path, case):
    labels, fragment = BAD_LABELS[case]
    (data / VAL).write_bytes(GOOD_VAL)
    (tmp_path / "labels").write_bytes(labels)
    sentence = refused(data, "--val-labels", tmp_path / "labels")
    assert fragment in sentence and str(tmp_path / "labels") in sentence
    assert not (data / "val").exists()


def test_nothing_to_work_on_names_files_and_places(data):
    sentence = refused(data)
    for name in (TRAIN, VAL, DEVKIT, str(data), str(data / "download")):
        assert name in sentence
    assert not refused(data / "absent").count("Traceback") and not (data / "absent").exists()
    assert f"--train-tar {data} is no file" in refused(data, "--train-tar", data)
    assert "not allowed with argument" in refused(data, "--devkit", "a", "--val-labels", "b")


def test_no_room_is_one_sentence_and_the_next_run_goes_on(data):
    expected = put_all(data)

    def small_files():  # the write fails as on a full disk, without one
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    sentence = refused(data, preexec_fn=small_files)
    assert f"--data-dir {data} cannot be prepared" in sentence and "has room" in sentence
    assert classes_there(data) == [] and len(list(data.glob("val/*/*"))) == 12
    succeed(data)
    assert tree(data) == expected


def test_archives_that_the_disk_has_no_room_for_are_refused_before_anything_is_unpacked(data):
    put_all(data)
    os.truncate(data / TRAIN, shutil.disk_usage(data).free + 10**10)  # a hole: it takes no room itself
    sentence = refused(data)
    assert f"--data-dir {data} has room for " in sentence and "make room" in sentence
    assert tree(data) == {}


@pytest.mark.parametrize("name", [".image_counts", "..image_counts.partial", ".lock", ".val.partial"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_of_its_own_leads_out_of_the_folder_or_hangs(data, tmp_path, name, kind):
    expected = put_all(data)
    (tmp_path / "victim").write_text("mine")
    (data / name).symlink_to(tmp_path / "victim") if kind == "link" else os.mkfifo(data / name)
    code, _, err = run(data)
    assert (tree(data) == expected) if code == 0 else (code == 2 and name in err and err.count("\n") == 1), err
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_one_sentence(data):
    put_all(data)

    def no_override():  # root writes everywhere until it gives up CAP_DAC_OVERRIDE
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)

    data.chmod(0o555)
    try:
        sentence = refused(data, preexec_fn=no_override)
    finally:
        data.chmod(0o755)
    assert f"--data-dir {data} cannot be prepared" in sentence and "Permission denied" in sentence
    assert tree(data) == {}

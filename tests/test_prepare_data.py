"""tools/prepare_data.py: from archives to packed frames, whatever happens on the way."""

import hashlib
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

from tests.test_recordings import aedat2, aedat3, events, five_bytes, packet
from tools import prepare_data
from utils.data.events import load_event_data
from utils.errors import UserError, exit_with_sentence
from utils.prepare.archives import archive_fault
from utils.prepare.lock import one_process_at_a_time

FORK = multiprocessing.get_context("fork")
CLASSES = ("ant", "bass", "crab")
SMALL = ["-T", "3", "--any-archive", "--sensor-size", "128x128"]


def make_zip(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)  # no date: the same bytes


def make_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def caltech(root, samples=10):
    members = {f"Caltech101/{name}/image_{number:04}.bin": five_bytes(events(300, 100 * label + number))
               for label, name in enumerate(CLASSES) for number in range(samples)}  # fmt: skip
    make_zip(
        root / "download/Caltech101.zip", {**members, "__MACOSX/Caltech101/._ant": b"x", "Caltech101/.DS_Store": b""}
    )
    return root


def cifar(root):
    names = [archive.removesuffix(".zip") for archive in prepare_data.DATA_SETS["cifar10dvs"].archives]
    for label, name in enumerate(names):
        recordings = {number: aedat2(events(200, 50 * label + number)) for number in range(10)}
        make_zip(root / f"{name}.zip", {f"{name}/cifar10_{name}_{n}.aedat": data for n, data in recordings.items()})
    return root


def gesture(root, labels=range(1, 12), train="user01_led"):
    members = {}
    for part, name in (("train", train), ("test", "user24_led")):
        recording = events(2000, len(part))
        spans = [(label, 300_000 * label, 300_000 * label + 290_000) for label in labels]
        members[f"DvsGesture/trials_to_{part}.txt"] = f"{name}.aedat\n".encode()
        members[f"DvsGesture/{name}.aedat"] = aedat3(packet(recording))
        lines = ["class,startTime_usec,endTime_usec", *(",".join(map(str, span)) for span in spans)]
        members[f"DvsGesture/{name}_labels.csv"] = "\n".join(lines).encode()
    make_tar(root / "data/DvsGesture.tar.gz", members)  # beside the folder of the data set
    (root / "data/dvs128").mkdir()
    return root / "data/dvs128"


def content(root):
    """Digest of every file that is kept, by path: no locks, no records of what was checked when."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.startswith((".lock", ".checked_"))
    }


def prepare_in(root, *arguments, data_set="ncaltech101"):
    """Run the tool as the command line does, without leaving this process."""
    argv, sys.argv = sys.argv, ["prepare_data.py"]
    term = signal.getsignal(signal.SIGTERM)
    try:
        exit_with_sentence(lambda: prepare_data.main([data_set, "--data-dir", str(root), *arguments]))
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, term)


@pytest.fixture
def prepare(capsys):
    def run(data_set, *arguments):
        argv, sys.argv = sys.argv, ["prepare_data.py"]
        term = signal.getsignal(signal.SIGTERM)
        try:
            exit_with_sentence(lambda: prepare_data.main([data_set, *map(str, arguments)]))
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.argv = argv
            signal.signal(signal.SIGTERM, term)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def error_of(result):
    """The sentence of a run that ended as it should for a user's mistake."""
    code, _, err = result
    assert code == 2 and err.startswith("prepare_data.py: error: ") and "Traceback" not in err, result
    return err


@pytest.mark.parametrize(("make", "data_set", "train", "test", "classes"), [
    (gesture, "dvs128", 11, 11, 11), (cifar, "cifar10dvs", 90, 10, 10), (caltech, "ncaltech101", 27, 3, 3),
])  # fmt: skip
def test_archives_become_packed_frames_once(make, data_set, train, test, classes, prepare, tmp_path):
    root = make(tmp_path)
    code, out, err = prepare(data_set, "--data-dir", root, *SMALL)
    assert code == 0, err
    table = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(("train ", "test "))}
    assert table["train"][:2] == [str(classes), str(train)] and table["test"][:2] == [str(classes), str(test)]
    packed = {path.stem.rpartition("_")[2]: path.stat().st_size for path in root.glob("packed_T3_*/*.b2nd")}
    assert [table[part][3] for part in ("train", "test")] == [str(packed[part]) for part in ("train", "test")]
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == sorted(
        {"events_np", "extract", "frames_number_3_split_by_number", "splits", next(root.glob("packed_*")).name}
        | ({"download"} if make is caltech else set())
    )
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.name != ".lock"}
    code, out, err = prepare(data_set, "--data-dir", root, *SMALL)
    assert code == 0 and "making" not in out and "packing" not in out, err
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.name != ".lock"} == before
    code, out, err = prepare(data_set, "--data-dir", root, *SMALL, "--check")
    assert code == 0 and f"{train + test} event files, {train + test} files of 3 frames, 2 packed stores" in out, err


def test_train_and_test_are_disjoint_by_content_and_their_file_tells_it(prepare, tmp_path):
    assert prepare("ncaltech101", "--data-dir", caltech(tmp_path), *SMALL)[0] == 0
    (path,) = (tmp_path / "splits").iterdir()
    lines = [line.split(",") for line in path.read_text().splitlines() if not line.startswith("#")]
    found = {part: {checksum for of, _, checksum in lines if of == part} for part in ("train", "test")}
    assert (len(found["train"]), len(found["test"])) == (27, 3) and found["train"].isdisjoint(found["test"])
    # The checksum is of the events: another T has the same, a copy of a test sample in training is refused.
    assert prepare("ncaltech101", "--data-dir", tmp_path, *SMALL, "-T", 4)[0] == 0
    assert list((tmp_path / "splits").iterdir()) == [path]
    test = next(name for part, name, _ in lines if part == "test")
    (tmp_path / "events_np/crab/copy.npz").write_bytes((tmp_path / f"events_np/{test}.npz").read_bytes())
    (tmp_path / "split.txt").write_text(f"test,{test}\ntrain,*\n")
    arguments = ["--data-dir", tmp_path, *SMALL, "-T", 4, "--split", tmp_path / "split.txt"]
    error = error_of(prepare("ncaltech101", *arguments))
    assert "1 bad files" in error and f"crab/copy.npz: has the same events as the test sample {test}" in error
    code, out, _ = prepare("ncaltech101", *arguments, "--on-bad-sample", "skip")
    assert code == 0 and "left out: 1 bad files" in out
    (tmp_path / "split.txt").write_text(f"test,{test},0123456789abcdef\ntrain,*\n")
    assert "and 0123456789abcdef is in the split file" in error_of(prepare("ncaltech101", *arguments))


def in_child(root, seconds=None, limit=None, data_set="ncaltech101"):
    """Prepare in a process of its own; kill it after some seconds. Gives its exit code and how long it took."""

    def work():
        os.setsid()
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        tqdm.set_lock(threading.RLock())  # forked processes share the usual one, and a killed one may hold it
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        prepare_in(root, *SMALL, data_set=data_set)

    began = time.monotonic()
    child = FORK.Process(target=work)
    child.start()
    child.join(120 if seconds is None else seconds)
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    return child.exitcode, time.monotonic() - began


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What there is at the end."""
    root = caltech(tmp_path_factory.mktemp("undisturbed"))
    assert in_child(root)[0] == 0
    return content(root)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "data_set"), [(caltech, "ncaltech101"), (gesture, "dvs128")])
def test_killed_at_twenty_moments_it_ends_with_the_same_bytes(make, data_set, tmp_path):
    root = make(tmp_path / "undisturbed")
    code, took = in_child(root, data_set=data_set)
    assert code == 0
    expected = content(root)
    rng, killed, rounds = random.Random(0), 0, 0
    while killed < 20:
        root, rounds = make(tmp_path / str(rounds)), rounds + 1
        for _ in range(4):
            killed += in_child(root, rng.uniform(0, took / 2), data_set=data_set)[0] == -signal.SIGKILL
        assert in_child(root, data_set=data_set)[0] == 0
        assert content(root) == expected


def test_a_full_disk_is_one_sentence_and_the_next_run_ends_with_the_same_bytes(undisturbed, tmp_path):
    root = caltech(tmp_path)
    for limit in (300, 1400, 6000, 9000):  # bytes of a file: in a recording, events, frames, the packed frames
        assert in_child(root, limit=limit)[0] == 2
    assert not list(root.glob("packed_*/*.b2nd"))
    assert in_child(root)[0] == 0
    assert content(root) == undisturbed


@pytest.mark.parametrize("there", ["empty", "empty class folder", "link", "link to nothing"])
def test_a_disk_that_is_full_halfway_leaves_nothing_in_a_folder_that_was_there(there, tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere/recordings"
    members = {
        f"Caltech101/{n}/{i}.bin": five_bytes(events(20, 50 * k + i)) for k, n in enumerate("ab") for i in range(9)
    }
    make_zip(root / "Caltech101.zip", {**members, "Caltech101/b/9.bin": five_bytes(events(300))})  # the largest is last
    elsewhere.parent.mkdir()
    if there.startswith("link"):
        (root / "extract").symlink_to(elsewhere)
    if there != "link to nothing":
        (root / "extract").resolve().mkdir()
    if there == "empty class folder":
        (root / "extract/Caltech101/a").mkdir(parents=True)
    assert in_child(root, limit=1400)[0] == 2
    assert not list((root / "extract").rglob("*.bin"))
    assert in_child(root)[0] == 0
    assert len(list((root / "extract").rglob("*.bin"))) == len(list((root / "events_np").rglob("*.npz"))) == 19
    assert (root / "extract").is_symlink() == there.startswith("link") == elsewhere.is_dir()
    assert not list(tmp_path.rglob(".building*"))


def test_a_folder_with_something_else_is_not_unpacked_into(prepare, tmp_path):
    root = caltech(tmp_path)
    (root / "extract").mkdir()
    (root / "extract/notes.txt").write_text("mine")
    error = error_of(prepare("ncaltech101", "--data-dir", root, *SMALL))
    assert f"folder {root / 'extract'} has files and no .bin files in Caltech101; move it away" in error
    assert [path.name for path in (root / "extract").iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_used_is_one_sentence(prepare, tmp_path):
    root = caltech(tmp_path)
    (root / ".building-extract").write_text("in the way")
    error = error_of(prepare("ncaltech101", "--data-dir", root, *SMALL))
    assert f"frames cannot be made in --data-dir {root}" in error and "File exists" in error and error.count("\n") == 1


def prepared_counts(root, results):
    torch.set_num_threads(1)  # the threads of the parent are not there after a fork
    data = load_event_data("ncaltech101", root, 3, any_archive=True, sensor_size=(128, 128))
    results.put((len(data.train), len(data.test), float(data.train[26][0].sum() + data.test[2][0].sum())))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_start_at_once_on_archives_all_see_every_sample(count, tmp_path):
    root, results = caltech(tmp_path), FORK.Queue()
    workers = [FORK.Process(target=prepared_counts, args=(root, results)) for _ in range(count)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [(27, 3, 600.0)] * count
    for worker in workers:
        worker.join()


def test_a_lock_that_another_process_holds_is_waited_for_by_every_user(tmp_path):
    entered = threading.Event()

    def wait():
        with one_process_at_a_time(tmp_path):
            entered.set()

    with one_process_at_a_time(tmp_path):
        assert (tmp_path / ".lock").stat().st_mode & 0o666 == 0o666
        waiting = FORK.Process(target=lambda: prepare_in(caltech(tmp_path), *SMALL))
        waiting.start()
        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.3) and not (tmp_path / "extract").exists()
    assert entered.wait(10)
    thread.join()
    waiting.join(60)
    assert waiting.exitcode == 0 and (tmp_path / "extract").exists()


@pytest.mark.parametrize("kind", ["link", "pipe", "someone's file", "folder"])
def test_what_is_in_the_place_of_the_lock_is_refused_and_not_touched(kind, prepare, tmp_path):
    root, victim, lock = caltech(tmp_path / "root"), tmp_path / "victim", tmp_path / "root/.lock"
    victim.write_text("mine")
    if kind == "link":
        lock.symlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        victim.rename(lock)
        victim = lock
    error = error_of(prepare("ncaltech101", "--data-dir", root, *SMALL))
    assert f"{lock} is not the lock of this program (an empty file); move it away" in error
    assert victim.read_text() == "mine" and not (root / "extract").exists()


OWN_FILES = [
    *(".unpacking", "..unpacking.partial", ".building-extract/Caltech101/ant/.image_0000.bin.partial"),
    *(".building-events_np/ant/.image_0000.npz.partial", ".checked_T3_128x128", "..checked_T3_128x128.partial"),
    *(".building-frames_number_3_split_by_number/ant/.image_0000.npz.partial", ".building-events_np"),
]


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("name", OWN_FILES)
def test_no_file_of_its_own_leads_out_of_the_folder_or_hangs(name, kind, prepare, tmp_path):
    """It ends with all data, or with a sentence that names what is in the way."""
    root, victim, path = caltech(tmp_path / "root"), tmp_path / "victim", tmp_path / "root" / name
    if "." in path.suffix:
        victim.write_text("mine")
    else:
        victim.mkdir()
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".building-extract" in name:  # of a killed run, so that it is not removed first
        path = root / ".building-extract/.unpacking.partial"
    path.symlink_to(victim) if kind == "link" else os.mkfifo(path)
    code, _, err = prepare("ncaltech101", "--data-dir", root, *SMALL)
    assert code == 0 or ("Traceback" not in err and str(path.name) in err), err
    assert (victim.is_dir() and not list(victim.iterdir())) or victim.read_text() == "mine"


def test_a_folder_without_a_lock_that_could_be_opened_is_used_as_it_is(tmp_path):
    with one_process_at_a_time(tmp_path / "nothing"):
        pass


def test_archives_beside_a_folder_that_is_not_there_are_found(prepare, tmp_path):
    caltech(tmp_path)
    (tmp_path / "download/Caltech101.zip").rename(tmp_path / "Caltech101.zip")
    root = tmp_path / "ncaltech101"
    code, out, err = prepare("ncaltech101", "--data-dir", root, *SMALL, "--check")
    assert code == 0 and "all whole: 1 archives" in out and not root.exists(), err
    code, out, err = prepare("ncaltech101", "--data-dir", root, *SMALL)
    assert code == 0 and "30 samples in 3 classes" in out, err
    assert "--demo" in error_of(prepare("ncaltech101", "--data-dir", root / "deeper/still", *SMALL))
    assert not (root / "deeper").exists()


# Archives that must not be trusted -----------------------------------------------------------------------------------


def link_in_zip(path):
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as file:
        member = zipfile.ZipInfo("Caltech101/ant/a.bin")
        member.external_attr = 0o120777 << 16
        file.writestr(member, "/etc/passwd")


def cut_off(path):
    caltech(path.parents[1])
    path.write_bytes(path.read_bytes()[:-200])


def damaged(path, compression=zipfile.ZIP_DEFLATED, at=90):  # inside the first member
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("Caltech101/ant/a.bin", five_bytes(events(300)))
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (
            lambda p: make_zip(p, {"Caltech101/ant/a.bin": b"12345", "../../evil": b"x"}),
            "'../../evil', which leads out",
        ),
        (lambda p: make_zip(p, {"/tmp/evil": b"x"}), "'/tmp/evil', which leads out"),
        (lambda p: make_zip(p, {"Caltech101\\..\\evil": b"x"}), "which leads out of its folder"),
        (link_in_zip, "which is a link or a device"),
        (cut_off, "is damaged or cut off"),
        (damaged, "is damaged or cut off"),
        (lambda p: damaged(p, zipfile.ZIP_LZMA), "is damaged or cut off"),
        (lambda p: damaged(p, zipfile.ZIP_BZIP2), "is damaged or cut off"),
        (lambda p: damaged(p, at=-6), "is damaged or cut off"),  # where the table of members begins
        (lambda p: make_zip(p, {"readme.txt": b"hello"}), "hold no .bin files in Caltech101"),
        (lambda p: make_zip(p, {"../html": b""}) or p.write_bytes(b"<!DOCTYPE html>"), "it is a web page"),
    ],
    ids=[
        "parent",
        "absolute",
        "backslash",
        "link",
        "cut off",
        "damaged",
        "lzma",
        "bzip2",
        "table",
        "other",
        "web page",
    ],
)
def test_an_archive_that_is_not_right_is_refused_and_nothing_is_half_there(make, what, prepare, undisturbed, tmp_path):
    root = tmp_path / "a/b"
    make(root / "download/Caltech101.zip")
    error = error_of(prepare("ncaltech101", "--data-dir", root, *SMALL))
    assert what in error and "Caltech101.zip" in error and error.count("\n") == 1
    assert not (root / "extract").exists() and not list(tmp_path.rglob("evil")) and (root / "download").exists()
    (root / "download/Caltech101.zip").unlink()
    assert prepare("ncaltech101", "--data-dir", caltech(root), *SMALL)[0] == 0
    assert content(root) == undisturbed


@pytest.mark.parametrize("kind", ["sym", "device", "parent"])
def test_a_tar_with_links_devices_or_ways_out_is_refused(kind, prepare, tmp_path):
    with tarfile.open(tmp_path / "DvsGesture.tar.gz", "w:gz") as file:
        member = tarfile.TarInfo("../evil" if kind == "parent" else "DvsGesture/evil")
        member.type = {"sym": tarfile.SYMTYPE, "device": tarfile.CHRTYPE, "parent": tarfile.REGTYPE}[kind]
        member.linkname = "/etc"
        file.addfile(member)
    error = error_of(prepare("dvs128", "--data-dir", tmp_path, *SMALL))
    assert "evil'" in error and ("leads out" in error or "link or a device" in error)
    assert not list(tmp_path.parent.glob("evil"))


@pytest.mark.parametrize("at", [-6, -60])  # its checksum, its data
def test_a_damaged_tar_is_refused_by_preparing_and_by_check(at, prepare, tmp_path):
    root = gesture(tmp_path)
    path = tmp_path / "data/DvsGesture.tar.gz"
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.write_bytes(data)
    assert f"archive {path} is damaged or cut off (" in error_of(prepare("dvs128", "--data-dir", root, *SMALL))
    assert not (root / "extract").exists()
    error = error_of(prepare("dvs128", "--data-dir", root, *SMALL, "--check"))
    assert "1 bad of 1 archives" in error and f"{path}: is damaged or cut off (" in error


@pytest.mark.parametrize("kept", [0, -300])
def test_check_reads_other_archives_too(kept, prepare, tmp_path):
    path = caltech(tmp_path) / "download/Caltech101.zip"
    path.write_bytes(path.read_bytes()[:kept])
    error = error_of(prepare("ncaltech101", "--data-dir", tmp_path, *SMALL, "--check"))
    assert f"{path}: is damaged or cut off (" in error and "download it again" in error


def test_check_lists_an_archive_that_cannot_be_read_with_the_others(prepare, tmp_path, monkeypatch):
    cifar(tmp_path)
    (tmp_path / "frog.zip").write_bytes(b"PK")

    def fault(path, *arguments):
        if path.name == "cat.zip":
            raise OSError(5, "Input/output error")
        return archive_fault(path, *arguments)

    monkeypatch.setattr("utils.prepare.checks.archive_fault", fault)
    error = error_of(prepare("cifar10dvs", "--data-dir", tmp_path, *SMALL, "--check"))
    assert "2 bad of 10 archives" in error and "cat.zip: cannot be read (Input/output error)" in error
    assert "frog.zip: is damaged or cut off" in error


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_that_unpacks_to_far_too_much_is_refused(kind, prepare, tmp_path):
    """Zeros, a thousand times as much as the file; a zip is refused before anything of it is written."""
    root = tmp_path / "data/dvs128"
    if kind == "zip":
        make_zip(root / "Caltech101.zip", {"Caltech101/ant/a.bin": bytes(10), "Caltech101/ant/b.bin": bytes(70 << 20)})
    else:
        make_tar(root / "DvsGesture.tar.gz", {"DvsGesture/a.aedat": bytes(10), "DvsGesture/b.aedat": bytes(70 << 20)})
    code, out, err = prepare({"zip": "ncaltech101", "tar": "dvs128"}[kind], "--data-dir", root, *SMALL)
    assert code == 2 and "unpacks to more than 0.0671 GB or 1000000 files" in err and "Traceback" not in err
    assert "at most 0.0671 GB" in out
    written = sum(path.stat().st_size for path in root.rglob("*.bin*"))
    assert written == 0 and not (root / "extract").exists()


def test_an_archive_that_has_no_room_is_refused_before_it_is_unpacked(prepare, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    code, out, err = prepare("ncaltech101", "--data-dir", caltech(tmp_path), *SMALL)
    assert code == 2 and "or than is free in" in err and "make room" in err and "1e-06 GB are free" in out
    assert not list(tmp_path.rglob("*.bin"))


def test_a_checksum_is_compared_and_remembered(tmp_path):
    path, record = tmp_path / "a.zip", tmp_path / ".checked_archives"
    path.write_bytes(b"some bytes")
    md5 = hashlib.md5(b"some bytes").hexdigest()
    assert archive_fault(path, "0" * 32, False, record) == f"has the MD5 {md5} and {'0' * 32} is published"
    assert not record.exists()
    assert archive_fault(path, md5, False, record) == ""
    stamp = path.stat()
    path.write_bytes(b"SOME bytes")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert archive_fault(path, md5, False, record) == ""  # not read again
    os.utime(path)
    assert "is published" in archive_fault(path, md5, False, record)


def test_without_the_published_checksum_the_way_out_is_told(prepare, tmp_path):
    error = error_of(prepare("ncaltech101", "--data-dir", caltech(tmp_path), "-T", 3))
    assert "66201824eabb0239c7ab992480b50ba3 is published" in error and "--any-archive" in error


# Bad files ------------------------------------------------------------------------------------------------------------


def test_check_lists_everything_that_is_bad_at_once_and_changes_nothing(prepare, tmp_path):
    assert prepare("ncaltech101", "--data-dir", caltech(tmp_path), *SMALL)[0] == 0
    frames = tmp_path / "frames_number_3_split_by_number"
    good = np.load(frames / "ant/image_0000.npz")["frames"]
    bad = {
        frames / "ant/image_0000.npz": (good[:2], "has shape [2, 2, 128, 128] and [T, 2, H, W] = [3, 2, 128, 128]"),
        frames / "ant/image_0001.npz": (good[..., :34], "has shape [3, 2, 128, 34]"),
        frames / "ant/image_0002.npz": (np.where(good > 0, np.nan, good), "holds NaN"),
        frames / "ant/image_0003.npz": (good + 0.5, "holds fractions"),
        frames / "ant/image_0004.npz": (-good, "holds -"),
        frames / "ant/image_0005.npz": (good * 0, "has no events"),
        frames / "ant/image_0006.npz": (good.astype(str), "and no numbers"),
    }
    for path, (array, _) in bad.items():
        np.savez(path, frames=array)
    expected = {path: what for path, (_, what) in bad.items()}

    def damage(path, keep, what):
        path.write_bytes(path.read_bytes()[:keep])
        expected[path] = what

    damage(frames / "bass/image_0000.npz", 100, "cannot be read, it is damaged or cut off")
    damage(tmp_path / "events_np/bass/image_0001.npz", 100, "cannot be read, it is damaged or cut off")
    damage(tmp_path / "extract/Caltech101/bass/image_0002.bin", 33, "is cut off inside an event: 33 bytes")
    damage(next(tmp_path.glob("packed_*/*_test.b2nd")), -1, "is no whole store")
    np.savez(frames / "bass/image_0003.npz", other=good)
    expected[frames / "bass/image_0003.npz"] = "has the key other and no 'frames'"
    (frames / "eel").mkdir()
    expected[frames / "eel"] = "is a class without samples"
    before = content(tmp_path)
    error = error_of(prepare("ncaltech101", "--data-dir", tmp_path, *SMALL, "--check"))
    listed = dict(line.strip().split(": ", 1) for line in error.splitlines()[1:])
    assert listed.keys() == {str(path) for path in expected}
    assert all(listed[str(path)].startswith(what) or what in listed[str(path)] for path, what in expected.items())
    assert content(tmp_path) == before
    # Preparing meets those that training would, and the changed sources, as one list too; what is no zip is made again.
    error = error_of(prepare("ncaltech101", "--data-dir", tmp_path, *SMALL))
    assert len(error.splitlines()) == 12 and str(frames / "eel") in error


def test_a_missing_class_of_cifar10dvs_is_told_by_check_at_every_stage_and_not_trained_on(prepare, tmp_path):
    cifar(tmp_path)
    (tmp_path / "frog.zip").unlink()
    assert "lacks frog.zip" in error_of(prepare("cifar10dvs", "--data-dir", tmp_path, "-T", 3))
    check = ["cifar10dvs", "--data-dir", tmp_path, "-T", 3, "--check"]
    assert "frog.zip: is missing; download it" in error_of(prepare(*check))
    assert prepare("cifar10dvs", "--data-dir", tmp_path, *SMALL)[0] == 0
    error = error_of(prepare(*check, "--any-archive"))
    for stage in ("frames_number_3_split_by_number", "events_np", "extract"):
        assert f"{tmp_path / stage / 'frog'}: is missing: a class of CIFAR10-DVS" in error
    with pytest.raises(
        UserError, match=r"1 bad files.*\n.*frog: is missing: .*; --sensor-size HxW says that these are"
    ):
        load_event_data("cifar10dvs", tmp_path, 3)
    (tmp_path / "extract/frog").mkdir()
    error = error_of(prepare(*check, "--any-archive"))
    assert f"{tmp_path}/extract/frog: is a class without .aedat files" in error and error.count("extract/frog") == 1
    (tmp_path / "extract/frog").rmdir()
    for passing in ({"on_bad_sample": "skip"}, {"sensor_size": (128, 128)}, {"any_archive": True}):
        data = load_event_data("cifar10dvs", tmp_path, 3, **passing)
        assert len(data.classes) == 9 and data.title.endswith("laid out as CIFAR10-DVS")


@pytest.mark.parametrize(("names", "lacks_one"), [("user01_led", True), ("object", False)])
def test_a_missing_gesture_is_told_by_the_names_of_the_others(names, lacks_one, prepare, tmp_path):
    """Other recordings in its layout may have any number of classes."""
    root = gesture(tmp_path, labels=range(1, 11), train=names)
    assert prepare("dvs128", "--data-dir", root, *SMALL)[0] == 0
    result = prepare("dvs128", "--data-dir", root, *SMALL, "--check")
    if lacks_one:
        assert f"{root / 'events_np/10'}: is missing: a class of DVS128 Gesture" in error_of(result)
        with pytest.raises(UserError, match="split_by_number/10: is missing: a class of DVS128 Gesture"):
            load_event_data("dvs128", root, 3)
    else:
        assert result[0] == 0 and len(load_event_data("dvs128", root, 3).classes) == 10


@pytest.mark.parametrize(
    ("count", "name", "what"), [(101, "image_0001", 0), (100, "image_0001", 1), (50, "image_0001", 0), (100, "a", 0)]
)
def test_most_of_the_classes_of_ncaltech101_with_its_names_are_not_all(count, name, what):
    lacking = prepare_data.DATA_SETS["ncaltech101"].lacking_classes(Path("d"), [f"{n}/{name}" for n in range(count)])
    assert [str(file).partition(";")[0] for file in lacking] == ["d: has 100 of the 101 classes of N-Caltech101"] * what


def test_a_damaged_recording_stops_until_it_is_replaced_or_left_out(prepare, tmp_path):
    members = {
        f"Caltech101/{n}/{i}.bin": five_bytes(events(200, 50 * k + i)) for k, n in enumerate("ab") for i in range(5)
    }
    whole = members["Caltech101/a/3.bin"]
    make_zip(tmp_path / "Caltech101.zip", {**members, "Caltech101/a/3.bin": whole[:-2], "Caltech101/b/1.bin": b""})
    error = error_of(prepare("ncaltech101", "--data-dir", tmp_path, *SMALL))
    assert "2 bad files" in error and "a/3.bin: is cut off inside an event" in error and "b/1.bin: is empty" in error
    assert not (tmp_path / "events_np").exists() and not list(tmp_path.glob("frames_*"))
    code, out, _ = prepare("ncaltech101", "--data-dir", tmp_path, *SMALL, "--on-bad-sample", "skip")
    assert code == 0 and "left out: 2 bad files" in out and "8 samples in 2 classes" in out
    (tmp_path / "extract/Caltech101/a/3.bin").write_bytes(whole)
    (tmp_path / "extract/Caltech101/b/1.bin").unlink()
    code, out, err = prepare("ncaltech101", "--data-dir", tmp_path, *SMALL)
    assert code == 0 and "making 3 frames of 1 samples" in out and "9 samples in 2 classes" in out, err


def test_a_bad_recording_does_not_hide_behind_a_split_and_moves_no_other_sample(prepare, tmp_path):
    members = {
        f"Caltech101/{n}/{i}.bin": five_bytes(events(200, 50 * k + i)) for k, n in enumerate("ab") for i in range(10)
    }
    for name, change in (("whole", {}), ("cut", {"Caltech101/a/3.bin": members["Caltech101/a/3.bin"][:-2]})):
        make_zip(tmp_path / name / "Caltech101.zip", {**members, **change})
    (tmp_path / "split.txt").write_text("train,*\ntest,a/3\ntest,a/4\ntest,b/3\n")
    cut = ["ncaltech101", "--data-dir", tmp_path / "cut", *SMALL]
    for split in ("random", tmp_path / "split.txt"):
        for check in ([], ["--check"]):
            error = error_of(prepare(*cut, "--split", split, *check))
            assert "a/3.bin: is cut off inside an event" in error
        assert prepare(*cut, "--split", split, "--on-bad-sample", "skip")[0] == 0
        whole = ["ncaltech101", "--data-dir", tmp_path / "whole", *SMALL]
        assert prepare(*whole, "--split", split)[0] == 0
        written = {root: next((tmp_path / root / "splits").iterdir()) for root in ("whole", "cut")}
        lines = {
            root: [line for line in path.read_text().splitlines() if line[0] != "#"] for root, path in written.items()
        }
        assert lines["cut"] == [line for line in lines["whole"] if ",a/3," not in line]
        for path in written.values():
            path.unlink()


def test_a_frame_that_was_deleted_is_made_again_from_the_recording(prepare, tmp_path):
    assert prepare("ncaltech101", "--data-dir", caltech(tmp_path), *SMALL)[0] == 0
    expected = content(tmp_path)
    shutil.rmtree(tmp_path / "events_np")
    (tmp_path / "frames_number_3_split_by_number/ant/image_0003.npz").unlink()
    code, out, err = prepare("ncaltech101", "--data-dir", tmp_path, *SMALL)
    assert code == 0 and "making 3 frames of 1 samples" in out, err
    assert content(tmp_path) == expected
    # With every frame there, the recordings are left alone.
    shutil.rmtree(tmp_path / "events_np")
    assert prepare("ncaltech101", "--data-dir", tmp_path, *SMALL)[0] == 0
    assert not (tmp_path / "events_np").exists()


def test_check_compares_training_with_test(prepare, tmp_path):
    assert prepare("ncaltech101", "--data-dir", caltech(tmp_path), *SMALL)[0] == 0
    (path,) = (tmp_path / "splits").iterdir()
    lines = [line.split(",") for line in path.read_text().splitlines() if line[0] != "#"]
    train, test = (next(name for of, name, _ in lines if of == part) for part in ("train", "test"))
    frames = tmp_path / "frames_number_3_split_by_number"
    shutil.copy(frames / f"{test}.npz", frames / f"{train}.npz")
    error = error_of(prepare("ncaltech101", "--data-dir", tmp_path, *SMALL, "--check"))
    assert "1 bad of" in error and f"{train}.npz: has the same events as the test sample {test}" in error
    (tmp_path / "split.txt").write_text(f"test,{train}\ntest,{test}\ntrain,*\n")
    code, _, err = prepare("ncaltech101", "--data-dir", tmp_path, *SMALL, "--check", "--split", tmp_path / "split.txt")
    assert code == 0, err


def test_a_gesture_recording_that_is_cut_off_before_its_last_span_is_bad(prepare, tmp_path):
    root = gesture(tmp_path)
    assert prepare("dvs128", "--data-dir", root, *SMALL)[0] == 0
    path = root / "extract/DvsGesture/user01_led.aedat"
    path.write_bytes(path.read_bytes()[: -8 * 400])
    error = error_of(prepare("dvs128", "--data-dir", root, *SMALL, "--check"))
    assert "1 bad of" in error and f"{path}: is cut off at " in error and "labelled spans" in error


def test_events_outside_the_sensor_are_bad(prepare, tmp_path):
    error = error_of(prepare("ncaltech101", "--data-dir", caltech(tmp_path), *SMALL, "--sensor-size", "100x100"))
    assert "30 bad files" in error and "and the sensor has 100x100 pixels; --sensor-size HxW" in error


def test_mistakes_on_the_command_line(prepare, tmp_path):
    assert "has its own training and test clips" in error_of(
        prepare("dvs128", "--data-dir", tmp_path, "--split", "first90")
    )
    error = error_of(prepare("ncaltech101", "--data-dir", caltech(tmp_path / "c"), *SMALL, "--split", "tebn"))
    assert "--split tebn is no split of N-Caltech101; give one of random, first90, or a split file" in error
    assert not (tmp_path / "c/extract").exists()
    for arguments in (("dvs128", "--workers", 0), ("mnist",), ("dvs128", "-T", "x")):
        assert prepare(*arguments)[0] == 2
    assert "--demo" in error_of(prepare("ncaltech101", "--data-dir", tmp_path / "nothing"))
    assert "--demo" in error_of(prepare("ncaltech101", "--data-dir", tmp_path, "--check"))


def test_a_terminated_run_says_so(prepare, tmp_path, monkeypatch):
    def terminated(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(prepare_data, "load_event_data", terminated)
    code, _, err = prepare("ncaltech101", "--data-dir", tmp_path)
    assert code == 143 and "stopped by SIGTERM; what is whole stays, and the same command goes on" in err


def test_defaults_are_those_of_the_scripts():
    for name, script in (("dvs128", "dvs128"), ("cifar10dvs", "cifar10dvs"), ("ncaltech101", "NCaltech101")):
        text = Path(prepare_data.ROOT / f"vgg8_{script}_SMA.py").read_text()
        about = prepare_data.DATA_SETS[name]
        assert f'"timesteps": {about.timesteps},' in text
        assert about.has_split or f'"split_seed": {about.split_seed},' in text

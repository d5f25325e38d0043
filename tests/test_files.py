"""Files that appear whole, follow no link and empty nothing; JSON and weights from anywhere; one run in one folder."""

import argparse
import errno
import io
import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from tests.conftest import ROOT, SCRIPTS, SMALL
from utils.checked import check_weights, read_checked, write_checked
from utils.checkpoint import load_weights, read_weights
from utils.errors import UserError
from utils.exported import write_exported
from utils.files import occupy, partial_of, read_json, replacing, same_file_as, write_text

WRITERS = {
    "text": lambda path: write_text(path, "ours"),
    "checkpoint": lambda path: write_checked({"model": torch.ones(2)}, path),
    "second name": lambda path: same_file_as(path.with_name("other"), path),
}


@pytest.fixture(params=WRITERS)
def write(request, tmp_path):
    (tmp_path / "other").write_text("another file of ours")
    return WRITERS[request.param]


@pytest.mark.parametrize("place", ["the file", "its partial file"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
def test_nothing_that_is_written_goes_through_a_link_or_waits_for_a_pipe(kind, place, write, tmp_path):
    path, target = tmp_path / "last.pt", tmp_path / "elsewhere"
    there = path if place == "the file" else partial_of(path)
    if kind == "pipe":
        os.mkfifo(there)
    else:
        there.symlink_to(target)
    if kind == "link":
        target.write_text("somebody's")
    try:
        write(path)
    except (OSError, UserError) as error:
        assert place == "its partial file" and "is no file of this program, which needs the name; move it away" in str(
            error
        )
    else:
        assert place == "the file" and path.is_file() and not path.is_symlink()
    assert target.read_text() == "somebody's" if kind == "link" else not target.exists()


def test_what_a_kill_left_is_written_anew_and_a_failed_write_leaves_nothing(tmp_path):
    path = tmp_path / "metrics.csv"
    partial_of(path).write_text("half of a lon")
    write_text(path, "whole")
    assert path.read_text() == "whole"
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["metrics.csv"] and path.read_text() == "whole"


def test_a_file_has_its_name_only_when_it_is_on_the_disk(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr("os.fsync", lambda _: flushed.append((tmp_path / "a").exists()))
    write_text(tmp_path / "a", "text")
    assert flushed == [False]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "x" * 240 + ".pt"])
def test_the_longest_names_can_be_written(name, tmp_path):
    write_text(tmp_path / name, "text")
    assert os.listdir(tmp_path) == [name]
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / ("x" * 256), "text")
    assert caught.value.errno == errno.ENAMETOOLONG


def test_names_that_are_no_utf8_can_be_written_and_read(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    write_text(path, f"{path.name}\n")
    assert path.read_bytes() == b"caf\xe9.txt\n"


# One output folder, one run -------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from utils.errors import exit_with_sentence
from utils.files import occupy
def main():
    with occupy(Path(sys.argv[1])):
        print("has it", flush=True)
        sys.stdin.read()
exit_with_sentence(main)
"""


@pytest.fixture
def hold():
    """Start a process that keeps a folder until its input ends."""
    started = []

    def start(folder):
        started.append(
            subprocess.Popen([sys.executable, "-c", HOLD, folder], cwd=ROOT, text=True, stdin=-1, stdout=-1, stderr=-1)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_four_runs_in_one_folder_leave_one_and_a_killed_one_does_not_block(hold, tmp_path):
    four = [hold(tmp_path) for _ in range(4)]
    holders = [one for one in four if one.stdout.readline() == "has it\n"]  # the others end without a line
    assert len(holders) == 1
    for one in set(four) - set(holders):
        error = one.communicate(timeout=60)[1]
        assert one.returncode == 2 and error.count("\n") == 1
        assert f"error: --output-dir {tmp_path} is in use by " in error
    with pytest.raises(UserError, match=rf"in use by process {holders[0].pid} on {os.uname().nodename} since 20\d\d-"):
        occupy(tmp_path).__enter__()
    holders[0].kill()
    holders[0].wait()
    with occupy(tmp_path):
        pass
    with occupy(tmp_path):  # and again after a run that ended well
        pass


def test_a_child_of_a_killed_run_does_not_keep_the_folder(tmp_path):
    program = HOLD.replace("print(", "import os\n        if os.fork() == 0: time.sleep(60)\n        print(")
    run = subprocess.Popen([sys.executable, "-c", program, tmp_path], cwd=ROOT, text=True, stdin=-1, stdout=-1)
    assert run.stdout.readline() == "has it\n"
    run.kill()
    run.wait()
    with occupy(tmp_path):
        pass


@pytest.mark.parametrize("kind", ["text", "link", "pipe", "folder"])
def test_a_foreign_file_in_the_place_of_the_lock_is_left_alone(kind, tmp_path):
    lock, target = tmp_path / "run.lock", tmp_path / "target"
    target.write_text("SMA run: somebody's")
    if kind == "text":
        lock.write_text("somebody's")
    elif kind == "link":
        lock.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    with pytest.raises(UserError, match=r"run\.lock is not the lock of this program; move it away"):
        occupy(tmp_path).__enter__()
    assert target.read_text() == "SMA run: somebody's"
    assert kind != "text" or lock.read_text() == "somebody's"


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_second_run_in_an_output_folder_is_refused_and_changes_nothing(processes, launch, gesture_data, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
    command = [*launcher, SCRIPTS["dvs128"], *SMALL, "--data-dir", gesture_data, "--output-dir", tmp_path]
    with occupy(tmp_path):
        done = launch(command)
    assert done.returncode != 0 and done.stderr.count("error: --output-dir") == 1, done.stderr
    assert f"--output-dir {tmp_path} is in use by process {os.getpid()} on" in done.stderr
    assert os.listdir(tmp_path) == ["run.lock"]


# JSON -----------------------------------------------------------------------------------------------------------------

FIELDS = {"seed": int, "lr": float, "name": (str, None), "args": dict}
GOOD = {"seed": 1, "lr": 1, "name": None, "args": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "1"}, '"seed" in .* is "1" and must be a whole number; give the file of a run'),
        ({"seed": True}, "is true and must be a whole number"),
        ({"seed": 1.5}, "is 1.5 and must be a whole number"),
        ({"lr": float("nan")}, "NaN is no number"),
        ({"lr": float("-inf")}, "-Infinity is no number"),
        ({"lr": None}, "is null and must be a number"),
        ({"name": []}, r"is \[\] and must be a text or null"),
        ({"args": [1]}, "must be an object"),
        ({"other": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_an_edited_json_file_is_one_sentence(change, message, tmp_path):
    path = tmp_path / "args.json"
    path.write_text(json.dumps(GOOD))
    assert read_json(path, FIELDS, "the file of a run") == GOOD
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(UserError, match=message):
        read_json(path, FIELDS, "the file of a run")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": ' * 100_000, "nested too deep"),
        (b"[1, 2]", "holds no JSON object"),
        (b'{"lr": 1e999}', "1e999 is too large"),
        (b'{"lr": ' + b"9" * 5000 + b"}", "holds no valid JSON"),
        (b"\xff\xfe", "holds no valid JSON"),
        (b"", "holds no valid JSON"),
    ],
)
def test_what_is_no_json_object_is_one_sentence(content, message, tmp_path):
    path = tmp_path / "args.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_json(path, {}, "the file of a run")
    assert len(str(caught.value)) < 400


def test_what_is_no_file_is_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in {"pipe": "named pipe", ".": "a folder", "no": "does not exist", "x" * 300: "too long"}.items():
        with pytest.raises(UserError, match=message):
            read_json(tmp_path / name, {}, "the file of a run")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.sampled_from([*GOOD]), inner),
    max_leaves=15,
)
ANY_TIME = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ANY_TIME
@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_json_object_with_the_fields_or_a_sentence(tmp_path, content):
    path = tmp_path / "args.json"
    path.write_bytes(content)
    try:
        found = read_json(path, FIELDS, "the file of a run")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert type(found["seed"]) is int and type(found["args"]) is dict
    assert os.listdir(tmp_path) == ["args.json"] and path.read_bytes() == content


# Weights --------------------------------------------------------------------------------------------------------------


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def containing_itself():
    content = {"model": {}}
    content["model"]["model"] = content
    return content


def containing_much():
    content = {"weight": torch.zeros(1)}
    for _ in range(40):
        content = {"a": content, "b": content}
    return {"model": content}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": torch.tensor([1.0, float("nan")])}, r"not finite .*in weight;"),
        ({"module.running_var": torch.tensor(float("inf"))}, r"not finite .*in module\.running_var;"),
        ({"weight": torch.ones(2, dtype=torch.complex64)}, "weight is a tensor of complex64"),
        ({"weight": torch.ones(2).to_sparse()}, "weight is a tensor of float32, sparse_coo"),
        ({"weight": torch.ones(2, device="meta")}, "weight is a tensor of no data"),
        ({"weight": torch.ones(1).expand(10**12)}, r"weight has shape \[1000000000000\] and not so many values"),
        ({3: torch.ones(2)}, "an entry 3 that is no named tensor"),
        ({"weight": torch.ones(2, 2, dtype=torch.int64), "bias": torch.ones(2)}, "weight torch.int64 instead of torch"),
        ({"weight": torch.tensor(1.0), "bias": torch.ones(2)}, r"weight \[\] instead of \[2, 2\]"),
        ({"weight": torch.ones(0, 10**12), "bias": torch.ones(2)}, r"instead of \[2, 2\]"),
        (containing_itself(), "it contains itself"),
        (containing_much(), "nested too deep"),
    ],
)
def test_weights_that_no_network_can_have_are_refused_by_name(content, message, tmp_path):
    (tmp_path / "w.pt").write_bytes(saved(content))
    with pytest.raises(UserError, match=message) as caught:
        load_weights(nn.Linear(2, 2), tmp_path / "w.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), 1j])
def test_exported_weights_are_checked_as_well(value, tmp_path):
    save_file({"weight": torch.tensor([value]), "bias": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"not finite .*in weight;|weight is a tensor of complex64"):
        read_weights(tmp_path / "w.safetensors")


def test_a_zip_member_that_was_changed_is_named(tmp_path):
    content = bytearray(saved(nn.Linear(300, 300).state_dict()))
    middle = len(content) // 2
    content[middle : middle + 1000] = bytes(1000)
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"the checksum of \w+/data/0 in it is another"):
        read_weights(tmp_path / "w.pt")


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10**7))
    with pytest.raises(UserError, match="unpack to more than its size"):
        read_weights(tmp_path / "w.pt")


def test_the_arguments_of_a_training_next_to_the_weights_are_allowed_and_not_used(tmp_path):
    net = nn.Linear(2, 2)
    content = {"model": net.state_dict(), "args": argparse.Namespace(lr=0.1, out="x"), "epoch": 3}
    (tmp_path / "w.pt").write_bytes(saved(content))
    weights, others = read_weights(tmp_path / "w.pt")
    assert torch.equal(weights["weight"], net.weight) and others == {"epoch": 3}
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_a_value_of_another_kind_next_to_the_weights_is_not_used(tmp_path):
    others = {"epoch": "x", "recipe": [1], "best": 3, "versions": None}
    (tmp_path / "w.pt").write_bytes(saved({"model": {"weight": torch.ones(1)}, **others}))
    assert read_weights(tmp_path / "w.pt")[1] == {}


WHOLE = saved({"model": {"weight": torch.ones(2, 2), "bias": torch.ones(2)}, "epoch": 1})


@ANY_TIME
@given(st.data())
def test_any_damage_to_weights_gives_them_or_a_sentence(tmp_path, data):
    content = bytearray(WHOLE)
    kind = data.draw(st.sampled_from(["bytes", "cut", "any", "pickle"]))
    if kind == "any":
        content = bytearray(data.draw(st.binary(max_size=100)))
    elif kind == "cut":
        del content[data.draw(st.integers(0, len(content))) :]
    else:  # in "pickle" the checksum of the zip is right
        start, end = (WHOLE.index(b"\x80\x02"), WHOLE.index(b"PK\x07\x08")) if kind == "pickle" else (0, len(content))
        for place, value in data.draw(
            st.lists(st.tuples(st.integers(start, end - 1), st.integers(0, 255)), max_size=4)
        ):
            content[place] = value
        if kind == "pickle":
            content = with_right_checksums(bytes(content))
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    net = nn.Linear(2, 2)
    try:
        load_weights(net, path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(value.isfinite().all() for value in net.state_dict().values())
    assert os.listdir(tmp_path) == ["w.pt"]


def with_right_checksums(content):
    """The archive written anew, so that a change in it is one that somebody made."""
    whole, changed = zipfile.ZipFile(io.BytesIO(WHOLE)), io.BytesIO()
    with zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as archive:
        for member in whole.infolist():
            start = WHOLE.index(whole.read(member), member.header_offset)
            archive.writestr(member.filename, content[start : start + member.file_size])
    return changed.getvalue()


def test_reading_takes_what_is_written(tmp_path):
    write_checked({"model": {"weight": torch.ones(2)}, "epoch": 1}, tmp_path / "last.pt")
    content, checksum = read_checked(tmp_path / "last.pt")
    assert content["epoch"] == 1 and len(checksum) == 64
    write_exported({"weight": torch.ones(2)}, {"epoch": 1}, tmp_path / "w.safetensors")
    weights, others = read_weights(tmp_path / "w.safetensors")
    check_weights(weights, "w")
    assert others == {"epoch": 1}

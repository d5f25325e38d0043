"""Nothing of anyone's is lost, mixed up or silently misread: a row for each class, from tests here and elsewhere."""

import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from tests.conftest import ROOT, SCRIPTS, SMALL

FOREIGN = "foreign files: no link is followed, nothing emptied, no wait for a pipe"
ONE_RUN = "one output folder, one run: a second is refused and names the first; a kill ends the lock"
DATA = "data of a run: a change is refused by sample name, older frames are made again"
SURROUNDINGS = "closed output, readers that go away, locales, long and foreign names, environment: exit codes stay"

# Rows whose cases are tests of other files: file and expression of names.
ELSEWHERE = {
    FOREIGN: {
        "test_files.py": "link or foreign or kill_left",
        "test_prepare_data.py": "leads_out or in_the_place_of_the_lock",
    },
    ONE_RUN: {"test_files.py": "four_runs or child_of_a_killed or second_run"},
    "a run's results are its own: an evaluation never replaces them": {"test_scripts.py": "evaluat or finished_run"},
    DATA: {
        "test_event_files.py": "changed or older_than or replaced or split_is_never",
    },
    "weights: not finite, damaged, of another type or shape, containing themselves: refused by name": {
        "test_files.py": "weights or zip or archive or arguments_of or value_of",
        "test_checkpoint.py": "refused or changed_byte or mismatch or does_not_fit",
    },
    "events: type, range and order of each array; a bad sample by name": {
        "test_event_files.py": "array or late or any_", "test_recordings.py": "any_bytes or wrong",
    },
    "what is not seen is said: links, folders that cannot be read, samples at a wrong place": {
        "test_event_files.py": "link or no_file or outside or cannot_be_read", "test_images.py": "link",
    },
    "pictures: 16 bits and floats are scaled; pipes and devices are left out by name": {
        "test_images.py": "eight_bits or mean_nothing or no_file",
    },
    SURROUNDINGS: {"test_errors.py": "", "test_distributed.py": "environment or port or minus_one"},
    "command lines and edited JSON: settings in range or a sentence": {
        "test_command_lines.py": "", "test_files.py": "json", "test_scripts.py": "mistake",
        "test_compare.py": "sentence",
    },
    "archives: none unpacks to more than it should or than there is room for": {
        "test_prepare_data.py": "an_archive or damaged_tar or tar_with",
    },
    "slips: another camera or number of classes is noticed early; one summary; continuing says from where": {
        "test_event_files.py": "another_camera or number_of_classes or summed_up", "test_signals.py": "inside_an_epoch",
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", [pytest.param(what, marks=pytest.mark.row(what)) for what in ELSEWHERE])
def test_the_cases_of_a_class_hold(what, cases, tmp_path):
    tried = failed = 0
    for file, names in ELSEWHERE[what].items():
        report = tmp_path / f"{file}.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", f"tests/{file}", "--junitxml", report]
        done = subprocess.run(
            [*command, "-k", names], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
        )
        suite = ET.parse(report).getroot().find("testsuite")
        count = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
        assert count["tests"] > count["skipped"], f"no test of {file} is called {names}: {done.stdout[-500:]}"
        tried += count["tests"] - count["skipped"]
        failed += count["failures"] + count["errors"]
    cases(tried, tried - failed)


@pytest.fixture
def run(gesture_data, tmp_path):
    """Run a small training as a shell runs it; gives its exit code and stderr."""

    def start(shell="{}", data=gesture_data, output=tmp_path / "run", timeout=120, **environment):
        command = [sys.executable, SCRIPTS["dvs128"], *SMALL, "--epochs", 2, "--data-dir", data, "--output-dir", output]
        words = list(map(os.fsencode, map(str, command)))
        clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        done = subprocess.run(
            [b"bash", b"-c", b"set -o pipefail; " + shell.format('"$0" "$@"').encode(), *words],
            cwd=ROOT, env={**clean, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, timeout=timeout,
            check=False,
        )  # fmt: skip
        return done.returncode, done.stderr.decode(errors="replace")

    return start


def is_whole(folder):
    return len((folder / "metrics.csv").read_text().splitlines()) == 3 and (folder / "evaluation.json").exists()


@pytest.mark.slow
@pytest.mark.row(SURROUNDINGS)
def test_a_training_goes_through_whatever_becomes_of_its_output(cases, run, tmp_path):
    shells = ["{} | head -n 1", "{} | true", "{} >&-", "{} >&- 2>&-", "{} <&- >&- 2>&-", "{} 2>&1 | head -n 1"]
    held, said = 0, []
    for number, shell in enumerate(shells):
        folder = tmp_path / str(number)
        code, error = run(shell, output=folder)
        held += code == 0 and is_whole(folder) and "Traceback" not in error
        said.append((shell, code, error[-300:]))
    cases(len(shells), held, "" if held == len(shells) else str(said))


@pytest.mark.slow
@pytest.mark.row(SURROUNDINGS)
def test_a_training_takes_any_name_or_says_what_is_wrong_with_it(cases, run, tmp_path):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    names = ["caf\xe9", "\u6f22" * 80, "x" * 255, "a\nb", "x" * 256, os.fsdecode(b"caf\xe9")]
    held, tried, said = 0, 0, []
    for number, (name, environment) in enumerate([(name, e) for name in names for e in ({}, ascii_only)]):
        folder = tmp_path / str(number) / name
        tried += 1
        code, error = run(output=folder, **environment)
        sentence = re.findall(r"^\S+: error: .*$", error, re.MULTILINE)
        good = is_whole(folder) if code == 0 else code == 2 and len(sentence) == 1
        held += good and "Traceback" not in error
        said += [] if good else [(name, environment, code, error[-300:])]
    cases(tried, held, "" if held == tried else str(said))


@pytest.mark.slow
@pytest.mark.row(DATA)
def test_a_training_is_not_continued_on_other_samples(cases, run, gesture_data, tmp_path):
    changes = {
        "one count": lambda events: {**events, "x": np.where(np.arange(events["x"].size) == 7, 3, events["x"])},
        "other polarity": lambda events: {**events, "p": 1 - events["p"]},
        "other order of time": lambda events: {**events, "x": events["x"][::-1], "y": events["y"][::-1]},
    }
    held, said = 0, []
    for number, (kind, change) in enumerate(changes.items()):
        data, output = tmp_path / f"data_{number}", tmp_path / f"run_{number}"
        shutil.copytree(gesture_data / "events_np", data / "events_np")
        assert run(data=data, output=output)[0] == 0
        path = data / "events_np/train/3/user01_1.npz"
        with np.load(path) as events:
            changed = change(dict(events))
        np.savez(path, **changed)
        before = {one: one.read_bytes() for one in output.glob("*.pt")}
        code, error = run(data=data, output=output)
        good = code == 2 and "3/user01_1" in error and "Traceback" not in error
        good &= {one: one.read_bytes() for one in output.glob("*.pt")} == before
        held += good
        said += [] if good else [(kind, code, error[-300:])]
    cases(len(changes), held, "" if held == len(changes) else str(said))


@pytest.mark.slow
@pytest.mark.row(FOREIGN)
def test_a_training_in_a_folder_of_traps_touches_nothing_of_others(cases, run, tmp_path):
    names = ["args.json", "metrics.csv", "last.pt", "best.pt", "previous.pt", "evaluation.json", "split.txt"]
    traps = [("", "link"), ("", "dangling"), (".partial", "link"), (".partial", "pipe"), (".partial", "dangling")]
    held, said = 0, []
    for number, (suffix, kind) in enumerate(traps):
        folder, target = tmp_path / str(number), tmp_path / f"{number}_of_others"
        folder.mkdir()
        for name in names if not suffix else names[:1]:
            path = folder / (f".{name}.partial" if suffix else name)
            if kind == "pipe":
                os.mkfifo(path)
            else:
                path.symlink_to(target)
        if kind == "link":
            target.write_text("theirs")
        code, error = run(output=folder)
        good = target.read_text() == "theirs" if kind == "link" else not target.exists()
        good &= "Traceback" not in error and code in (0, 2)
        held += good
        said += [] if good else [(suffix, kind, code, error[-300:])]
    cases(len(traps), held, "" if held == len(traps) else str(said))


@pytest.mark.slow
@pytest.mark.row(ONE_RUN)
def test_four_trainings_at_once_leave_one_and_it_ends_whole(cases, gesture_data, tmp_path):
    folder = tmp_path / "run"
    options = [*SMALL, "--epochs", 60, "--data-dir", gesture_data, "--output-dir", folder]
    command = list(map(str, [sys.executable, SCRIPTS["dvs128"], *options]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start():
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-3, stderr=-1, text=True)

    four = [start() for _ in range(4)]
    end = time.monotonic() + 120
    while sum(one.poll() is None for one in four) > 1 and time.monotonic() < end:
        time.sleep(0.1)
    (winner,) = (one for one in four if one.poll() is None)
    refused = [one for one in four if one.poll() == 2 and f"process {winner.pid} on" in one.stderr.read()]
    winner.kill()
    winner.wait()
    again = start()
    error = again.communicate(timeout=240)[1]
    rows = (folder / "metrics.csv").read_text().splitlines()
    complete = again.returncode == 0 and [row.split(",")[0] for row in rows[1:]] == [str(n) for n in range(1, 61)]
    cases(4, len(refused) + complete, error[-300:] if not complete else "")

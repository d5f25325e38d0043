"""Runs that are killed, stopped, spoilt or lose a process; see runs.py."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.reliability.runs import ROWS, hostile_files


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory):
    return tmp_path_factory.mktemp("demo_data")


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.row(ROWS[name].what)) for name in ROWS])
def test_a_run_survives(name, cases, demo_data, tmp_path):
    command = [sys.executable, "-m", "tests.reliability.runs", name, tmp_path, demo_data]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    cases(*json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.row(ROWS["hostile"].what)
def test_the_hostile_files_do_run_code_where_they_are_opened_without_care(cases, tmp_path):
    marker = tmp_path / "executed"
    executed = {}
    for name, content in hostile_files(marker):
        (tmp_path / name).write_bytes(content)
        with contextlib.suppress(EOFError):  # the tar ends early: its code has run by then
            torch.load(tmp_path / name, weights_only=False)
        executed[name] = marker.exists()
        marker.unlink(missing_ok=True)
    assert executed == dict.fromkeys(executed, True)
    cases(0, 0)

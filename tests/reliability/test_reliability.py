"""The rows of reliability.py in their smaller form: real processes, killed, stopped, spoilt and lost."""

import contextlib
import json
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.reliability import reliability


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The figures of one quick call of the tool, by row."""
    folder = tmp_path_factory.mktemp("reliability")
    done = subprocess.run(
        [sys.executable, "tests/reliability/reliability.py", "--quick", "--output-dir", folder],
        cwd=ROOT, capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip
    assert (folder / "reliability.json").exists(), done.stderr
    found = json.loads((folder / "reliability.json").read_text())["rows"]
    assert done.returncode == int(not all(row["good"] for row in found))
    assert done.stdout == (folder / "reliability.md").read_text()
    return {row["row"]: row for row in found}


@pytest.mark.parametrize("name", reliability.ROWS)
def test_a_row_reaches_its_target(name, table):
    assert table[name]["good"], table[name]["found"]


def test_the_hostile_files_do_run_code_where_they_are_opened_without_care(tmp_path):
    marker = tmp_path / "executed"
    executed = {}
    for name, content in reliability.hostile_files(marker):
        (tmp_path / name).write_bytes(content)
        with contextlib.suppress(EOFError):  # the tar ends early: its code has run by then
            torch.load(tmp_path / name, weights_only=False)
        executed[name] = marker.exists()
        marker.unlink(missing_ok=True)
    assert executed == dict.fromkeys(executed, True)

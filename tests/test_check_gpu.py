"""tools/check_gpu.py as a rehearsal on a CPU: rows are isolated from each other, and what passed is not run again."""

import json

import pytest

from tools.check_gpu import ROWS


@pytest.fixture
def check(launch, tmp_path):
    """Run the tool; the finished process and its results by row."""

    def run(*arguments, timeout=300):
        done = launch(["tools/check_gpu.py", "--device", "cpu", "--output-dir", tmp_path, *arguments], timeout=timeout)
        results = tmp_path / "results.json"
        return done, json.loads(results.read_text()) if results.exists() else {}

    return run


def test_a_failed_row_does_not_stop_the_others_and_runs_again(check):
    done, results = check("--rows", "versions", "--limit", "0.05")
    assert done.returncode == 1 and "fails: versions" in done.stdout.splitlines()[-1]
    assert results["versions"]["state"] == "failed" and "not ready after 0.05 s" in results["versions"]["words"]
    done, results = check("--rows", "evaluation", "versions", "triton-neurons", "cupy-neurons")
    states = {name: row["state"] for name, row in results.items() if name in ROWS}
    assert states == {
        "evaluation": "failed",  # there are no weights of a demo
        "versions": "ok",
        "triton-neurons": "ok",
        "cupy-neurons": "not here",
    }
    assert "run that row first" in results["evaluation"]["words"]
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == (
        "rehearsal on a CPU, demos of one epoch at an eighth of the width: works: versions, triton-neurons; fails: "
        "evaluation; not on this machine: cupy-neurons"
    )
    before = results["triton-neurons"]["seconds"]
    done, results = check("--rows", "versions", "triton-neurons")
    assert done.returncode == 0 and done.stdout.count(" before ") == 2
    assert results["triton-neurons"]["seconds"] == before


def test_no_row_begins_after_the_time_is_over(check):
    done, results = check("--rows", "versions", "--minutes", "-1")
    assert done.returncode == 1 and results["versions"]["state"] == "not run"
    assert done.stdout.splitlines()[-1].endswith("width: not run: versions")


def test_an_unknown_row_is_one_sentence(check):
    done, _ = check("--rows", "versoins")
    assert done.returncode == 2 and "versoins" in done.stderr and "Traceback" not in done.stderr


def test_every_row_rehearses(check):
    done, results = check("--minutes", "60", "--limit", "1200", timeout=3600)
    assert "failed" not in done.stdout and done.returncode == 0, done.stdout
    states = {name: results[name]["state"] for name in ROWS}
    assert {name for name, state in states.items() if state != "ok"} == {"cupy-neurons"}, done.stdout

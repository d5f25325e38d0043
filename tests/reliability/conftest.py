"""The table of docs/reliability.md: every test here is a row of it, or one of the cases of a row.

``python -m pytest -m slow tests/reliability`` prints the table at its end and writes it to output/reliability.md.
"""

import itertools
import json

import pytest
import torch

from tests.conftest import ROOT
from utils.versions import machine, versions


def pytest_configure(config):
    config.addinivalue_line("markers", "row(what): the row of the table that a test belongs to")


@pytest.fixture
def cases(request, record_property):
    """``cases(tried, held, note)`` tells how many cases a test tried, and fails it where not all of them held."""

    def tell(tried, held, note=""):
        record_property("cases", json.dumps([tried, held, note]))
        assert held == tried, note

    return tell


@pytest.fixture(autouse=True)
def row(request, record_property):
    marker = request.node.get_closest_marker("row")
    assert marker is not None, "a test of this folder needs @pytest.mark.row(...)"
    record_property("row", marker.args[0])


def pytest_terminal_summary(terminalreporter):
    rows = {}
    for report in itertools.chain(*(terminalreporter.stats.get(kind, []) for kind in ("passed", "failed"))):
        properties = dict(getattr(report, "user_properties", ()))
        if report.when == "call" and "row" in properties:
            tried, held, note = json.loads(properties.get("cases", json.dumps([1, int(report.passed), ""])))
            row = rows.setdefault(properties["row"], [0, 0, []])
            row[0], row[1] = row[0] + tried, row[1] + min(held, tried if report.passed else held)
            row[2] += [note] if note and note not in row[2] else []
    rows = {what: row for what, row in rows.items() if row[0]}
    if not rows:
        return
    lines = ["| what must hold | tried | held | |", "|---|---|---|---|"]
    lines += [f"| {what} | {tried} | {held} | {'; '.join(notes)} |" for what, (tried, held, notes) in rows.items()]
    libraries = ", ".join(f"{name} {version}" for name, version in versions().items())
    table = "\n".join([*lines, "", f"{machine(torch.device('cpu'))}, {libraries}.", ""])
    terminalreporter.section("docs/reliability.md")
    terminalreporter.write(table)
    path = ROOT / "output" / "reliability.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(table, encoding="utf-8")

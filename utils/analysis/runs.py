"""What a finished run left in its output directory."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.logger import COLUMNS

__all__ = ["read_json", "read_metrics"]


def read_metrics(run: Path) -> dict[str, list[float]]:
    """The columns of ``metrics.csv``: name to one value an epoch.

    Raises:
        UserError: it is not there, damaged or empty.
    """
    path = run / "metrics.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]  # not one that a kill cut off
        columns = {name: [float(row[name]) for row in rows] for name in COLUMNS}
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(
            f"file {path} cannot be read as the metrics of a run ({error}); give its --output-dir"
        ) from error
    if not rows:
        raise UserError(f"run {run} has not finished an epoch: {path} has no rows")
    return columns


def read_json(path: Path, needed: bool = True) -> dict[str, Any]:
    """A JSON object that a script wrote.

    Args:
        path: ``args.json``, ``evaluation.json``, ...
        needed: False gives an empty dictionary where the file does not exist.

    Raises:
        UserError: it is missing, or no JSON object.
    """
    if not needed and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"file {path} cannot be read ({error}); give the file of a finished run") from error
    if not isinstance(content, dict):
        raise UserError(f"file {path} holds no JSON object; give the file of a finished run")
    return content

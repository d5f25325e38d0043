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


def read_json(run: Path, name: str) -> dict[str, Any]:
    """``args.json`` or ``evaluation.json`` of a run.

    Raises:
        UserError: it is not there or damaged.
    """
    try:
        content = json.loads((run / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run / name} cannot be read ({error}); give the --output-dir of a run that is finished"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{run / name} is not what a run writes; give the --output-dir of a run that is finished")
    return content

"""What a finished run left in its output directory."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import Fields, read_json, reading
from utils.logger import COLUMNS, VAL_COLUMNS

__all__ = ["read_metrics", "read_run_file"]

_FIELDS: dict[str, Fields] = {
    "args.json": {"args": dict, "data": dict, "split": dict, "batch": dict},
    "evaluation.json": {"acc1": float, "count": int, "selection": (str, None)},
}


def read_metrics(run: Path) -> dict[str, list[float]]:
    """The columns of ``metrics.csv``: name to one value an epoch.

    Of a run that holds samples out these are ``val_loss`` and ``val_acc1`` in the place of ``test_loss`` and
    ``test_acc1``, which are empty.

    Raises:
        UserError: it is not there, damaged or empty.
    """
    path = run / "metrics.csv"
    try:
        with reading(path, "the --output-dir of a run") as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            reader = csv.DictReader(text)
            rows = [row for row in reader if None not in row.values()]  # not one that a kill cut off
        names = list(COLUMNS)
        if VAL_COLUMNS[0] in (reader.fieldnames or ()):
            names = [*(name for name in COLUMNS if not name.startswith("test_")), *VAL_COLUMNS]
        columns = {name: [float(row[name]) for row in rows] for name in names}
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(
            f"file {path} cannot be read as the metrics of a run ({error}); give its --output-dir"
        ) from error
    if not rows:
        raise UserError(f"run {run} has not finished an epoch: {path} has no rows")
    return columns


def read_run_file(run: Path, name: str) -> dict[str, Any]:
    """``args.json`` or ``evaluation.json`` of a run.

    Raises:
        UserError: it is not there, damaged or edited.
    """
    return read_json(run / name, _FIELDS[name], "the --output-dir of a run that is finished")

"""Weights & Biases or Trackio, through the interface that they share: ``init``, ``log``, ``finish``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import read_text, write_text

__all__ = ["TRACKERS", "Tracker", "check_tracker"]

TRACKERS = ("wandb", "trackio")
_NAME = "tracker.txt"  # in the output directory: the name of the run, with which it goes on


def check_tracker(name: str | None) -> None:
    """Check that the package of ``--tracker`` is there.

    Raises:
        UserError: it is not.
    """
    if name is not None and importlib.util.find_spec(name) is None:
        raise UserError(f"--tracker {name} needs the package {name}: pip install {name}, or leave --tracker out")


class Tracker:
    """A run at a tracker. A fault of the tracker is one warning, and the training goes on without it.

    The run has the name of its output directory and eight random digits, kept in ``tracker.txt`` there, and goes on
    under it. Its project is ``sma_<data set>``, or what ``WANDB_PROJECT`` or ``TRACKIO_PROJECT`` says.

    Args:
        name: of the package.
        directory: the output directory.
        config: settings and facts of the run, plain values.
    """

    def __init__(self, name: str, directory: Path, config: Mapping[str, Any]):
        self.name, self.directory = name, directory
        self._package: Any = None
        self._try(lambda: self._init(config))

    def _init(self, config: Mapping[str, Any]) -> None:
        package = importlib.import_module(self.name)
        run = (read_text(self.directory / _NAME) or "").strip()
        if not run:
            folder = re.sub(r"[^A-Za-z0-9_.-]", "_", self.directory.resolve().name)
            run = f"{folder}-{secrets.token_hex(4)}"
            write_text(self.directory / _NAME, f"{run}\n")
        project = os.environ.get(f"{self.name.upper()}_PROJECT") or f"sma_{config['data']['name']}"
        # Trackio goes on with a run by its name, Weights & Biases by its id.
        own = {"id": run, "dir": str(self.directory)} if self.name == "wandb" else {}
        package.init(project=project, name=run, config=dict(config), resume="allow", **own)
        self._package = package

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        """Log values of an epoch."""
        if self._package is not None:
            self._try(lambda: self._package.log(dict(values), step=epoch))

    def finish(self) -> None:
        """End the run at the tracker: what is not sent yet is sent."""
        if self._package is not None:
            self._try(lambda: self._package.finish())
        self._package = None

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a package raises without a network, a login or room
            self._package = None
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            print(f"--tracker {self.name} failed ({reason}); the run goes on without it", file=sys.stderr, flush=True)

"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from utils.errors import UserError

__all__ = ["between", "markdown_table"]


def between(text: str, begin: str, end: str, tables: str, page: Path) -> str:
    """``text`` with ``tables`` in the place of what stands between the lines ``begin`` and ``end``.

    Raises:
        UserError: it has not both lines; the message names the ``page``.
    """
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise UserError(f"page {page} must have the lines {begin} and {end}, between which the tables go")
    return f"{before}{begin}\n\n{tables}\n\n{end}{after}"


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first line is its head."""
    rule = ["---"] * len(lines[0])
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))

"""A report as one HTML page that needs no network: text, tables and figures are all inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from matplotlib.figure import Figure

from utils.analysis.figures import svg

__all__ = ["figure_html", "list_html", "page", "section", "table_html", "tiles"]

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c2024; --faint: #5b6570; --line: #d9dee3; --card: #f5f7f9 }
@media (prefers-color-scheme: dark) {
  :root { --back: #14181c; --text: #e6e9ec; --faint: #9aa5b0; --line: #333b43; --card: #1e242a }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem }
p { margin: .5rem 0; max-width: 46rem } .faint, figcaption { color: var(--faint); font-size: .9rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(max(9.5rem, 30%), 1fr)); gap: .75rem;
  margin: 1.25rem 0 }
.tile { background: var(--card); border-radius: .5rem; padding: .75rem 1rem }
.tile b { display: block; font-size: 1.4rem }
.tile span { color: var(--faint); font-size: .85rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line) }
th { font-weight: 600 } td { font-variant-numeric: tabular-nums } td.n, th.n { text-align: right; white-space: nowrap }
td:first-child { min-width: 8rem } ul { padding-left: 1.2rem } li { max-width: 46rem } figure { margin: 1rem 0 }
.paper { overflow-x: auto; background: #fff; border: 1px solid var(--line); border-radius: .5rem; padding: .5rem }
.paper img { display: block; margin: 0 auto; max-width: 100% }
"""


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """The page.

    Args:
        title, subtitle: plain text.
        sections: HTML, from the other functions of this file.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="faint">{escape(subtitle)}</p>\n' + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A section: a heading and HTML below it."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def tiles(numbers: Sequence[tuple[str, str]]) -> str:
    """The few numbers that matter most: value and what it is."""
    cells = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in numbers)
    return f'<div class="tiles">{"".join(cells)}</div>'


def table_html(lines: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table whose first line is its head; ``numbers`` are the columns to align to the right."""

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(_cell(cell, tag, column in numbers) for column, cell in enumerate(cells)) + "</tr>"

    head, *others = lines
    body = "\n".join(row(cells, "td") for cells in others)
    return f'<div class="scroll"><table>\n<thead>{row(head, "th")}</thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _cell(text: str, tag: str, number: bool) -> str:
    kind = ' class="n"' if number else ""
    return f"<{tag}{kind}>{escape(text)}</{tag}>"


def list_html(lines: Sequence[str]) -> str:
    """A list."""
    return '<ul class="faint">' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def figure_html(figure: Figure, caption: str) -> str:
    """A figure, on white in the dark, too: the colours of its scales stay what they are."""
    width = round(96 * figure.get_size_inches()[0])
    data = base64.b64encode(svg(figure).encode()).decode()
    size = f'width="{width}" style="min-width: {min(width, 480)}px"'
    return (
        f'<figure><div class="paper"><img {size} alt="{escape(caption)}" '
        f'src="data:image/svg+xml;base64,{data}"></div><figcaption>{escape(caption)}</figcaption></figure>'
    )

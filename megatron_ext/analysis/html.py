"""Pieces of a page that needs nothing but itself: no script, no style sheet, no font from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

# Readable in a light and in a dark window, and on a phone: what is wider than the window scrolls in its own
# box. Figures are drawn for white paper and keep it.
_STYLE = """
:root { color-scheme: light dark; --text: #1d1f21; --page: #fff; --soft: #5c6166; --line: #d5d8dc;
  --box: #f5f6f7; --good: #00664b; --bad: #a33b00; --note: #00538a; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6e8; --page: #16181a; --soft: #a3a9af;
  --line: #3a3f45; --box: #202326; --good: #4cc9a0; --bad: #ff9e66; --note: #74bdf2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 72rem; color: var(--text);
  background: var(--page); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid var(--line);
  padding-bottom: .25rem; }
h3 { font-size: 1.02rem; margin: 1.4rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin: .7rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .left td, .left th { text-align: left; }
.left td { white-space: normal; min-width: 10.5rem; vertical-align: top; }
.left td:first-child { white-space: nowrap; }
thead th { background: var(--box); font-weight: 600; }
tr:last-child td { border-bottom: 0; }
tr.other td { color: var(--soft); font-style: italic; }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
figure { margin: 0; }
figure img { width: 100%; max-width: 40rem; height: auto; display: block; background: #fff; border: 1px solid
  var(--line); border-radius: 6px; }
ul.findings { list-style: none; padding: 0; margin: .6rem 0; }
ul.findings li { background: var(--box); border-left: 4px solid var(--note); border-radius: 4px;
  padding: .5rem .8rem; margin: .45rem 0; }
ul.findings b { color: var(--note); }
ul.findings .worse { border-color: var(--bad); } ul.findings .worse b { color: var(--bad); }
ul.findings .better { border-color: var(--good); } ul.findings .better b { color: var(--good); }
details { margin: .7rem 0; } summary { cursor: pointer; }
code { font-size: .9em; }
"""


def page(title: str, sections: Iterable[str]) -> str:
    """A whole document.

    Args:
        title: as text.
        sections: as HTML.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what stands under it (HTML)."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def heading(text: str) -> str:
    """A heading within a section."""
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str, *, soft: bool = False) -> str:
    """A paragraph of text."""
    return f"<p{' class=soft' if soft else ''}>{escape(text)}</p>"


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    other: Iterable[int] = (),
    left: bool = False,
) -> str:
    """A table that scrolls in its own box.

    Args:
        header: titles of the columns.
        rows: cells, as text.
        other: numbers of the rows that are not the user's own: set apart by colour and slant.
        left: whether all columns are text; otherwise all but the first are numbers.
    """
    apart = set(other)
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = [f"<thead><tr>{head}</tr></thead>", "<tbody>"]
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f"<tr{' class=other' if number in apart else ''}>{cells}</tr>")
    body = "\n".join([*lines, "</tbody>"])
    return f'<div class="scroll"><table{" class=left" if left else ""}>\n{body}\n</table></div>'


def figure(png: bytes, description: str) -> str:
    """A picture within the page, with its description below it."""
    data = base64.b64encode(png).decode()
    text = escape(description)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def figures(items: Iterable[str]) -> str:
    """Figures side by side, as many as the window has room for."""
    return '<div class="figures">\n' + "\n".join(items) + "\n</div>"


def folded(summary: str, *parts: str) -> str:
    """What is shown when its title is clicked."""
    return f"<details><summary>{escape(summary)}</summary>\n" + "\n".join(parts) + "\n</details>"


def findings(items: Iterable[tuple[str, str, str]]) -> str:
    """Sentences with a label.

    Args:
        items: of each the kind (``better``, ``worse`` or ``note``), the label and the sentence.
    """
    lines = [
        f'<li class="{kind}"><b>{escape(label)}:</b> {escape(text)}</li>'
        for kind, label, text in items
    ]
    return '<ul class="findings">\n' + "\n".join(lines) + "\n</ul>"

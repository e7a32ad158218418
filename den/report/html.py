"""One self-contained page: no script, no network; pictures are inside it. Readable on a phone, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from den.report.sheets import Sheet

CSS = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #5c5c5c; --line: #d9d9d9; --back: #fff; --band: #f3f6fa;
  --link: #00558c }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #a8a8a8; --line: #444; --back: #16181b; --band: #22262b;
    --link: #7cc0f5 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; color: var(--ink); background: var(--back);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.2rem 0 .6rem; padding-top: .8rem;
  border-top: 2px solid var(--line) }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .5rem }
a { color: var(--link) }
p, ul, ol { margin: .5rem 0; max-width: 46rem }
ul, ol { padding-left: 1.3rem }
.soft, figcaption, .notes { color: var(--soft); font-size: .875rem }
.scroll { overflow-x: auto; margin: .6rem 0; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; font-size: .875rem; width: 100% }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
th { font-weight: 600; vertical-align: bottom; background: var(--band) }
th.text, td.text { text-align: left }
th.span { text-align: center; border-bottom: 1px solid var(--line) }
tbody th { background: var(--back); font-weight: 400; white-space: normal; min-width: 8.5rem; max-width: 16rem }
tbody tr.strong > th { background: var(--band) }
tbody th, thead tr > .text:first-child { position: sticky; left: 0; z-index: 1;
  box-shadow: 1px 0 0 var(--line) }
tbody tr { border-top: 1px solid var(--line) }
tr.strong > * { background: var(--band); font-weight: 600 }
figure { margin: .8rem 0 1.2rem }
figure .scroll { background: #fff; margin: 0 }
img { display: block; width: 100%; height: auto; margin: 0 auto }
details { margin: .8rem 0; border: 1px solid var(--line); border-radius: 6px; padding: 0 .8rem }
summary { cursor: pointer; padding: .6rem 0; font-weight: 600 }
@media (max-width: 40rem) { body { padding: .75rem } th, td { padding: .3rem .45rem } tbody th { max-width: 9.5rem } }
"""


def page(title: str, body: Sequence[str]) -> str:
    """The document. body: parts that are HTML already."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def heading(level: int, text: str, anchor: str | None = None) -> str:
    """A heading, perhaps one that links can point at."""
    name = f' id="{escape(anchor)}"' if anchor else ""
    return f"<h{level}{name}>{escape(text)}</h{level}>"


def paragraph(text: str, soft: bool = False) -> str:
    """A paragraph. soft: less prominent."""
    kind = ' class="soft"' if soft else ""
    return f"<p{kind}>{escape(text)}</p>" if text else ""


def bullets(items: Sequence[str], kind: str = "") -> str:
    """A list of texts."""
    name = f' class="{kind}"' if kind else ""
    return f"<ul{name}>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>" if items else ""


def links(items: Sequence[tuple[str, str]]) -> str:
    """A list of texts and the anchors that they lead to."""
    return "<ul>" + "".join(f'<li><a href="#{escape(a)}">{escape(text)}</a></li>' for text, a in items) + "</ul>"


def details(summary: str, body: Sequence[str]) -> str:
    """What is shown on demand."""
    return f"<details><summary>{escape(summary)}</summary>\n" + "\n".join(body) + "\n</details>"


def sheet(table: Sheet, level: int = 3) -> str:
    """A table with its title and notes; it scrolls by itself where the screen is narrow."""
    head = ""
    if table.spans:
        kinds = [
            "span" if text else "text" if start in table.left else "" for text, _, start in _with_start(table.spans)
        ]
        cells = "".join(
            f'<th class="{kind}" colspan="{width}">{escape(text)}</th>'
            for (text, width), kind in zip(table.spans, kinds, strict=True)
        )
        head = f"<tr>{cells}</tr>"
    head += "<tr>" + "".join(_cell("th", text, i in table.left) for i, text in enumerate(table.header)) + "</tr>"
    rows = []
    for number, row in enumerate(table.rows):
        first = f'<th class="text" scope="row">{escape(row[0])}</th>'
        rest = "".join(_cell("td", text, i in table.left) for i, text in enumerate(row) if i)
        kind = ' class="strong"' if number in table.strong else ""
        rows.append(f"<tr{kind}>{first}{rest}</tr>")
    return (
        f"{heading(level, table.title)}\n"
        f'<div class="scroll" tabindex="0"><table><thead>{head}</thead><tbody>'
        + "".join(rows)
        + "</tbody></table></div>\n"
        + bullets(table.notes, "notes")
    )


def _with_start(spans: Sequence[tuple[str, int]]) -> list[tuple[str, int, int]]:
    result, start = [], 0
    for text, width in spans:
        result.append((text, width, start))
        start += width
    return result


def _cell(tag: str, text: str, left: bool) -> str:
    kind = ' class="text"' if left else ""
    return f"<{tag}{kind}>{escape(text)}</{tag}>"


def picture(png: Path, caption: str, width: float) -> str:
    """A picture inside the page. width: in inches; below two thirds of it, a narrow screen scrolls instead of
    shrinking it further."""
    data = base64.b64encode(png.read_bytes()).decode("ascii")
    size = f"max-width: {round(96 * width)}px; min-width: {round(min(96 * width, 56 * width))}px"
    return (
        f'<figure><div class="scroll" tabindex="0"><img alt="{escape(caption)}" style="{size}" '
        f'src="data:image/png;base64,{data}"></div><figcaption>{escape(caption)}</figcaption></figure>'
    )

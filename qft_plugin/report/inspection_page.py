"""The page of a dry run: one file in light and dark, without a script."""

from collections.abc import Sequence
from html import escape
from string import Template
from typing import Final

Rows = Sequence[Sequence[str]]
"""A table; its first row is its head."""

PAGE: Final = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --text: #1b1f24; --back: #ffffff; --line: #d0d7de; --soft: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e9ed; --back: #14171b; --line: #3a424b; --soft: #1e2329; }
}
body { margin: 0 auto; padding: 1rem; max-width: 75rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; }
th { background: var(--soft); white-space: nowrap; }
td:nth-child(2) { white-space: nowrap; }
li { margin: .4rem 0; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$headline</p>
$parts
</body>
</html>
""")


def page(
    title: str, headline: str, *, lists: Sequence[tuple[str, Sequence[str]]], tables: Sequence[tuple[str, Rows]]
) -> str:
    """Write one HTML page; every text in it is escaped.

    Args:
        title: of the page.
        headline: a sentence below it.
        lists: what is listed, each with a title.
        tables: what follows, each with a title.
    """
    parts = [f"<h2>{escape(name)}</h2>\n{_list(lines)}" for name, lines in lists]
    parts += [f"<h2>{escape(name)}</h2>\n{_table(name, rows)}" for name, rows in tables]
    return PAGE.substitute(title=escape(title), headline=escape(headline), parts="\n".join(parts))


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _table(title: str, rows: Rows) -> str:
    head, *body = rows
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in body)
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(title)}"><table><thead><tr>{heads}</tr>'
        f"</thead><tbody>\n{lines}</tbody></table></div>"
    )

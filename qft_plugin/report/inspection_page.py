"""The page of a dry run: one file in light and dark, without a script."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Final

Rows = Sequence[Sequence[str]]
"""A table; its first row is its head."""

STYLE: Final = Path(__file__).parent / "page" / "report.css"
"""Of the page of a report too."""

PAGE: Final = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light dark">
<title>QFT dry run: $title</title>
<link rel="icon" href="data:,">
<style>
$style
</style>
</head>
<body>
<header>
<p class="kicker">QFT dry run</p>
<h1>$title</h1>
</header>
<main>
<section><p class="verdict">$headline</p></section>
$parts
</main>
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
    parts = [_section(name, _list(lines)) for name, lines in lists]
    parts += [_section(name, _table(name, rows)) for name, rows in tables]
    style = STYLE.read_text(encoding="utf-8")
    return PAGE.substitute(title=escape(title), style=style, headline=escape(headline), parts="\n".join(parts))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>"


def _list(lines: Sequence[str]) -> str:
    return '<div class="note warn"><ul>' + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul></div>"


def _table(title: str, rows: Rows) -> str:
    head, *body = rows
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in body)
    region = f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(title)}">'
    return f'{region}<table class="words"><thead><tr>{heads}</tr></thead><tbody>\n{lines}</tbody></table></div>'

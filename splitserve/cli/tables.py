"""Tables on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

_WIDTH_OF_A_FILE = 160


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of text under a header, as wide as the terminal, or `_WIDTH_OF_A_FILE` without one."""
    from rich.console import Console
    from rich.table import Table

    width = None if sys.stdout.isatty() else _WIDTH_OF_A_FILE
    console = Console(
        width=width, markup=False, emoji=False, highlight=False
    )  # cells are plain text: no "[markup]", no ":emoji:"
    table = Table(*header, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same as a table in GitHub's Markdown."""
    lines = [list(header), ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

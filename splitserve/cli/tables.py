"""Tables on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

_WIDTH_OF_A_FILE = 160


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of text under a header, as wide as the terminal allows; as wide as they are where there is none."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE)
    table = Table(*header, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*row)
    console.print(table)

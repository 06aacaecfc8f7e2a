"""Tables, rendered by rich: as lines of plain text, on the terminal, and in markdown. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any


def text_table(columns: Mapping[str, str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table without rules, indented by two. columns: heading -> left or right; rows: cells, those at the
    end may be missing."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name, justify in columns.items():
        table.add_column(Text(name), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(width=4096, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return [f"  {line.rstrip()}" for line in captured.get().splitlines()]


def ruled_table(title: str, columns: Mapping[str, str]) -> Any:
    """A table of rich to fill and `show`. columns: heading -> left or right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name, justify in columns.items():
        table.add_column(name, justify=justify)
    return table


def print_rich(*parts: Any) -> None:
    """Print texts and tables of rich; where there is no terminal, at a width of 140."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)  # a pipe has no edge to wrap at
    for part in parts:
        console.print(part)


def markdown_table(head: Sequence[str], *rows: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def interval_text(interval: Sequence[float] | None, form: str = ".4f") -> str:
    """ "LOW to HIGH"; "-" where there is none."""
    return f"{interval[0]:{form}} to {interval[1]:{form}}" if interval else "-"

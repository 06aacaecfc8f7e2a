"""What a terminal is shown: progress bars, texts of others without control characters. Imports nothing of nanolab."""

import os
import sys
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

# A terminal obeys control characters, and a young model writes any byte: all but tab and line end are shown as U+FFFD.
CONTROL = {i: 0xFFFD for i in (*range(32), 127, *range(128, 160)) if chr(i) not in "\t\n"}


def harmless(text: str) -> str:
    """`text` with U+FFFD in place of every control character but tab and line end."""
    return text.translate(CONTROL)


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def progress(items: Iterable[T], description: str, total: float | None = None) -> Iterable[T]:
    """`items` with a progress bar on stderr when that is a terminal and this is rank 0; plain otherwise."""
    if not (is_main_process() and sys.stderr.isatty()):
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, description=description, total=total, console=Console(stderr=True), transient=True)

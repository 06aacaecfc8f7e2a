"""What a terminal may be shown of texts that others wrote: a model, an endpoint, a file. Imports nothing of nanolab."""

# A terminal obeys control characters, and a young model writes any byte: all but tab and line end are shown as U+FFFD.
CONTROL = {i: 0xFFFD for i in (*range(32), 127, *range(128, 160)) if chr(i) not in "\t\n"}


def harmless(text: str) -> str:
    """`text` with U+FFFD in place of every control character but tab and line end."""
    return text.translate(CONTROL)

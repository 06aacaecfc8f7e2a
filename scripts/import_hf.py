"""Make a GPT-2 of transformers a run: python -m scripts.import_hf DIR [--run NAME]. Evaluate, fine-tune, serve and
export it like any other.

A folder that export_hf wrote of a chat model becomes a chat model again.

The folder's tokenizer comes too; chat tokens that it lacks follow its last id, and their rows begin as the mean of all
others.
A text begins with <|endoftext|> where the tokenizer has that, as in GPT-2's own training. Dropout is off, as in the
gpt2 presets.
"""

import sys

from nanolab.cli import main, parse
from nanolab.interop.config import ImportConfig


def run(cfg: ImportConfig) -> int:
    from nanolab.interop.import_gpt2 import import_folder

    print(*import_folder(cfg), sep="\n")
    return 0


def arguments(argv: list[str]) -> list[str]:
    """The first word, if it is not a flag, is the folder."""
    return ["--folder", *argv] if argv and not argv[0].startswith("-") else argv


if __name__ == "__main__":
    main(lambda: run(parse(ImportConfig, arguments(sys.argv[1:]))))

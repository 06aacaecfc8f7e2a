"""Measure speed: python -m scripts.bench train|data|tokenizer|infer|eval --json (the last line of stdout is then one
JSON document).
"""

import sys

from nanolab.cli import as_json, main, parse
from nanolab.lab.config import BenchConfig
from scripts import GENERATING, spin


def run(cfg: BenchConfig) -> int:
    if cfg.what == "infer":
        spin(GENERATING)

    from nanolab.lab.bench import bench
    from nanolab.runtime import print0

    document = bench(cfg)
    if cfg.json:
        print0(as_json(document, "the result"))
    return 0


def arguments(argv: list[str]) -> list[str]:
    """The first word, if it is not a flag, says what to measure."""
    return ["--what", *argv] if argv and not argv[0].startswith("-") else argv


if __name__ == "__main__":
    main(lambda: run(parse(BenchConfig, arguments(sys.argv[1:]))))

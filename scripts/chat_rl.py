"""Improve a chat model by its own replies: python -m scripts.chat_rl --model NAME --task gsm8k (see --help for every
flag).
"""

from nanolab.cli import main, parse
from nanolab.stages.config import RLConfig


def run(cfg: RLConfig) -> int:
    from nanolab.stages.rl import rl

    rl(cfg)
    return 0


if __name__ == "__main__":
    main(lambda: run(parse(RLConfig)))

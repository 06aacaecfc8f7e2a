"""Fine-tune a model on conversations: python -m scripts.chat_sft --model NAME --tasks MIXTURE (see --help for every
flag).
"""

from nanolab.cli import main, parse
from nanolab.stages.config import SFTConfig


def run(cfg: SFTConfig) -> int:
    from nanolab.stages.sft import sft

    sft(cfg)
    return 0


if __name__ == "__main__":
    main(lambda: run(parse(SFTConfig)))

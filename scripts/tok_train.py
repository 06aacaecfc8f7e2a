"""Train the tokenizer: python -m scripts.tok_train --data pydocs --vocab-size 32768

Reads the training documents in file order (a mixture in proportion to its weights) and writes <folder>/tokenizer.json.
"""

from nanolab.cli import main, parse
from nanolab.data.config import TokTrainConfig


def run(cfg: TokTrainConfig) -> int:
    from nanolab.data.tokenizer_training import train_tokenizer

    train_tokenizer(cfg)
    return 0


if __name__ == "__main__":
    main(lambda: run(parse(TokTrainConfig)))

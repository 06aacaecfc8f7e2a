"""Pretrain a base model: python -m scripts.base_train --depth 4 --run NAME (see --help for every flag)."""

from nanolab.cli import main, parse
from nanolab.stages.config import BaseTrainConfig


def run(cfg: BaseTrainConfig) -> int:
    from nanolab.stages.pretrain import pretrain

    pretrain(cfg)
    return 0


if __name__ == "__main__":
    main(lambda: run(parse(BaseTrainConfig)))

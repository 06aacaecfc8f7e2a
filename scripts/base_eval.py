"""Evaluate a base model: python -m scripts.base_eval [--model NAME | --hf FOLDER] [--modes
bpb,sample,core,hellaswag,lambada].

bpb: bits per byte on training and validation text (--no-train-text: on the latter alone), by source where there are
several, beside compressors on the same validation text. sample: what it writes. core: 22 in-context tasks of the
evaluation bundle (--eval-bundle); hellaswag, lambada: these two by themselves. --max-per-task N takes N items of each
task. Results go to eval_base.json and eval_base.csv in the run directory. --all-checkpoints evaluates every checkpoint
once and draws the curves. Exit code 1: something could not be had."""

from nanolab.cli import main, parse
from nanolab.evals.config import BaseEvalConfig


def run(cfg: BaseEvalConfig) -> int:
    from nanolab.lab.evaluate_base import evaluate_base

    return evaluate_base(cfg)


if __name__ == "__main__":
    main(lambda: run(parse(BaseEvalConfig)))

"""Evaluate a base model: python -m scripts.base_eval [--model NAME | --hf FOLDER] [--modes
bpb,sample,core,hellaswag,lambada].

bpb: bits per byte on training and validation text (--no-train-text: on the latter alone), by source where there are
several, beside compressors on the same validation text. sample: what it writes. core: 22 in-context tasks of the
evaluation bundle (--eval-bundle); hellaswag, lambada: these two by themselves. --max-per-task N takes N items of each
task. Results go to eval_base.json and eval_base.csv in the run directory. --all-checkpoints evaluates every checkpoint
once and draws the curves. Exit code 1: something could not be had."""

from nanolab.cli import UserError, check_bounds, main, nearest, parse
from nanolab.evals.config import BaseEvalConfig
from nanolab.evals.modes import MODES


def run(cfg: BaseEvalConfig) -> int:
    modes = [mode.strip() for mode in cfg.modes.split(",") if mode.strip()]
    for mode in modes:
        if mode not in MODES:
            raise UserError(
                f"mode {mode!r} is unknown; expected one or more of"
                f" {', '.join(MODES)}{nearest(mode, list(MODES), prefix='--modes ')}"
            )
    if cfg.hf and (cfg.model or cfg.all_checkpoints):
        raise UserError(
            f"--hf {cfg.hf} with {'--all-checkpoints' if cfg.all_checkpoints else f'--model {cfg.model}'}; expected one"
            " of them; leave one out"
        )
    check_bounds(type(cfg), vars(cfg))
    from nanolab import runtime
    from nanolab.lab.evaluate_base import evaluate_checkpoints, evaluate_model
    from nanolab.lab.suite import Suite

    rt = runtime.start(cfg.device_type, seed=cfg.seed)
    try:
        suite = Suite(cfg, modes, rt)
        return (
            evaluate_checkpoints(cfg, modes, suite, rt)
            if cfg.all_checkpoints
            else evaluate_model(cfg, modes, suite, rt)
        )
    finally:
        rt.close()


if __name__ == "__main__":
    main(lambda: run(parse(BaseEvalConfig)))

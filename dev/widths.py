"""Do activations keep their size as a model gets wider? python dev/widths.py [--widths 64,128,256] [base_train's flags]

The coordinate check of Yang et al., Tensor Programs V, arXiv 2203.03466, appendix D.1: the same few steps, at the rates
that the recipe gives each width, and the mean absolute value of each layer's output after 0, 1, ... steps. Where the
parametrisation carries rates from width to width, sizes after a step do not depend on the width: their exponent in it,
the slope of log size over log width, is near 0. All steps are on one batch of uniformly random tokens, without warm-up.
Writes widths.svg (with matplotlib); the last line is one JSON document."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from nanolab import runtime
from nanolab.cli import UserError, main, parse
from nanolab.evals.curve import draw
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime
from nanolab.stages.config import BaseTrainConfig
from nanolab.tables import text_table
from nanolab.training.fit import update
from nanolab.training.optim import MuonAdamW
from nanolab.training.recipes import param_groups
from nanolab.training.schedule import make_plan

FLAGS = "--depth 4 --head-dim 32 --max-seq-len 128 --device-batch-size 8 --total-batch-size 8192 --num-iterations 1000"
Sizes = dict[str, list[float]]  # activation -> mean |x| after 0, 1, ... steps


def sizes(cfg: BaseTrainConfig, width: int, steps: int, vocab_size: int, rt: Runtime) -> Sizes:
    """Of the model of these flags at `width`. Raises UserError for a width that the depth does not divide."""
    cfg = replace(cfg, aspect_ratio=width // cfg.depth)
    plan = replace(make_plan(cfg, vocab_size, 1, bos=0), warmup_steps=0)
    if plan.model.n_embd != width:
        raise UserError(
            f"width {width} is not made of depth {cfg.depth} and heads of {cfg.head_dim}; expected a multiple of both;"
            f" try {math.lcm(cfg.depth, cfg.head_dim)}",
            "width",
            width=width,
        )
    with torch.device(rt.device):
        model = GPT(plan.model, rt.dtype)
    model.init_weights(cfg.seed)
    optimizer = MuonAdamW(param_groups(model, cfg, plan), rt)
    for group in optimizer.groups:
        group["initial_weight_decay"] = group["weight_decay"]
    tokens = np.random.default_rng(cfg.seed).integers(0, vocab_size, (cfg.device_batch_size, cfg.max_seq_len + 1))
    ids = torch.from_numpy(tokens).to(rt.device)
    found: Sizes = {}

    def keep(name: str, x: torch.Tensor) -> None:
        found.setdefault(name, []).append(x.detach().float().abs().mean().item())

    for step in range(steps + 1):
        watched = {"embedding": model.norm_e}
        for i, block in enumerate(model.h):
            watched |= {f"attention {i}": block.attn, f"mlp {i}": block.mlp, f"stream {i}": block}
        hooks = [m.register_forward_hook(lambda _, __, y, name=name: keep(name, y)) for name, m in watched.items()]
        with torch.no_grad():
            keep("logits", model(ids[:, :-1]))
        for hook in hooks:
            hook.remove()
        model(ids[:, :-1], ids[:, 1:]).backward()
        update(optimizer, plan, None, step, 0.0, norm_wanted=False)
    return found


def exponents(by_width: dict[int, Sizes], step: int) -> dict[str, float | None]:
    """The slope of log size over log width after so many steps; None where a size is 0."""
    logs = np.log(list(by_width))
    of = {name: [found[name][step] for found in by_width.values()] for name in next(iter(by_width.values()))}
    return {name: float(np.polyfit(logs, np.log(row), 1)[0]) if min(row) > 0 else None for name, row in of.items()}


def check(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="64,128,256", help="multiples of depth and head size, joined by commas")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps")
    parser.add_argument("--vocab-size", type=int, default=1024, help="tokens of the vocabulary")
    parser.add_argument("--out", default="widths.svg", help="file of the picture, .svg or .png")
    args, flags = parser.parse_known_args(argv)
    cfg, widths = parse(BaseTrainConfig, [*FLAGS.split(), *flags]), sorted(map(int, args.widths.split(",")))
    rt = runtime.start(cfg.device_type, seed=cfg.seed, threads=cfg.threads)
    by_width = {width: sizes(cfg, width, args.steps, args.vocab_size, rt) for width in widths}
    first, last = (exponents(by_width, step) for step in (0, args.steps))
    rows = [
        [name, *(f"{found[name][-1]:.4g}" for found in by_width.values()), *map(signed, (first[name], last[name]))]
        for name in last
    ]
    columns = [
        "mean |x|",
        *(f"width {width}" for width in widths),
        "exponent at the start",
        f"after {args.steps} steps",
    ]
    print(*text_table(dict.fromkeys(columns, "right") | {columns[0]: "left"}, rows), sep="\n")
    streams = [name for name in last if name.startswith("stream") or name == "logits"]
    curves = {name: [(float(w), found[name][-1], None, None) for w, found in by_width.items()] for name in streams}
    title = f"Size of activations after {args.steps} steps: {' '.join(flags) or 'defaults'}"
    print(f"written: {draw(curves, Path(args.out), ylabel='mean |x|', title=title, xlabel='width')}")
    print(json.dumps({"widths": widths, "sizes": by_width, "exponents": {"start": first, "end": last}}))
    return 0


def signed(x: float | None) -> str:
    return "-" if x is None else f"{x:+.3f}"


if __name__ == "__main__":
    main(check)

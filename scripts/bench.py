"""Measure speed: python -m scripts.bench train|data|tokenizer|infer|eval --json (the last line of stdout is then one
JSON document).
"""

import sys

from nanolab.cli import UserError, as_json, main, parse, to_json
from nanolab.lab.config import BenchConfig
from scripts import GENERATING, spin

WHAT = ("train", "data", "tokenizer", "infer", "eval")


def run(cfg: BenchConfig) -> int:
    if cfg.what not in WHAT:
        raise UserError(
            f"bench {cfg.what!r} is unknown; expected one of {', '.join(WHAT)}; try python -m scripts.bench train"
        )
    if cfg.repeats < 1 or cfg.steps < 1:
        raise UserError(
            f"--repeats {cfg.repeats} and --steps {cfg.steps}: expected at least 1 of each; try --repeats 5 --steps 5"
        )
    if cfg.what == "infer":
        spin(GENERATING)

    from nanolab import runtime
    from nanolab.lab import bench, bench_eval, bench_infer
    from nanolab.records.environment import environment

    measure = {
        "train": bench.bench_train,
        "data": bench.data,
        "tokenizer": bench.tokenizer,
        "infer": bench_infer.infer,
        "eval": bench_eval.examples,
    }[cfg.what]
    rt = runtime.start(cfg.device_type, "", cfg.seed, cfg.threads, cfg.deterministic)
    try:
        document = {"bench": cfg.what, **measure(cfg, rt), "config": to_json(cfg), "env": environment(rt)}
        if "kernel" in document:
            runtime.print0(f"{cfg.what:9s} attention kernel         {document['kernel']}")
        for name, result in document["results"].items():
            low, high = min(result["samples"]), max(result["samples"])
            spread = (
                f"  (lowest {low:g}, highest {high:g}, n = {len(result['samples'])})"
                if len(result["samples"]) > 1
                else ""
            )
            runtime.print0(f"{cfg.what:9s} {name:24s} {result['median']:>12g} {result['unit']}{spread}")
        if cfg.json:
            runtime.print0(as_json(document, "the result"))
    finally:
        rt.close()
    return 0


def arguments(argv: list[str]) -> list[str]:
    """The first word, if it is not a flag, says what to measure."""
    return ["--what", *argv] if argv and not argv[0].startswith("-") else argv


if __name__ == "__main__":
    main(lambda: run(parse(BenchConfig, arguments(sys.argv[1:]))))

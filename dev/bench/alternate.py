"""Compare two checkouts in turn: python dev/bench/alternate.py --what step --rounds 60 BASE_CHECKOUT NOW_CHECKOUT FLAGS

Both checkouts stay loaded in a process of their own and take turns, one sample each, so that what else the machine does
hits both alike; the order turns round after every round. paired.py compares whole processes and needs many more minutes
for the same precision. A sample is, by --what:

    step     a training step: forward, backward, optimizer
    decode   one row's decoding steps after its prompt
    clients  a crowd of rows from the first prompt to the last token
    eval     a pass over in-context examples of every type of task, scored

A ratio is NOW over BASE, of wall time and of CPU time. The interval is a bootstrap of the median. The last line of
output is one JSON document.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from paired import interval

WORKER = """
import importlib, json, sys, time
from dataclasses import fields

def find(name, *modules):
    for module in modules:
        module, _, former = module.partition(":")
        try:
            return getattr(importlib.import_module("nanolab." + module), former or name)
        except (ModuleNotFoundError, AttributeError):
            pass
    raise SystemExit(f"{name} is in none of {modules}")

what, argv = sys.argv[1], sys.argv[2:]
BenchConfig = find("BenchConfig", "lab.config", "config")
cfg = find("parse", "cli", "config")(BenchConfig, argv)
import torch
runtime = find("start", "runtime")("cpu", "", cfg.seed, cfg.threads)
if what == "step":
    BaseTrainConfig = find("BaseTrainConfig", "stages.pretrain", "training.config", "config")
    names = {f.name for f in fields(BaseTrainConfig)}
    B, T = cfg.device_batch_size, cfg.max_seq_len
    shared = {f.name: getattr(cfg, f.name) for f in fields(BenchConfig) if f.name in names}
    flags = BaseTrainConfig(**shared | {"total_batch_size": B * T, "num_iterations": 1})
    plan = find("make_plan", "training.schedule")(flags, cfg.vocab_size, 1, bos=0)
    model = find("GPT", "model.gpt")(plan.model, runtime.dtype, cfg.attn_kernel)
    model.init_weights(cfg.seed)
    groups = find("param_groups", "training.recipes")(model, flags, plan)
    optimizer = find("MuonAdamW", "training.optim")(groups, runtime)
    ids = torch.randint(0, cfg.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(cfg.seed))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    def sample():
        loss = model(inputs, targets, reduction="sum") / targets.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
elif what == "eval":
    bench, likelihood = (importlib.import_module("nanolab." + name) for name in ("lab.bench_eval", "evals.likelihood"))
    model, _ = bench.the_model(cfg, runtime)
    prepared = find("prepare_for_inference", "inference.prepare", "inference.served:served")(model)
    reader, kinds = likelihood.GPTReader(prepared, runtime), {}
    for kind, group in bench.synthetic(cfg, model.config.vocab_size):
        kinds.setdefault(kind, []).append(group)
    def sample():
        for groups in kinds.values():
            likelihood.score(reader, groups)
else:
    bench = importlib.import_module("nanolab.lab.bench_infer")
    model, tokenizer = bench.the_model(cfg, runtime)
    prepared = find("prepare_for_inference", "inference.prepare", "inference.served:served")(model)
    prompts = bench.Prompts(model.config.vocab_size, cfg.seed)
    engine = bench.new_engine(prepared, tokenizer, runtime, 1 if what == "decode" else 16)
    if what == "decode":
        def sample():
            engine.add(prompts.request(cfg.prompt_tokens, cfg.decode_tokens))
            list(engine.step())
            start()
            while not engine.idle:
                list(engine.step())
    else:
        def sample():
            bench.timed(engine, prompts.crowd(cfg), 2)

clock = [0.0, 0.0]
def start():
    clock[:] = time.perf_counter(), time.process_time()

print("ready", flush=True)
for _ in sys.stdin:
    start()
    sample()
    print(json.dumps([time.perf_counter() - clock[0], time.process_time() - clock[1]]), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("step", "decode", "clients", "eval"), default="step")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("base", type=Path)
    parser.add_argument("now", type=Path)
    args, flags = parser.parse_known_args()
    kind = {"step": "train", "eval": "eval"}.get(args.what, "infer")
    workers = {}
    for name in ("base", "now"):
        checkout = getattr(args, name).resolve()
        workers[name] = subprocess.Popen(
            [sys.executable, "-c", WORKER, args.what, "--what", kind, *flags],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": str(checkout), "OMP_WAIT_POLICY": "passive"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        while (line := workers[name].stdout.readline()) != "ready\n":
            if not line:
                raise SystemExit(f"{name} ended before its first sample")

    def sample(name: str) -> list[float]:
        print("go", file=workers[name].stdin, flush=True)
        return json.loads(workers[name].stdout.readline())

    for name in workers:
        sample(name)  # the first one does not count
    samples = {name: [] for name in workers}
    for i in range(args.rounds):
        for name in list(workers)[:: 1 if i % 2 == 0 else -1]:
            samples[name].append(sample(name))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    ratios = {}
    for k, clock in enumerate(("wall", "cpu")):
        each = [now[k] / base[k] for base, now in zip(samples["base"], samples["now"])]
        low, high = interval(each)
        ratios[clock] = {"median": statistics.median(each), "low": low, "high": high}
        middle = {name: round(1000 * statistics.median(one[k] for one in of), 1) for name, of in samples.items()}
        print(f"{clock:4s} {statistics.median(each):.4f} [{low:.4f}, {high:.4f}] of {len(each)} rounds; ms: {middle}")
    print(json.dumps({"what": args.what, "rounds": args.rounds, "flags": flags, "ratios": ratios, "samples": samples}))


if __name__ == "__main__":
    main()

"""What made alternating-cpu-time.txt: single training steps of several checkouts or flag sets in turn, in one process,
one thread, CPU time.

OMP_NUM_THREADS=1 python alternating_cpu_time.py ARMS N, ARMS a JSON object name -> [checkout, flags of BenchConfig].
Written for the spine (5bea8c6), which has no recipes, beside later commits."""

import dataclasses
import importlib
import json
import random
import statistics
import sys
import time


def load(path):
    for m in [m for m in sys.modules if m == "nanolab" or m.startswith("nanolab.")]:
        del sys.modules[m]
    sys.path.insert(0, path)

    mods = {m: sys.modules[m] for m in sys.modules if m.startswith("nanolab")}
    sys.path.pop(0)
    return mods


def stepper(path, **over):
    mods = load(path)
    cfgm = mods["nanolab.config"]
    rt = mods["nanolab.runtime"]
    import torch

    runtime = rt.start("cpu", "bfloat16", 42, 1)
    cfg = cfgm.BenchConfig(**over)
    B, T = cfg.device_batch_size, cfg.max_seq_len

    sched = importlib.import_module("nanolab.training.schedule")
    gpt = importlib.import_module("nanolab.model.gpt")
    opt = importlib.import_module("nanolab.training.optim")
    keep = {k: v for k, v in over.items() if k in {f.name for f in dataclasses.fields(cfgm.BaseTrainConfig)}}
    keep.setdefault("depth", cfg.depth)
    keep.setdefault("max_seq_len", T)
    keep.setdefault("device_batch_size", B)
    flags = cfgm.BaseTrainConfig(**keep, total_batch_size=B * T, num_iterations=1)
    plan = sched.make_plan(flags, 8192, 1)
    model = gpt.GPT(plan.model, torch.bfloat16)
    model.init_weights(42)
    try:
        rec = importlib.import_module("nanolab.training.recipes")
        groups = rec.param_groups(model, flags, plan)
    except ModuleNotFoundError:
        groups = model.param_groups(
            embedding_lr=flags.embedding_lr,
            unembedding_lr=flags.unembedding_lr,
            matrix_lr=flags.matrix_lr,
            scalar_lr=flags.scalar_lr,
            weight_decay=plan.weight_decay,
            batch_scale=plan.batch_scale,
        )
    o = opt.MuonAdamW(groups, runtime)
    ids = torch.randint(0, 8192, (B, T + 1), generator=torch.Generator().manual_seed(1))
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step():
        t = time.process_time()
        loss = model(x, y, reduction="sum") / y.numel()
        loss.backward()
        o.step()
        o.zero_grad()
        return (time.process_time() - t) * 1e3

    return step


arms = json.loads(sys.argv[1])
n = int(sys.argv[2])
steps = {a: stepper(p, **o) for a, (p, o) in arms.items()}
names = list(arms)
for a in names:
    for _ in range(3):
        steps[a]()
T = {a: [] for a in names}
for i in range(n):
    for a in names if i % 2 == 0 else names[::-1]:
        T[a].append(steps[a]())
base = names[0]


def q(x, p):
    x = sorted(x)
    return x[int(p * (len(x) - 1))]


print({a: (round(min(T[a]), 1), round(statistics.median(T[a]), 1)) for a in names}, "min, median ms, n", n)
for a in names[1:]:
    r = [y / x for x, y in zip(T[base], T[a])]
    bs = [statistics.median(random.Random(k).choices(r, k=len(r))) for k in range(2000)]
    print(
        f"{a}/{base}: median of paired ratios {statistics.median(r):.4f} [{q(bs, 0.025):.4f}, {q(bs, 0.975):.4f}]"
        f" quartiles {q(r, 0.25):.3f} {q(r, 0.75):.3f}; ratio of minima {min(T[a]) / min(T[base]):.4f}"
    )

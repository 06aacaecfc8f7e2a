"""A base model made in a second: a run directory of pretraining, as scripts.base_train leaves it, for what starts from
one.
"""

import random
from pathlib import Path

import torch

from nanolab.data.corpus import open_data
from nanolab.data.packing import PackedBatches
from nanolab.data.tokenizer import Tokenizer
from nanolab.model.gpt import GPT
from nanolab.records.run import Run
from nanolab.runtime import Runtime
from nanolab.stages.config import BaseTrainConfig
from nanolab.training.fit import Every, fit
from nanolab.training.optim import MuonAdamW
from nanolab.training.recipes import param_groups
from nanolab.training.schedule import make_plan

WORDS = (
    "the a fox crow grapes cheese saw took sour sweet and said that it was not hers at all three four times plus"
    " what is".split()
)


def write_text(folder: Path) -> Path:
    """A folder of 60 short documents."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(60):
        (folder / f"{i}.txt").write_text(" ".join(rng.choices(WORDS, k=rng.choice([5, 20, 60]))) + ".")
    return folder


def pretrain(name: str, text: Path, runtime: Runtime, **flags) -> BaseTrainConfig:
    """Train a model of two layers for a few steps on the documents in `text`; its rates and batch are those of
    `flags`.
    """
    cfg = BaseTrainConfig(
        **{
            "run": name,
            "data_dir": str(text),
            "depth": 2,
            "aspect_ratio": 32,
            "head_dim": 32,
            "max_seq_len": 64,
            "device_batch_size": 4,
            "total_batch_size": 512,
            "num_iterations": 4,
            "warmup_steps": 2,
            "lr_scale": 0.1,
            "eval_every": -1,
        }
        | flags
    )
    run = Run.start(name, cfg, runtime)
    tokenizer = run.pin_tokenizer(lambda: Tokenizer.train((p.read_text() for p in sorted(text.glob("*.txt"))), 300))
    plan, data = make_plan(cfg, tokenizer.vocab_size, runtime.world_size, tokenizer.bos), open_data(cfg, cfg.seed)
    run.identify(data_fingerprint=data.fingerprint, val_fingerprint=data.val_fingerprint)
    model = GPT(plan.model, runtime.dtype)
    model.init_weights(cfg.seed)
    batches = PackedBatches(
        data.train,
        tokenizer,
        seq_len=cfg.max_seq_len,
        device_batch_size=cfg.device_batch_size,
        rows_per_step=plan.rows_per_step,
    )
    optimizer = MuonAdamW(param_groups(model, cfg, plan), runtime)
    torch.manual_seed(cfg.seed)
    fit(run, model, optimizer, batches, plan, every=Every(log=-1))
    return cfg

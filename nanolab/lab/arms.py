"""What an arm's runs will do and stand on, found out before any is made: a function for each stage.

Each gives tokens and steps (None where the clock decides), parameters, seconds (None where unknown), bytes, and the
FINGERPRINTS of what decides a result and is no flag. metric: what the study compares, of which "validation" is what it
is measured on. Raises UserError for what the run itself would refuse."""

from typing import Any

import torch

from nanolab.cli import to_json
from nanolab.data.config import DataConfig
from nanolab.data.corpus import open_data
from nanolab.data.kept import Pinned
from nanolab.data.tokenizer import Tokenizer
from nanolab.lab.results import hash_of
from nanolab.model.accounting import n_params, peak_bytes, train_memory
from nanolab.model.gpt import GPT
from nanolab.records.models import find_model, read_json
from nanolab.runtime import Runtime, base_dir
from nanolab.stages.base_run import BaseRun, check_rates
from nanolab.stages.config import BaseTrainConfig, FineTuneFlags, RLConfig, SFTConfig
from nanolab.stages.pretrain import kernels
from nanolab.stages.pretrain_plan import expected_time, planned_memory
from nanolab.training.optim import MuonAdamW
from nanolab.training.recipes import param_groups
from nanolab.training.schedule import Plan, make_plan

FINGERPRINTS = ("tokenizer", "data", "validation", "model")  # validation: all arms of a study have the same
Facts = dict[str, Any]
Opened = dict[Any, Any]  # what arms have in common, opened once


def pretrain_facts(cfg: BaseTrainConfig, rt: Runtime, opened: Opened, metric: str) -> Facts:
    kernels(cfg, rt)
    texts = tuple(getattr(cfg, name) for name in ("tokenizer", *DataConfig.__dataclass_fields__))
    if texts not in opened:
        opened[texts] = Tokenizer.load(cfg.tokenizer or base_dir() / "tokenizer"), open_data(cfg)
    tokenizer, data = opened[texts]
    plan, kind = make_plan(cfg, tokenizer.vocab_size, 1, tokenizer.bos), rt.device.type
    return {
        **planned(plan),
        "step_flops": plan.flops_per_token * plan.total_batch_size,
        "seconds": expected_time(plan, kind, rt.device_name, rt.dtype_name, cfg.activation_checkpointing)[0],
        "bytes": peak_bytes(planned_memory(cfg, plan, kind, rt.dtype_name)),
        "tokenizer": tokenizer.hash,
        "data": data.fingerprint,
        "validation": hash_of([data.val_fingerprint, cfg.eval_tokens]),
    }


def planned(plan: Plan) -> Facts:
    return {"tokens": plan.tokens, "steps": plan.num_iterations, "parameters": n_params(plan.model)["total"]}


def fine_tune_facts(cfg: FineTuneFlags, rt: Runtime, base: BaseRun, plan: Plan) -> Facts:
    """Of SFT and RL alike. bytes: of rows as long as pretraining's."""
    with torch.device("meta"):
        model = GPT(plan.model, rt.dtype)
    memory = train_memory(
        plan.model,
        plan.device_batch_size,
        rt.dtype.itemsize,
        rt.device.type,
        activation_checkpointing=cfg.activation_checkpointing,
        optimizer=MuonAdamW(param_groups(model, base.rates(cfg), plan), rt).memory(),
    )
    return {**planned(plan), "bytes": peak_bytes(memory)}


def start_of(cfg: FineTuneFlags, kind: str, opened: Opened) -> tuple[BaseRun, Tokenizer, Pinned, Facts]:
    """What --model names. The fingerprint is of all files of its checkpoint."""
    if cfg.model not in opened:
        found = find_model(cfg.model, kind)
        tokenizer = Tokenizer.load(found.run_dir / "tokenizer", checked=True)
        files = read_json(found.checkpoint / "manifest.json")["files"]
        facts = {"tokenizer": tokenizer.hash, "model": hash_of(files)}
        opened[cfg.model] = found, (BaseRun.found(found), tokenizer, Pinned.of(found.run_dir), facts)
    found, start = opened[cfg.model]
    if kind == "sft":
        from nanolab.stages.rl import check_talks

        check_talks(found)
    return start


def sft_facts(cfg: SFTConfig, rt: Runtime, opened: Opened, metric: str) -> Facts:
    """tokens: of all rows, padding included."""
    from nanolab.stages.rl import task_fingerprint
    from nanolab.stages.sft import prepare
    from tasks import mixture

    base, tokenizer, pinned, facts = start_of(cfg, "base", opened)
    parts, plan, text, versions = prepare(cfg, base, tokenizer, rt, pinned)
    if metric.startswith("chatcore/"):
        asked = [cfg.chatcore_tasks, cfg.chatcore_max_cat, cfg.chatcore_max_sample]
    elif metric == "val/bpb":
        asked = [text and text.val_fingerprint, plan.seq_len, cfg.eval_tokens]
    else:
        held_out = [mixture(part.stage.tasks, "test", cfg.data, seed=cfg.seed, versions=versions) for part in parts]
        asked = [*map(task_fingerprint, held_out), plan.seq_len, cfg.eval_tokens]
    speed, read = base.tokens_per_second, [[to_json(part.stage), part.batches.survey.fingerprint] for part in parts]
    return {
        **fine_tune_facts(cfg, rt, base, plan),
        **facts,
        "seconds": plan.tokens / speed if speed else None,
        "data": hash_of([read, text.fingerprint if text else ""]),
        "validation": hash_of(asked),
    }


def rl_facts(cfg: RLConfig, rt: Runtime, opened: Opened, metric: str) -> Facts:
    """tokens: at most, since nobody knows how long replies will be."""
    from nanolab.stages.reward import reward_parts
    from nanolab.stages.rl import make_rl_plan, open_goal, task_fingerprint

    base, _, _, facts = start_of(cfg, "sft", opened)
    check_rates(cfg, base)
    goal = open_goal(cfg)
    first = goal.task.example(0)
    reward_parts(cfg.reward, list(goal.task.rewards(first, first.messages[-1]["content"])))
    asked = task_fingerprint(goal.held_out) if goal.held_out is not None else ""
    return {
        **fine_tune_facts(cfg, rt, base, make_rl_plan(cfg, base, len(goal.task), 1)),
        **facts,
        "seconds": None,
        "data": task_fingerprint(goal.task, len(goal.task)),
        "validation": hash_of([asked, cfg.eval_samples, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.tool]),
    }


FACTS = {"pretrain": pretrain_facts, "sft": sft_facts, "rl": rl_facts}

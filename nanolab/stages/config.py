"""Flags of the three stages of training: pretraining, fine-tuning, reinforcement learning. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated

from nanolab.cli import (
    Bounds,
    Condition,
    Count,
    CountOrAuto,
    NonNegativeFloat,
    NonNegativeInt,
    NonNegativeOrAuto,
    OneOf,
    PositiveFloat,
    PositiveOrAuto,
    Seed,
    Share,
    ShareBelow1,
    at_least,
)
from nanolab.data.config import DataConfig
from nanolab.evals.probes import ProbeFlags
from nanolab.training.config import READ_BY_RECIPE, TrainingFlags

Keep = Annotated[str, OneOf(("all",), count=True)]
Wandb = Annotated[str, OneOf(("off", "offline", "online"))]


def periodic(flags: str, by: str, probe: str = "") -> Condition:
    """Flags that are read where a cadence is a number of steps, or by a probe."""
    needs = f"--{by.replace('_', '-')} with a number of steps" + f", or --probes {probe}" * bool(probe)
    return Condition(flags, by, lambda c: getattr(c, by) > 0 or bool(probe) and probe in c.probes, needs)


@dataclass(frozen=True)
class RunFlags:
    """The run, its machine and its records: flags of every stage."""

    # run directory under <base>/runs/; default: d<depth> or the preset's name, of fine-tuning NAME-sft or NAME-rl
    run: str = ""
    resume: bool = False  # continue from the newest valid checkpoint of --run
    dry_run: bool = False  # print the plan and stop
    device_type: str = ""  # cuda | mps | cpu; default: the best there is
    threads: NonNegativeInt = 0  # CPU threads; 0: all
    seed: Seed = 42  # governs everything random
    # keep only the input of each layer for the backward pass, compute the rest again: less memory, a third slower
    activation_checkpointing: bool = False
    save_every: CountOrAuto = 1000  # steps between checkpoints; one is always written at the end; -1: off
    keep: Keep = "2"  # checkpoints kept beside the best: a number, or all
    log_every: CountOrAuto = 1  # steps between lines of metrics; -1: off
    log_grad_norm: bool = False  # log the L2 norm of all gradients together
    wandb: Wandb = "off"  # online | offline | off
    trackio: bool = False  # metrics to trackio too, a dashboard on this machine; type pip install trackio first

    CONDITIONS = [
        periodic("log_grad_norm", "log_every"),
        Condition("wandb", "run", lambda c: c.run != "dummy", "another --run: dummy is the name of runs without wandb"),
    ]


@dataclass(frozen=True)
class FineTuneFlags(RunFlags):
    """What a stage after pretraining starts from, and what it changes of pretraining's rates."""

    # NAME[@STEP|best] to start from; default: the newest finished base run, in chat_rl the newest sft run
    model: str = ""
    data: str = ""  # local folder of the tasks' files; default: the hub
    num_iterations: CountOrAuto = -1  # optimizer steps; -1: by the number of epochs
    # run code that a model writes even where the sandbox lacks landlock or seccomp: it can then do what you can
    allow_unsandboxed: bool = False
    # optimization; rates are scaled by the batch as in pretraining
    embedding_lr: NonNegativeOrAuto = -1.0  # learning rate of embedding tables, of dial; -1: as in pretraining
    unembedding_lr: NonNegativeOrAuto = -1.0  # learning rate of the head, of dial; -1: as in pretraining
    matrix_lr: NonNegativeOrAuto = -1.0  # learning rate of matrices, of dial; -1: as in pretraining
    learning_rate: NonNegativeOrAuto = -1.0  # learning rate of adamw_cosine and adam_constant; -1: as in pretraining
    init_lr_frac: PositiveFloat = 0.8  # multiplies every learning rate
    warmdown_ratio: Share = 0.5  # share of the stage, at its end, over which the rates fall
    final_lr_frac: Share = 0.0  # share of the peak rates that is left at the end
    grad_clip: PositiveOrAuto = -1.0  # largest L2 norm of all gradients together; -1: off

    BY_RECIPE = READ_BY_RECIPE
    CONDITIONS = [
        Condition("final_lr_frac", "warmdown_ratio", lambda c: c.warmdown_ratio > 0, "--warmdown-ratio above 0")
    ]


@dataclass(frozen=True)
class BaseTrainConfig(RunFlags, TrainingFlags, DataConfig, ProbeFlags):
    """Pretrain a model: set --depth, and the rest follows."""

    plan_for: str = ""  # with --dry-run: pretend this hardware, for example 8xH100
    # folder of tokenizer.json (or vocab.json + merges.txt); default: tokenizer/ in the base directory
    tokenizer: str = ""
    eval_every: CountOrAuto = 250  # steps between measurements of validation bits per byte; -1: off
    eval_tokens: CountOrAuto = -1  # validation tokens at most; -1: 80 x 524288 on a GPU, 524288 on a CPU
    eval_first: bool = True  # measure validation bits per byte before the first step too
    # steps between measurements of CORE, which is also measured at the end; -1: off
    core_metric_every: CountOrAuto = -1
    core_metric_max_per_task: CountOrAuto = 500  # items of each task of CORE at most, drawn by a fixed seed; -1: all
    # folder of CORE's tasks; default: eval_bundle in the base directory, downloaded if it is not there
    eval_bundle: str = ""
    sample_every: CountOrAuto = 2000  # steps between texts that the model writes; -1: off
    # eager | sdpa | banded | flex | fa3; default: the fastest that each layer can use on the device
    attn_kernel: str = ""
    fp8: bool = False  # matrix multiplications in 8-bit floats
    # on a GPU: only algorithms that give the same numbers each time, which are slower; a CPU has no others
    deterministic: bool = False
    profile: bool = False  # write a trace of five steps, for a browser, into the run's folder

    GROUPS = {
        "": "run depth data_dir tokenizer max_seq_len device_batch_size num_iterations max_seconds resume dry_run",
        "data": "DataConfig",
        "model": "ModelFlags Architecture",
        "training": "TrainingFlags",
        "evaluation": (
            "eval_every eval_tokens eval_first core_metric_every core_metric_max_per_task eval_bundle sample_every"
            " ProbeFlags"
        ),
        "run": "RunFlags BaseTrainConfig",
    }
    CONDITIONS = [
        Condition("plan_for", "dry_run", lambda c: c.dry_run, "--dry-run"),
        Condition("profile", "dry_run", lambda c: not c.dry_run, "one of the two: a dry run makes no step"),
        Condition("device_type", "plan_for", lambda c: not c.plan_for, "one of the two"),
        periodic("eval_tokens eval_first", "eval_every"),
        periodic("core_metric_max_per_task eval_bundle", "core_metric_every", probe="gold"),
        Condition("probe_tokens", "probes", lambda c: bool(c.probes), "--probes"),
    ]


@dataclass(frozen=True)
class SFTConfig(FineTuneFlags):
    """Fine-tune a model on conversations, so that it answers."""

    tasks: str = (  # a mixture: tasks with the number of times each example comes (tasks/__init__.py)
        "smoltalk:1,mmlu:3,gsm8k:4,spelling:1,spellingbee:1"
    )
    # TOML file with [[stage]] tables (name, tasks, epochs, num_iterations, init_lr_frac, replay); flags are the
    # defaults of their fields
    stages: str = ""
    replay: ShareBelow1 = 0.0  # share of the rows that is pretraining text, trained on as in pretraining
    long: str = "crop"  # a conversation longer than a row: crop (after a whole assistant turn) | drop | refuse
    epochs: Count = 1  # passes over the mixture
    max_seq_len: CountOrAuto = -1  # T, context length in tokens; -1: as in pretraining
    device_batch_size: CountOrAuto = -1  # rows in one forward pass on one device; -1: as in pretraining
    total_batch_size: CountOrAuto = -1  # tokens in one optimizer step; -1: as in pretraining
    # optimization
    load_optimizer: bool = True  # begin with the optimizer's state of the model's checkpoint
    warmup_ratio: Share = 0.0  # share of the stage, at its start, over which the rates rise
    # steps between measurements: loss on held-out conversations, bits per byte of the corpus's validation text; -1: off
    eval_every: CountOrAuto = 200
    # tokens of conversations and of text at most; -1: 40 x 524288 on a GPU, 65536 on a CPU
    eval_tokens: CountOrAuto = -1
    eval_text: bool = True  # measure bits per byte, which needs the pretraining corpus
    # steps between measurements: accuracy on --chatcore-tasks, and ChatCORE of those that belong to it; -1: off
    chatcore_every: CountOrAuto = -1
    chatcore_tasks: str = ""  # names joined by commas; default: those of ChatCORE
    chatcore_max_cat: CountOrAuto = -1  # examples of each task answered by letters; -1: all
    chatcore_max_sample: CountOrAuto = 24  # examples of each task answered by sampling
    deterministic: bool = False  # on a GPU: only algorithms that give the same numbers each time, which are slower

    GROUPS = {
        "": "run model tasks epochs num_iterations device_batch_size max_seq_len eval_every resume dry_run",
        "data": "data stages replay long",
        "training": "total_batch_size load_optimizer warmup_ratio FineTuneFlags",
        "evaluation": "eval_tokens eval_text chatcore_every chatcore_tasks chatcore_max_cat chatcore_max_sample",
        "run": "allow_unsandboxed deterministic RunFlags",
    }
    CONDITIONS = [
        Condition("tasks", "stages", lambda c: not c.stages, "one of the two: each stage of --stages has tasks"),
        Condition("epochs", "num_iterations", lambda c: c.num_iterations < 1, "one of the two"),
        periodic("eval_tokens eval_text", "eval_every"),
        periodic("chatcore_tasks chatcore_max_cat chatcore_max_sample", "chatcore_every"),
    ]


@dataclass(frozen=True)
class RLConfig(FineTuneFlags):
    """Improve a chat model by its own replies to a task that scores them."""

    task: str = "gsm8k"  # any task with a reward: gsm8k | arithmetic | spellingbee | ... (tasks/__init__.py)
    split: str = "train"  # part of the task that prompts are taken from
    # sum of the task's named parts: NAME=WEIGHT, or NAME=WEIGHT:CAP for at most CAP, joined by commas
    reward: str = "correct=1"
    # objective
    algorithm: str = "reinforce"  # reinforce | grpo | dr_grpo: sets the flags below (training/policy.py)
    advantage: str = ""  # mean | standardised | leave_one_out; default: the algorithm's
    normaliser: str = ""  # token | sequence | constant: what the loss is divided by; default: the algorithm's
    # ratios are clipped at 1 - this from the second update on a batch on; 0: off; -1: the algorithm's
    clip_low: Annotated[float, Bounds(0, 1, high_too=False, also=(-1,))] = -1.0
    clip_high: NonNegativeOrAuto = -1.0  # ratios are clipped at 1 + this; 0: off; -1: the algorithm's
    kl: NonNegativeOrAuto = -1.0  # weight of the divergence from the start model; 0: off; -1: the algorithm's
    updates_per_batch: Count = 1  # optimizer steps on each rollout
    # rollouts
    num_epochs: Count = 1  # passes over the prompts
    examples_per_step: Count = 16  # prompts in a rollout, all ranks
    num_samples: Annotated[int, at_least(2)] = 16  # replies to each prompt
    max_new_tokens: Count = 256  # tokens of a reply at most
    temperature: PositiveFloat = 1.0  # sampling temperature
    top_k: NonNegativeInt = 50  # sample from the k likeliest tokens; 0: from all
    tool: str = "calculator"  # calculator | python: what answers a tool call; empty: nothing does
    rollout_batch_size: NonNegativeInt = 0  # replies drawn at once on one device; 0: all of a rollout
    device_batch_size: Count = 8  # replies in one forward pass of training on one device
    # optimization
    init_lr_frac: PositiveFloat = 0.05  # multiplies every learning rate
    weight_decay: NonNegativeFloat = 0.0  # weight decay of matrices
    warmup_steps: NonNegativeInt = 0  # steps over which the rates rise at the start
    warmdown_ratio: Share = 1.0  # share of the run, at its end, over which the rates fall
    eval_every: CountOrAuto = 60  # steps between measurements of pass@k on --eval-split; -1: off
    eval_split: str = "test"  # part of the task that is measured on
    eval_examples: CountOrAuto = 400  # prompts of --eval-split; -1: all
    eval_samples: Count = 8  # replies to each: pass@1 to pass@eval_samples
    save_every: CountOrAuto = 60  # steps between checkpoints; one is always written at the end; -1: off

    GROUPS = {
        "": "run model task reward num_iterations num_samples examples_per_step max_new_tokens resume dry_run",
        "data": "data split num_epochs",
        "objective": "algorithm advantage normaliser clip_low clip_high kl updates_per_batch",
        "rollout": "temperature top_k tool allow_unsandboxed rollout_batch_size",
        "training": "device_batch_size weight_decay warmup_steps FineTuneFlags",
        "evaluation": "eval_every eval_split eval_examples eval_samples",
        "run": "save_every RunFlags",
    }
    CONDITIONS = [
        Condition(
            "clip_low clip_high",
            "updates_per_batch",
            lambda c: c.updates_per_batch > 1,
            "--updates-per-batch above 1: before the second update nothing is clipped",
        ),
        Condition("num_epochs", "num_iterations", lambda c: c.num_iterations < 1, "one of the two"),
        periodic("eval_split eval_examples eval_samples", "eval_every"),
    ]

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
from nanolab.training.config import READ_BY_RECIPE, TrainingFlags

Keep = Annotated[str, OneOf(("all",), count=True)]
Wandb = Annotated[str, OneOf(("off", "offline", "online"))]
EVALUATED = "--eval-every with a number of steps"


@dataclass(frozen=True)
class RunFlags:
    """The run, its machine and its records: flags of every stage."""

    # run directory under <base>/runs/; default: d<depth> or the preset's name, after pretraining NAME-sft and NAME-rl
    run: str = ""
    resume: bool = False  # continue from the newest valid checkpoint of --run
    dry_run: bool = False  # print the plan and stop
    device_type: str = ""  # cuda | mps | cpu; default: the best there is
    threads: NonNegativeInt = 0  # CPU threads; 0: all
    seed: Seed = 42  # governs everything random
    # keep only the input of each layer for the backward pass, compute the rest again: less memory, a third slower
    activation_checkpointing: bool = False
    # cadences in steps; -1 is off
    save_every: CountOrAuto = 1000  # checkpoints; one is always written at the end
    keep: Keep = "2"  # checkpoints kept beside the best: a number, or all
    log_every: CountOrAuto = 1
    log_grad_norm: bool = False
    wandb: Wandb = "off"  # online | offline | off

    CONDITIONS = [
        Condition("log_grad_norm", "log_every", lambda c: c.log_every > 0, "--log-every with a number of steps"),
        Condition("wandb", "run", lambda c: c.run != "dummy", "another --run: dummy is the name of runs without wandb"),
    ]


@dataclass(frozen=True)
class FineTuneFlags(RunFlags):
    """What a stage after pretraining starts from, and what it changes of pretraining's rates."""

    # NAME[@STEP|best] to start from; default: the newest finished base run, for reinforcement learning sft run
    model: str = ""
    data: str = ""  # local folder of the tasks' files; default: the hub
    num_iterations: CountOrAuto = -1  # optimizer steps; -1: by the number of epochs
    # run code that a model writes even where the sandbox lacks landlock or seccomp: it can then do what you can
    allow_unsandboxed: bool = False
    # optimization
    embedding_lr: NonNegativeOrAuto = (
        -1.0
    )  # -1, here and below: as in pretraining; all are scaled by the batch as there
    unembedding_lr: NonNegativeOrAuto = -1.0
    matrix_lr: NonNegativeOrAuto = -1.0
    learning_rate: NonNegativeOrAuto = -1.0  # of adamw_cosine and adam_constant
    init_lr_frac: PositiveFloat = 0.8  # multiplies every learning rate
    warmdown_ratio: Share = 0.5  # share of the stage, at its end, over which the rates fall
    final_lr_frac: Share = 0.0
    grad_clip: PositiveOrAuto = -1.0  # largest L2 norm of all gradients together; -1: off

    BY_RECIPE = READ_BY_RECIPE
    CONDITIONS = [
        Condition("final_lr_frac", "warmdown_ratio", lambda c: c.warmdown_ratio > 0, "--warmdown-ratio above 0")
    ]


@dataclass(frozen=True)
class BaseTrainConfig(RunFlags, TrainingFlags, DataConfig):
    """Pretrain a model: set --depth, and the rest follows."""

    plan_for: str = ""  # with --dry-run: pretend this hardware, for example 8xH100
    # folder of tokenizer.json (or vocab.json + merges.txt); default: tokenizer/ in the base directory
    tokenizer: str = ""
    # cadences in steps; -1 is off
    eval_every: CountOrAuto = 250  # validation bits per byte
    eval_tokens: CountOrAuto = -1  # validation tokens at most; -1: 80 x 524288 on a GPU, 524288 on a CPU
    core_metric_every: CountOrAuto = -1  # CORE, then and at the end
    core_metric_max_per_task: CountOrAuto = 500  # items of each of its tasks at most, drawn by a fixed seed; -1: all
    # folder of its tasks; default: eval_bundle in the base directory, downloaded if it is not there
    eval_bundle: str = ""
    sample_every: CountOrAuto = 2000
    # eager | sdpa | banded | flex | fa3; default: the fastest that each layer can use on the device
    attn_kernel: str = ""
    fp8: bool = False  # matrix multiplications in 8-bit floats
    # on a GPU: only algorithms that give the same numbers each time, which are slower; a CPU has no others
    deterministic: bool = False

    CONDITIONS = [
        Condition("plan_for", "dry_run", lambda c: c.dry_run, "--dry-run"),
        Condition("device_type", "plan_for", lambda c: not c.plan_for, "one of the two"),
        Condition("eval_tokens", "eval_every", lambda c: c.eval_every > 0, EVALUATED),
        Condition(
            "core_metric_max_per_task eval_bundle",
            "core_metric_every",
            lambda c: c.core_metric_every > 0,
            "--core-metric-every with a number of steps",
        ),
    ]


@dataclass(frozen=True)
class SFTConfig(FineTuneFlags):
    """Fine-tune a model on conversations, so that it answers."""

    # what is learned
    tasks: str = (  # a mixture: tasks with the number of times each example comes (tasks/__init__.py)
        "smoltalk:1,mmlu:3,gsm8k:4,spelling:1,spellingbee:1"
    )
    # TOML file with [[stage]] tables (name, tasks, epochs, num_iterations, init_lr_frac, replay); flags are the
    # defaults of their fields
    stages: str = ""
    replay: ShareBelow1 = 0.0  # share of the rows that is pretraining text, trained on as in pretraining
    long: str = "crop"  # a conversation longer than a row: crop (after a whole assistant turn) | drop | refuse
    epochs: Count = 1  # passes over the mixture
    # batch; -1: as in pretraining
    max_seq_len: CountOrAuto = -1  # T, tokens in a row
    device_batch_size: CountOrAuto = -1  # rows in one forward pass on one device
    total_batch_size: CountOrAuto = -1  # tokens in one optimizer step
    # optimization
    load_optimizer: bool = True  # begin with the optimizer's state of the model's checkpoint
    warmup_ratio: Share = 0.0
    # cadences in steps; -1 is off
    eval_every: CountOrAuto = 200  # loss on held-out conversations, bits per byte of the corpus's validation text
    eval_tokens: CountOrAuto = -1  # of each at most; -1: 40 x 524288 on a GPU, 65536 on a CPU
    eval_text: bool = True  # measure bits per byte, which needs the pretraining corpus
    chatcore_every: CountOrAuto = -1  # accuracy on --chatcore-tasks, and ChatCORE of those that belong to it
    chatcore_tasks: str = ""  # names with commas; default: those of ChatCORE
    chatcore_max_cat: CountOrAuto = -1  # examples of each task answered by letters; -1: all
    chatcore_max_sample: CountOrAuto = 24  # examples of each task answered by sampling
    deterministic: bool = False  # as in base_train

    CONDITIONS = [
        Condition("tasks", "stages", lambda c: not c.stages, "one of the two: each stage of --stages has tasks"),
        Condition("epochs", "num_iterations", lambda c: c.num_iterations < 1, "one of the two"),
        Condition("eval_tokens eval_text", "eval_every", lambda c: c.eval_every > 0, EVALUATED),
        Condition(
            "chatcore_tasks chatcore_max_cat chatcore_max_sample",
            "chatcore_every",
            lambda c: c.chatcore_every > 0,
            "--chatcore-every with a number of steps",
        ),
    ]


@dataclass(frozen=True)
class RLConfig(FineTuneFlags):
    """Improve a chat model by its own replies to a task that scores them."""

    # what is asked, and what is a good reply
    task: str = "gsm8k"  # any task with a reward: gsm8k | arithmetic | spellingbee | ... (tasks/__init__.py)
    split: str = "train"
    # sum of the task's named parts: NAME=WEIGHT, or NAME=WEIGHT:CAP for at most CAP, joined by commas
    reward: str = "correct=1"
    # objective
    algorithm: str = "reinforce"  # reinforce | grpo | dr_grpo: a row of the choices below (training/policy.py)
    advantage: str = ""  # mean | standardised | leave_one_out; default, here and below: the algorithm's
    normaliser: str = ""  # token | sequence | constant: what a token's share of the loss is
    # ratios are clipped at 1 - this; 0: off; bites from the second update on a batch on
    clip_low: Annotated[float, Bounds(0, 1, high_too=False, also=(-1,))] = -1.0
    clip_high: NonNegativeOrAuto = -1.0  # and at 1 + this
    kl: NonNegativeOrAuto = -1.0  # weight of the divergence from the start model; 0: off
    updates_per_batch: Count = 1  # optimizer steps on each rollout
    # rollouts
    num_epochs: Count = 1  # passes over the prompts
    examples_per_step: Count = 16  # prompts in a rollout, all ranks
    num_samples: Annotated[int, at_least(2)] = 16  # replies to each prompt
    max_new_tokens: Count = 256
    temperature: PositiveFloat = 1.0
    top_k: NonNegativeInt = 50  # 0: off
    tool: str = "calculator"  # calculator | python: what answers a tool call; empty: nothing does
    rollout_batch_size: NonNegativeInt = 0  # replies drawn at once on one device; 0: all of a rollout
    device_batch_size: Count = 8  # replies in one forward pass of training on one device
    # optimization
    init_lr_frac: PositiveFloat = 0.05  # multiplies every learning rate
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    warmdown_ratio: Share = 1.0  # share of the run, at its end, over which the rates fall
    # cadences in steps; -1 is off
    eval_every: CountOrAuto = 60  # pass@k on --eval-split
    eval_split: str = "test"
    eval_examples: CountOrAuto = 400  # -1: all
    eval_samples: Count = 8  # replies to each: pass@1 to pass@eval_samples
    save_every: CountOrAuto = 60  # checkpoints; one is always written at the end

    CONDITIONS = [
        Condition(
            "clip_low clip_high",
            "updates_per_batch",
            lambda c: c.updates_per_batch > 1,
            "--updates-per-batch above 1: before the second update nothing is clipped",
        ),
        Condition("num_epochs", "num_iterations", lambda c: c.num_iterations < 1, "one of the two"),
        Condition("eval_split eval_examples eval_samples", "eval_every", lambda c: c.eval_every > 0, EVALUATED),
    ]

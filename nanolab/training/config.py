"""Flags of the three trainers. Imports no torch."""

from dataclasses import dataclass

from nanolab.data.config import DataConfig
from nanolab.model.config import ModelFlags


@dataclass(frozen=True)
class BaseTrainConfig(ModelFlags, DataConfig):
    """Pretrain a model: one dial, --depth, sets everything else."""

    run: str = ""  # run directory under <base>/runs/; default: the preset's name, or d<depth>
    resume: bool = False  # continue from the newest valid checkpoint of --run
    dry_run: bool = False  # print the plan and stop
    plan_for: str = ""  # with --dry-run: pretend this hardware, for example 8xH100
    device_type: str = ""  # cuda | mps | cpu; default: the best there is
    seed: int = 42  # governs everything random
    # folder of tokenizer.json (or vocab.json + merges.txt); default: tokenizer/ in the base directory
    tokenizer: str = ""
    # horizon: the first one given, in this order
    num_iterations: int = -1  # optimizer steps
    target_flops: float = -1.0  # training FLOPs
    target_param_data_ratio: float = -1.0  # tokens per scaling parameter; 12 if no horizon is given
    max_seconds: float = -1.0  # training time; schedules follow the clock
    # batch
    device_batch_size: int = 32  # rows in one forward pass on one device
    total_batch_size: int = -1  # tokens in one optimizer step; -1: by the scaling law
    # optimization
    recipe: str = "dial"  # dial (Muon and AdamW, rates by the scaling laws) | adamw_cosine | adam_constant
    embedding_lr: float = 0.3
    unembedding_lr: float = 0.008
    matrix_lr: float = 0.02
    scalar_lr: float = 0.5
    # dial: Muon's at the reference point, scaled by the laws; adamw_cosine: of tensors with two dimensions
    weight_decay: float = 0.28
    # multiplies every learning rate; -1: of the dial sqrt(batch / 2^19), the batch law (small batches do better with
    # 0.5 to 1), else 1
    lr_scale: float = -1.0
    learning_rate: float = 6e-4  # of adamw_cosine and adam_constant; beta1, beta2 and eps likewise
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = -1.0  # largest L2 norm of all gradients together; -1: off
    warmup_steps: int = 40
    warmdown_ratio: float = 0.65  # of the dial
    final_lr_frac: float = 0.05
    # cadences in steps; -1 is off
    eval_every: int = 250  # validation bits per byte
    eval_tokens: int = -1  # validation tokens at most; -1: 80 x 524288 on a GPU, 524288 on a CPU
    core_metric_every: int = -1  # CORE, then and at the end
    core_metric_max_per_task: int = 500  # items of each of its tasks at most, drawn by a fixed seed; -1: all
    # folder of its tasks; default: eval_bundle in the base directory, downloaded if it is not there
    eval_bundle: str = ""
    sample_every: int = 2000
    save_every: int = 1000  # checkpoints; one is always written at the end
    keep: str = "2"  # checkpoints kept beside the best: a number, or all
    log_every: int = 1
    log_grad_norm: bool = False
    wandb: str = "off"  # online | offline | off
    # eager | sdpa | banded | flex | fa3; default: the fastest that each layer can use on the device
    attn_kernel: str = ""
    fp8: bool = False  # matrix multiplications in 8-bit floats
    # keep only the input of each layer for the backward pass, compute the rest again: less memory, a third slower
    activation_checkpointing: bool = False
    threads: int = 0  # CPU threads; 0: all
    # on a GPU: only algorithms that give the same numbers each time, which are slower; a CPU has no others
    deterministic: bool = False


@dataclass(frozen=True)
class SFTConfig:
    """Fine-tune a model on conversations, so that it answers."""

    model: str = ""  # NAME[@STEP|best] to start from; default: the newest finished base run
    run: str = ""  # run directory under <base>/runs/; default: NAME-sft
    resume: bool = False  # continue from the newest valid checkpoint of --run
    dry_run: bool = False  # print the plan and stop
    device_type: str = ""  # cuda | mps | cpu; default: the best there is
    seed: int = 42  # governs everything random
    # what is learned
    tasks: str = (  # a mixture: tasks with the number of times each example comes (tasks/__init__.py)
        "smoltalk:1,mmlu:3,gsm8k:4,spelling:1,spellingbee:1"
    )
    data: str = ""  # local folder of the tasks' files; default: the hub
    # TOML file with [[stage]] tables (name, tasks, epochs, num_iterations, init_lr_frac, replay); flags are the
    # defaults of their fields
    stages: str = ""
    replay: float = 0.0  # share of the rows that is pretraining text, trained on as in pretraining
    long: str = "crop"  # a conversation longer than a row: crop (after a whole assistant turn) | drop | refuse
    # horizon
    epochs: int = 1  # passes over the mixture
    num_iterations: int = -1  # optimizer steps; -1: by --epochs
    # batch; -1: as in pretraining
    max_seq_len: int = -1  # T, tokens in a row
    device_batch_size: int = -1  # rows in one forward pass on one device
    total_batch_size: int = -1  # tokens in one optimizer step
    # optimization
    load_optimizer: bool = True  # begin with the optimizer's state of the model's checkpoint
    init_lr_frac: float = 0.8  # multiplies every learning rate
    embedding_lr: float = -1.0  # -1, here and below: as in pretraining; all are scaled by the batch as there
    unembedding_lr: float = -1.0
    matrix_lr: float = -1.0
    learning_rate: float = -1.0  # of adamw_cosine and adam_constant
    warmup_ratio: float = 0.0
    warmdown_ratio: float = 0.5  # share of each stage, at its end, over which the rates fall
    final_lr_frac: float = 0.0
    grad_clip: float = -1.0  # largest L2 norm of all gradients together; -1: off
    # keep only the input of each layer for the backward pass, compute the rest again: less memory, a third slower
    activation_checkpointing: bool = False
    # cadences in steps; -1 is off
    eval_every: int = 200  # loss on held-out conversations, bits per byte of the corpus's validation text
    eval_tokens: int = -1  # of each at most; -1: 40 x 524288 on a GPU, 65536 on a CPU
    eval_text: bool = True  # measure bits per byte, which needs the pretraining corpus
    chatcore_every: int = -1  # accuracy on --chatcore-tasks, and ChatCORE of those that belong to it
    chatcore_tasks: str = ""  # names with commas; default: those of ChatCORE
    chatcore_max_cat: int = -1  # examples of each categorical task; -1: all
    chatcore_max_sample: int = 24  # examples of each generative task
    # run code that a model writes even where the sandbox lacks landlock or seccomp: it can then do what you can
    allow_unsandboxed: bool = False
    save_every: int = 1000  # checkpoints; one is always written at the end
    keep: str = "2"  # checkpoints kept beside the best: a number, or all
    log_every: int = 1
    log_grad_norm: bool = False
    wandb: str = "off"  # online | offline | off
    threads: int = 0  # CPU threads; 0: all
    deterministic: bool = False  # as in base_train


@dataclass(frozen=True)
class RLConfig:
    """Improve a chat model by its own replies to a task that scores them."""

    model: str = ""  # NAME[@STEP|best] to start from; default: the newest finished sft run
    run: str = ""  # run directory under <base>/runs/; default: NAME-rl
    resume: bool = False  # continue from the newest valid checkpoint of --run
    dry_run: bool = False  # print the plan and stop
    device_type: str = ""  # cuda | mps | cpu; default: the best there is
    seed: int = 42  # governs everything random
    # what is asked, and what is a good reply
    task: str = "gsm8k"  # any task with a reward: gsm8k | arithmetic | spellingbee | ... (tasks/__init__.py)
    split: str = "train"
    data: str = ""  # local folder of the task's files; default: the hub
    # sum of the task's named parts: NAME=WEIGHT, or NAME=WEIGHT:CAP for at most CAP, joined by commas
    reward: str = "correct=1"
    # objective
    algorithm: str = "reinforce"  # reinforce | grpo | dr_grpo: a row of the choices below (training/policy.py)
    advantage: str = ""  # mean | standardised | leave_one_out; default, here and below: the algorithm's
    normaliser: str = ""  # token | sequence | constant: what a token's share of the loss is
    clip_low: float = -1.0  # ratios are clipped at 1 - this; 0: off; bites from the second update on a batch on
    clip_high: float = -1.0  # and at 1 + this
    kl: float = -1.0  # weight of the divergence from the start model; 0: off
    updates_per_batch: int = 1  # optimizer steps on each rollout
    # rollouts
    num_epochs: int = 1  # passes over the prompts
    num_iterations: int = -1  # optimizer steps; -1: by --num-epochs
    examples_per_step: int = 16  # prompts in a rollout, all ranks
    num_samples: int = 16  # replies to each prompt
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 50  # 0: off
    tool: str = "calculator"  # calculator | python: what answers a tool call; empty: nothing does
    # run code that a model writes even where the sandbox lacks landlock or seccomp: it can then do what you can
    allow_unsandboxed: bool = False
    rollout_batch_size: int = 0  # replies drawn at once on one device; 0: all of a rollout
    device_batch_size: int = 8  # replies in one forward pass of training on one device
    # optimization
    init_lr_frac: float = 0.05  # multiplies every learning rate
    embedding_lr: float = -1.0  # -1, here and below: as in pretraining, whose batch scales them all
    unembedding_lr: float = -1.0
    matrix_lr: float = -1.0
    learning_rate: float = -1.0  # of adamw_cosine and adam_constant
    weight_decay: float = 0.0
    warmup_steps: int = 0
    warmdown_ratio: float = 1.0  # share of the run, at its end, over which the rates fall
    final_lr_frac: float = 0.0
    grad_clip: float = -1.0  # largest L2 norm of all gradients together; -1: off
    # keep only the input of each layer for the backward pass, compute the rest again: less memory, a third slower
    activation_checkpointing: bool = False
    # cadences in steps; -1 is off
    eval_every: int = 60  # pass@k on --eval-split
    eval_split: str = "test"
    eval_examples: int = 400  # -1: all
    eval_samples: int = 8  # replies to each: pass@1 to pass@eval_samples
    save_every: int = 60  # checkpoints; one is always written at the end
    keep: str = "2"  # checkpoints kept beside the best: a number, or all
    log_every: int = 1
    log_grad_norm: bool = False
    wandb: str = "off"  # online | offline | off
    threads: int = 0  # CPU threads; 0: all

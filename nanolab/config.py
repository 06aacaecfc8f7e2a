"""Config = command line = JSON: plain dataclasses, one per command, parsed by tyro. Imports no torch.

A field's trailing comment is its help text. Flag names follow the reference harness (karpathy/nanochat) where it has
one. A cadence or count of -1 means "off" or "automatic", as the comment says.
"""

import dataclasses
import difflib
import json
import math
import os
import select
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from nanolab.flags import BOUNDS, CHOICES, CONDITIONS, Bounds, Condition, OneOf
from nanolab.terminal import harmless

T = TypeVar("T")


class UserError(ValueError):
    """A mistake that a person can fix; the text says what was seen, what was expected and what to type.

    `code` names the kind of mistake in kebab-case ("flag-not-read") and `values` what it is about. Programs and tests
    match these; the text may be reworded at any time. A script prints `error [CODE]: TEXT`."""

    def __init__(self, text: str, code: str = "", **values: Any) -> None:
        super().__init__(text)
        self.code, self.values = code, values


def as_json(value: Any, where: str, indent: int | None = None) -> str:
    """A result as JSON, which has no NaN: numbers that are not finite become null, and a line says how many did. where:
    the result goes to.
    """
    lost = 0

    def finite(x: Any) -> Any:
        nonlocal lost
        if isinstance(x, float) and x - x != 0:
            lost += 1
            return None
        if isinstance(x, dict):
            return {key: finite(one) for key, one in x.items()}
        return [finite(one) for one in x] if isinstance(x, (list, tuple)) else x

    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        text = json.dumps(finite(value), indent=indent, allow_nan=False)
    print(
        f"note: {lost} number{'s' if lost > 1 else ''} of {where} {'are' if lost > 1 else 'is'} not finite and null"
        " there",
        file=sys.stderr,
    )
    return text


@dataclass(frozen=True)
class Architecture:
    """Every architectural choice. A choice by name is an entry of a table; dev/VARIANTS.md lists formula, paper and
    place of each.
    """

    # positions
    positions: str = "rope"  # rope | nope | rnope | learned | sinusoidal | alibi
    rope_base: float = 100_000.0  # the slowest pair turns by almost 1 / rope_base a token
    rope_layout: str = "half"  # half | interleaved: which two channels turn together
    rope_fraction: float = 1.0  # share of a head's channels that turn
    # none | linear:S | yarn:S, for rows S times as long as those the weights were trained on
    rope_scaling: str = "none"
    position_pattern: str = "R,N"  # of rnope, tiled over layers: R turns, N does not
    # attention
    attention: str = "mha"  # mha | gqa:G (G key/value heads) | mqa | mla
    mla_kv_rank: int = 0  # width of MLA's cached latent; 0: 4 x head size
    mla_q_rank: int = 0  # width of MLA's query latent; 0: 3 x the cached one, at most the model's width
    mla_rope_dim: int = -1  # width of MLA's shared rotary key; -1: half the head size
    # tiled over layers: S sees a window, L the whole row, the last layer is L; or rope: S where positions turn
    window_pattern: str = "SSSL"
    # keys before itself that a query of an S layer sees; 0: a quarter of the row, rounded up to 128
    window_size: int = 0
    normaliser: str = "softmax"  # softmax | softmax1 | softmax_n | sink: what divides the exponentials
    softmax_n: float = 1.0  # the n of softmax_n
    gate: str = "none"  # none | head | elementwise: sigmoid gate on attention's output
    qk_norm: str = "rms"  # none | rms | layernorm | l2
    qk_gain: float = 1.2  # multiplies queries and keys after QK norm
    score_softcap: float = 0.0  # scores become c * tanh(score / c); 0: off
    document_mask: bool = False  # attention stays inside a document
    # stream
    value_embeds: bool = True  # a table of values for every second layer
    residual_scalars: bool = True  # learned weights of the stream and of the embedding, per layer
    smear: bool = True  # mix into each embedding a share of the one before
    backout: bool = True  # subtract a share of the middle layer's stream at the end
    embed_norm: bool = True  # norm after the embedding
    # blocks and head
    mlp: str = "relu2"  # relu | relu2 | gelu | gelu_tanh | swiglu
    norm: str = "rms"  # rms | layernorm
    norm_gain: bool = False  # norms have learned gains
    bias: str = ""  # parts with biases, any of qkv,out,mlp,norm,head
    softcap: float = 15.0  # logits become softcap * tanh(logits / softcap); 0: off
    tied_head: bool = False  # the head's matrix is the embedding table
    pad_vocab_to: int = 64  # table rows are padded to a multiple of this
    # dropout: shares that are dropped in training
    embed_dropout: float = 0.0  # of embeddings
    attn_dropout: float = 0.0  # of attention weights
    resid_dropout: float = 0.0  # of attention's output
    mlp_dropout: float = 0.0  # of the MLP's output
    init: str = "dial"  # dial | gpt2 | normal02: initial weights


@dataclass(frozen=True)
class GPTConfig(Architecture):
    """A model: everything that is needed to rebuild the module that a checkpoint's weights fit."""

    sequence_len: int = 2048  # longest training row; windows are fractions of it
    vocab_size: int = 32768  # tokenizer size, special tokens included
    n_layer: int = 12
    n_head: int = 6
    n_embd: int = 768
    bos: int = -1  # the token that begins a document; document_mask needs it

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_kv_head(self) -> int:
        """Key/value heads: of gqa:G, G; of mqa, one; otherwise as many as query heads."""
        kind, _, groups = self.attention.partition(":")
        return int(groups) if kind == "gqa" else 1 if kind == "mqa" else self.n_head

    def has_bias(self, part: str) -> bool:
        return part in self.bias.split(",")

    def __post_init__(self) -> None:
        _check_gpt(self)


BIAS_PARTS = ("qkv", "out", "mlp", "norm", "head")


def _check_gpt(c: GPTConfig) -> None:
    """What can be told from the numbers alone. Names of table entries, and pairs of them, are checked by
    model/variants.py.
    """
    for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_embd", "pad_vocab_to"):
        if getattr(c, name) < 1:
            raise UserError(f"{name} is {getattr(c, name)}; expected at least 1")
    if c.n_embd % c.n_head or c.head_dim % 2:
        raise UserError(
            f"width {c.n_embd} over {c.n_head} heads gives head size {c.n_embd / c.n_head:g}; expected an even whole"
            " number; choose --head-dim so that it divides the width"
        )
    kind, _, groups = c.attention.partition(":")
    if (kind == "gqa") != bool(groups) or (
        groups and not (groups.isdigit() and int(groups) and c.n_head % int(groups) == 0)
    ):
        raise UserError(
            f"--attention {c.attention} with {c.n_head} heads; expected mha, mqa, mla or gqa:G with G dividing the"
            " heads; try --attention gqa:1"
        )
    if c.window_pattern != "rope" and (not c.window_pattern or set(c.window_pattern) - set("SL")):
        raise UserError(
            f"window pattern {c.window_pattern!r} has letters other than S and L; try --window-pattern SSSL"
        )
    if c.window_size < 0:
        raise UserError(f"--window-size is {c.window_size}; expected at least 1, or 0 for a quarter of the row")
    if set(c.position_pattern.split(",")) - {"R", "N"}:
        raise UserError(
            f"position pattern {c.position_pattern!r} has parts other than R and N; try --position-pattern R,R,R,N"
        )
    if c.softmax_n < 0:
        raise UserError(f"--softmax-n is {c.softmax_n:g}; expected 0 or more; try --softmax-n 1")
    if not 0 < c.rope_fraction <= 1:
        raise UserError(
            f"--rope-fraction is {c.rope_fraction:g}; expected above 0 and at most 1; try --rope-fraction 0.5"
        )
    for part in filter(None, c.bias.split(",")):
        if part not in BIAS_PARTS:
            raise UserError(
                f"--bias names {part!r}; expected parts out of {','.join(BIAS_PARTS)}{nearest(part, list(BIAS_PARTS))}"
            )
    for name in ("embed_dropout", "attn_dropout", "resid_dropout", "mlp_dropout"):
        if not 0 <= getattr(c, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(c, name):g}; expected at least 0 and below 1; try 0.1"
            )
    if c.n_embd < 32 and (c.smear or c.value_embeds):
        raise UserError(
            f"width {c.n_embd} is below 32, which the smear and value gates read; raise --depth or --aspect-ratio, or"
            " use --no-smear --no-value-embeds"
        )


@dataclass(frozen=True)
class ModelFlags(Architecture):
    """The flags of every command that builds a new model: a preset, the dial, and the architecture."""

    preset: str = "nanolab"  # a row of defaults for the other flags (nanolab/presets.py); flags given beside it win
    depth: int = 20  # layers; the dial
    aspect_ratio: int = 64  # width = depth * aspect_ratio, rounded up to a multiple of head_dim
    head_dim: int = 128
    max_seq_len: int = 2048  # T, tokens in a row


@dataclass(frozen=True)
class DataConfig:
    """Where documents come from."""

    data: str = "pydocs"  # corpus name, or a weighted mixture such as pydocs:0.7,tinystories:0.3
    # a folder or file of your own text (parquet with a `text` column, .jsonl, .txt); overrides --data
    data_dir: str = ""
    val_data: str = ""  # file or folder that is the validation text; default: the corpus's own, or a pinned split
    num_shards: int = -1  # training shards to use of a hub corpus; -1: those that are on disk, at least 8


@dataclass(frozen=True)
class DataBuildConfig(DataConfig):
    """Build or download a corpus and say what it holds."""

    workers: int = 4  # parallel downloads or builders
    json: bool = False  # last line of output is one JSON document


@dataclass(frozen=True)
class TokTrainConfig(DataConfig):
    """Train the byte-level BPE tokenizer."""

    vocab_size: int = 32768  # special tokens included
    max_chars: int = 2_000_000_000  # characters to read
    doc_cap: int = 10_000  # characters read of one document: of a longer one, an even sample
    tokenizer: str = ""  # folder to write tokenizer.json to; default: tokenizer/ in the base directory


@dataclass(frozen=True)
class TokEvalConfig(DataConfig):
    """Compare the tokenizer with GPT-2's and GPT-4's on several kinds of text."""

    tokenizer: str = ""  # folder or file of the tokenizer; default: tokenizer/ in the base directory
    json: bool = False  # last line of output is one JSON document


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
class InspectConfig(ModelFlags):
    """Show a model as a table: shapes, parameters per part, FLOPs, cache bytes, and the attention kernel of each
    layer.
    """

    depth: int = 12
    vocab_size: int = 32768
    context: int = 0  # tokens before a decoded one, for its FLOPs; 0: a full row
    attn_kernel: str = ""  # as in base_train
    device_type: str = ""
    json: bool = False  # last line of output is one JSON document


@dataclass(frozen=True)
class BaseEvalConfig(DataConfig):
    """Evaluate a base model: bits per byte, samples, and with --modes core,hellaswag,lambada in-context tasks."""

    data: str = ""  # default: the run's own data
    # NAME[@STEP|best]; default: the newest finished run; with --all-checkpoints also several, NAME,NAME
    model: str = ""
    hf: str = ""  # folder of a causal language model of Hugging Face, to evaluate instead of a run
    trust_code: bool = False  # run Python code that the folder of --hf brings
    modes: str = "bpb,sample"  # any of bpb,sample,core,hellaswag,lambada
    all_checkpoints: bool = False  # every checkpoint of the run, and the curve of each mode's score over training
    # folder of the results; default: the run's directory, or eval/NAME-WEIGHTS in the base directory with --hf
    out: str = ""
    # bpb
    split_tokens: int = -1  # tokens of each split at most; -1: 40 x 524288 on a GPU, 524288 on a CPU
    train_text: bool = True  # score training text too, beside the validation text
    device_batch_size: int = 32
    # core, hellaswag, lambada
    # folder of the evaluation bundle; default: eval_bundle in the base directory, downloaded if it is not there
    eval_bundle: str = ""
    max_per_task: int = -1  # items of each task at most, drawn by a fixed seed; -1: all
    extra: bool = False  # core: beside it the tasks of the bundle's extra.yaml, which do not count
    hellaswag: str = ""  # HellaSwag as its authors publish it (jsonl with ctx, endings, label); default: the bundle's
    hellaswag_bos: bool = True  # texts of HellaSwag begin as in training; reproductions of GPT-2 go without
    device_type: str = ""
    seed: int = 42
    json: bool = False  # last line of output is one JSON document


@dataclass(frozen=True)
class ContaminationConfig(DataConfig):
    """Find the items of an evaluation set that share a run of words with the training text."""

    eval_set: str = ""  # a .jsonl file of items, or the folder of an evaluation bundle (core.yaml and extra.yaml)
    ngram: int = 13  # words in a run
    # folder of contamination.json and contaminated.jsonl; default: contamination/NAME in the base directory
    out: str = ""
    json: bool = False  # last line of output is one JSON document


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


@dataclass(frozen=True)
class ChatEvalConfig:
    """Evaluate a chat model: questions with options by the letters' logits, others by sampled replies; ChatCORE."""

    model: str = ""  # NAME[@STEP|best]; default: the newest finished run
    # joined by commas: NAME or NAME:SPLIT (tasks/__init__.py; split test); default: all that can be graded and whose
    # data is there; of jsonl=FILE the loss
    tasks: str = ""
    data: str = ""  # local folder of published datasets; default: the hub
    # sampled replies to each problem: pass@1 to pass@num_samples; more than one needs a temperature
    num_samples: int = 1
    temperature: float = 0.0
    top_k: int = 50  # 0: off
    max_tokens: int = 512  # of a sampled reply
    tool: str = "calculator"  # calculator | python: what answers the calls in sampled replies; empty: nothing
    # run code that a model writes even where the sandbox lacks landlock or seccomp: it can then do what you can
    allow_unsandboxed: bool = False
    max_problems: int = -1  # of each task, a random subset that is the same for every model; -1: all
    device_batch_size: int = 32  # rows read or replies drawn at once on one device
    device_type: str = ""
    seed: int = 42  # of the subset and the samples
    json: bool = False  # last line of output is one JSON document


@dataclass(frozen=True)
class GenChatConfig:
    """Have another model write conversations, through any endpoint that speaks OpenAI's chat API."""

    spec: str = ""  # TOML file: topics, personas, openings, dynamics, and the instructions (nanolab/data/synthesis.py)
    output: str = ""  # JSONL file that conversations are appended to; what is in it already is not asked for again
    model: str = ""  # the endpoint's name of the model
    url: str = "https://api.openai.com/v1"  # of the endpoint, without /chat/completions
    api_key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key; none is sent if it is not set
    num: int = 1000  # conversations
    workers: int = 4  # requests at a time
    temperature: float = 1.0
    max_tokens: int = 4096  # of an answer; 0: the endpoint is not told
    # json_schema | json_object | none: how much of the form the endpoint can be told to keep
    response_format: str = "json_schema"
    timeout: float = 120.0  # seconds for one answer
    seed: int = 42  # of the choices; the file keeps it
    json: bool = False  # last line of output is one JSON document


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a model in the terminal."""

    model: str = ""  # NAME[@STEP|best]; default: the newest finished run
    prompt: str = ""  # -p TEXT: one reply, then leave
    system: str = ""  # what a chat model is told before the conversation
    chat: bool = False  # put the text into the chat template; default for models fine-tuned by chat_sft or chat_rl
    raw: bool = False  # continue the text as it stands; default for base models
    tool: str = "calculator"  # calculator | python: what answers the calls in a chat model's replies; empty: nothing
    # run code that a model writes even where the sandbox lacks landlock or seccomp: it can then do what you can
    allow_unsandboxed: bool = False
    temperature: float = 0.8
    top_k: int = 50  # 0: off
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 42
    device_type: str = ""


@dataclass(frozen=True)
class ServeConfig:
    """Serve models over HTTP: a chat page in the browser, and OpenAI's API under /v1."""

    model: str = ""  # NAME[@STEP|best], or several joined by commas; default: the newest finished run
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: every one of this machine, better with a key
    port: int = 8000  # 0: one that is free
    api_key: str = ""  # what requests under /v1 must send as Authorization: Bearer KEY; empty: they need none
    # environment variable that holds the key instead, where other users of the machine do not see it
    api_key_env: str = "NANOLAB_API_KEY"
    # names that requests may call this server by, besides IP addresses and the machine's own, joined by commas; *: any
    allowed_hosts: str = ""
    # origins of other web pages that may use the API, joined by commas, for example http://localhost:3000; *: all of
    # them
    cors: str = ""
    # how much at once
    max_rows: int = 32  # replies that a replica generates at once
    queue: int = 64  # replies that wait for a place; beyond them requests are refused with 429
    int8: bool = False  # weights in 8 bits, which changes results a little; needs torchao
    replicas: int = 1  # engines of each model: on CUDA one per device, on a CPU that many threads
    prefix_mb: int = 256  # memory of each replica for beginnings of conversations that need not be read again; 0: none
    drain_seconds: float = 30.0  # after SIGTERM or Ctrl-C, running replies may take that long
    # what a request that does not say gets
    temperature: float = 0.8
    top_k: int = 50  # 0: off
    top_p: float = 1.0
    max_tokens: int = 512  # of a reply
    tool: str = "calculator"  # calculator | python: what answers the calls in chat replies; empty: nothing
    # run code that a model writes even where the sandbox lacks landlock or seccomp: it can then do what you can
    allow_unsandboxed: bool = False
    log_conversations: str = ""  # JSONL file that conversations are appended to; empty: they are kept nowhere
    device_type: str = ""  # cuda | mps | cpu; default: the best there is


@dataclass(frozen=True)
class ReportConfig:
    """Write the card of a model: what each stage of its training brought and cost, how good it is, where it lies."""

    model: str = ""  # NAME[@STEP|best]; default: the newest finished run
    output: str = "report.md"  # a copy is kept in the run directory
    price_per_hour: float = 0.0  # of one device, in dollars; 0: no costs


@dataclass(frozen=True)
class BenchConfig(ModelFlags, DataConfig):
    """Measure speed: of a training step, of the data path, of the tokenizer, of generation, or of evaluation."""

    what: str = "train"  # train | data | tokenizer | infer | eval; the first argument
    json: bool = False  # last line of output is one JSON document
    repeats: int = 5  # measurements; the median is reported
    seed: int = 42
    # train: synthetic tokens, one forward and backward pass and one optimizer step
    steps: int = 5  # steps in one measurement
    warmup: int = 3  # steps before the first measurement
    depth: int = 4
    recipe: str = "dial"  # as in base_train, and so are grad_clip, fp8 and deterministic
    grad_clip: float = -1.0
    max_seq_len: int = 512  # train and data
    vocab_size: int = 8192  # train; for data and tokenizer, what is trained when --tokenizer is not given
    device_batch_size: int = 8  # train and data
    attn_kernel: str = ""  # as in base_train
    fp8: bool = False
    deterministic: bool = False
    device_type: str = ""
    threads: int = 0  # CPU threads; 0: all
    # data and tokenizer: real documents of --data or --data-dir
    tokenizer: str = ""  # folder or file; default: one is trained on the documents that are read
    megabytes: float = 8.0  # text to read
    # infer: replies as the server makes them, greedy and without stops
    model: str = ""  # NAME[@STEP|best]; default: random weights in the shape that the flags above say
    prompt_tokens: int = 128
    decode_tokens: int = 64  # of a reply
    batch_sizes: str = "1,8,32,128"  # rows at once
    clients: int = 16  # requests that come one by one and run at once, their lengths from 0.5 to 1.5 times those above
    int8: bool = False  # weights in 8 bits; needs torchao
    # eval: in-context examples, as CORE has them; --model as for infer
    # folder of the evaluation bundle, with --model; default: random tokens in the shapes of its tasks
    eval_bundle: str = ""
    max_per_task: int = 20  # examples of each task


@dataclass(frozen=True)
class ExportConfig:
    """Write a model as a folder that transformers loads."""

    model: str = ""  # NAME[@STEP|best]; default: the newest finished run
    out: str = ""  # folder to write
    dtype: str = "fp32"  # fp32 | bf16: of the weights; bf16 rounds them
    push: str = ""  # USER/NAME: upload the folder to the hub; needs a token; a new repository is private
    overwrite: bool = False  # replace an exported model in --out


@dataclass(frozen=True)
class ImportConfig:
    """Make a GPT-2 of a transformers folder a finished run, which every command takes."""

    folder: str = ""  # with config.json, model.safetensors and the tokenizer's files; the first argument
    run: str = ""  # run directory under <base>/runs/; default: the folder's name


def check_max_per_task(n: int, flag: str) -> None:
    """Raises UserError for a number of items that is none."""
    if n < 1 and n != -1:
        raise UserError(f"{flag} is {n}; expected at least 1, or -1 for all; try {flag} 200")


def chosen(c: Architecture) -> list[str]:
    """The architecture flags that are not at their defaults, as "name value"."""
    return [
        f"{f.name} {getattr(c, f.name)}" for f in dataclasses.fields(Architecture) if getattr(c, f.name) != f.default
    ]


HORIZONS = ("num_iterations", "target_flops", "target_param_data_ratio", "max_seconds")


def from_preset(cls: type[T], name: str, **changes: Any) -> T:
    """`cls` with the defaults of the preset `name`, of which it takes the fields that it has, and `changes` over them.

    A change of the horizon replaces the preset's own, whatever its kind. Raises UserError for an unknown name.
    """
    from nanolab.presets import PRESETS

    if name not in PRESETS:
        raise UserError(
            f"preset {name!r} is unknown; expected one of"
            f" {', '.join(PRESETS)}{nearest(name, list(PRESETS), prefix='--preset ')}"
        )
    names = {f.name for f in dataclasses.fields(cls)}
    replaced = HORIZONS if set(HORIZONS) & set(changes) else ()
    row = {k: v for k, v in PRESETS[name].items() if k in names and k not in replaced}
    return cls(**row | {"preset": name} | changes)


def parse(cls: type[T], argv: list[str] | None = None) -> T:
    """Read `argv` (default: the command line) into `cls`. Unknown flags and presets exit with code 2 and the nearest
    name.

    Raises UserError for a number that is out of its bounds, and for a flag that was typed and is not read. `given`
    tells which were typed."""
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    if any(f.name == "prompt" for f in dataclasses.fields(cls)):
        argv = _joined_prompt(argv)
    flags = [
        (i, arg.split("=")[0], arg[2:].split("=")[0].replace("-", "_"))
        for i, arg in enumerate(argv)
        if arg.startswith("--")
    ]
    preset, horizons, typed_names = None, {}, set()
    for i, typed, name in flags:
        if bad := unknown_flag(cls, name):
            print(f"{typed} is not a flag of this command{bad}; --help lists them", file=sys.stderr)
            raise SystemExit(2)
        if name == "preset":
            preset = argv[i].partition("=")[2] or "".join(argv[i + 1 : i + 2])
        if name in HORIZONS:
            horizons[name] = getattr(cls, name)
        typed_names.add(name if name in cls.__dataclass_fields__ else name.removeprefix("no_"))
    try:
        defaults = cls() if preset is None else from_preset(cls, preset, **horizons)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    cfg = tyro.cli(cls, args=argv, default=defaults)
    check_bounds(cls, vars(cfg))
    check_read(typed_names, not_read(cls, vars(cfg)), vars(cfg))
    object.__setattr__(cfg, "_given", frozenset(typed_names))
    return cfg


def _joined_prompt(argv: list[str]) -> list[str]:
    """`argv` with "-p TEXT", "-p=TEXT" and "--prompt TEXT" as "--prompt=TEXT": a prompt is a prompt even if it begins
    like a flag.
    """
    found, left = [], iter(argv)
    for arg in left:
        if arg in ("-p", "--prompt") and (text := next(left, None)) is not None:
            arg = f"--prompt={text}"
        found.append("--prompt" + arg[2:] if arg == "-p" or arg.startswith("-p=") else arg)
    return found


def given(cfg: Any) -> frozenset[str]:
    """The flags that were typed; none of a config that `parse` did not make."""
    return getattr(cfg, "_given", frozenset())


def bounds_of(cls: type, name: str) -> Bounds | OneOf | None:
    """The bounds of a flag: those of the class or of its nearest base, else those of the name (flags.py)."""
    return next(
        (BOUNDS[k.__name__][name] for k in cls.__mro__ if name in BOUNDS.get(k.__name__, ())), BOUNDS[""].get(name)
    )


def check_bounds(cls: type, values: Mapping[str, Any], where: str = "") -> None:
    """Raise UserError for the first of `values` (of fields of `cls`) that is out of its bounds. where: stands before
    the message.
    """
    for f in dataclasses.fields(cls):
        bounds, value = bounds_of(cls, f.name), values.get(f.name)
        if bounds and value is not None and not bounds.holds(value):
            flag = f.name.replace("_", "-")
            automatic = f.default in getattr(bounds, "also", ())
            shown, advice = (f"{v:g}" if isinstance(v, float) else str(v) for v in (value, f.default))
            advice = f"leave --{flag} out" if automatic else f"try --{flag} {advice}"
            raise UserError(
                f"{where}--{flag} is {shown or 'empty'}; expected {bounds}; {advice}",
                "flag-out-of-bounds",
                flag=f.name,
                value=value,
                bounds=str(bounds),
            )


def not_read(cls: type, values: Mapping[str, Any], conditions: Collection[Condition] = ()) -> dict[str, Condition]:
    """The fields of `cls` that nothing reads where flags have these `values`, each with the condition that fails.
    Default: all conditions of `cls`.
    """
    view, names = SimpleNamespace(**values), {f.name for f in dataclasses.fields(cls)}
    rows = conditions or [row for k in cls.__mro__ for row in CONDITIONS.get(k.__name__, ())]
    found: dict[str, Condition] = {}
    for row in (row for row in rows if not row.read(view)):
        for word in row.flags.split():
            of_word = [f.name for f in dataclasses.fields(globals()[word])] if word[0].isupper() else [word]
            found |= {name: row for name in of_word if name in names and name not in found}
    return found


def check_read(typed: Collection[str], missed: Mapping[str, Condition], values: Mapping[str, Any]) -> None:
    """Raise UserError, with both names, for the first typed flag that is among those missed. values: of the flags that
    decide.
    """
    for name in sorted(set(typed) & set(missed)):
        row, flag = missed[name], name.replace("_", "-")
        decides, choice = f"--{row.by.replace('_', '-')}", values[row.by]
        shown = (
            f" {choice}"
            if row.by in CHOICES or isinstance(choice, (int, float)) and not isinstance(choice, bool)
            else ""
        )
        by = f"with {decides}{shown}" if choice else f"without {decides}"
        raise UserError(
            f"--{flag} was given, but is not read {by}; expected {row.needs}; leave --{flag} out, or change {decides}",
            "flag-not-read",
            flag=name,
            by=choice if row.by in CHOICES else row.by,
        )


def check_given(cfg: Any, conditions: list[Condition], **known: Any) -> None:
    """`check_read` of the flags that were typed for `cfg`, by conditions on what is `known` only later (flags.RATES,
    ...).
    """
    values = vars(cfg) | known
    check_read(given(cfg), not_read(type(cfg), values, conditions), values)


def unknown_flag(cls: type, name: str) -> str | None:
    """None if `name` is a field of `cls` (or its --no- form); otherwise a hint that ends in the nearest name."""
    names = [f.name for f in dataclasses.fields(cls)]
    if name in names or name in ("help",) or (name.startswith("no_") and name[3:] in names):
        return None
    return nearest(name.replace("_", "-"), [n.replace("_", "-") for n in names], prefix="--")


def nearest(name: str, names: list[str], prefix: str = "") -> str:
    """'; did you mean X?' for the closest of `names`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def split_weight(part: str, known: Callable[[str], bool]) -> tuple[str, str]:
    """NAME:WEIGHT of a mixture as (name, weight as it was typed); "1" without one.

    known: whether a name stands for something. A path may have colons of its own: they stay with a part that is known
    as a whole, unless what precedes the last one is known too and a number follows; and with one that is not known at
    all and does not end with a number."""
    name, colon, weight = part.rpartition(":")
    try:
        number = float(weight) is not None
    except ValueError:
        number = False
    weighted = known(name) and number if known(part) else known(name) or number
    return (name, weight) if colon and weighted else (part, "1")


def to_json(config: Any) -> dict[str, Any]:
    """The dataclass as a JSON-ready dict."""
    return dataclasses.asdict(config)


def from_json(cls: type[T], values: dict[str, Any]) -> T:
    """Rebuild `cls` from `to_json`'s dict. Raises UserError for a field that `cls` does not have, and for infinity or
    "not a number".
    """
    names = [f.name for f in dataclasses.fields(cls)]
    for key, value in values.items():
        if key not in names:
            raise UserError(
                f"{cls.__name__} has no field {key!r}{nearest(key, names)}; the file is from another version of nanolab"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(
                f"{key} is {value:g}; expected a finite number; correct it in the file",
                "flag-out-of-bounds",
                flag=key,
                value=value,
                bounds="finite",
            )
    return cls(**values)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises UserError for a file that is missing or is not TOML."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors; brackets nested too deep
        raise UserError(
            f'{path} cannot be read as TOML ({error}); expected lines like name = "nanolab"; mend it or name another'
        ) from None


def main(command: Callable[[], Any]) -> None:
    """Run a script's body: a UserError becomes one message on stderr and exit code 1; Ctrl-C becomes 130, a reader that
    has gone (`| head`) 141.

    What stdout's encoding lacks is printed as "?". Stderr needs nothing: Python writes escapes there.
    """
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # not where a test or a notebook put a stream of its own
            stream.reconfigure(errors="replace")
    try:
        try:
            code = command()
        except UserError as error:
            # it may quote what others wrote
            print(f"error{f' [{error.code}]' if error.code else ''}: {harmless(str(error))}", file=sys.stderr)
            code = 1
        except KeyboardInterrupt:
            code = 130
        except SystemExit as leaving:  # after --help, or a signal; rich ends with 1 where the reader has gone
            code = 141 if isinstance(leaving.__context__, BrokenPipeError) else leaving.code
        if sys.stdout is not None:
            sys.stdout.flush()  # not at exit, where an error cannot be caught
    except BrokenPipeError:
        if not (gone := [stream for stream in (sys.stdout, sys.stderr) if unread(stream)]):
            raise  # another pipe: a bug
        for stream in gone:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for what is still in its buffer
        code = 141  # 128 + SIGPIPE
    raise SystemExit(code if isinstance(code, (int, str)) else 0)


def unread(stream: Any) -> bool:
    """Whether `stream` is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except (AttributeError, OSError):  # no stream, or one without a file
        return False
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))

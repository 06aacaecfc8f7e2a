"""Which flags are read under which choice, and which values a number may have: two tables, for every command.

Pure data: imports nothing of nanolab. cli.py checks both, in `parse` and wherever flags are read from a file.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Condition(NamedTuple):
    """Flags that are read only under some choice."""

    flags: str  # names, with blanks between them; a name in capitals is a config: all its flags
    by: str  # the flag that decides
    read: Callable[[Any], bool]  # of the config
    needs: str  # what to type for them to be read


# flags that an error shows with their value
CHOICES = ("positions", "attention", "normaliser", "window_pattern", "recipe", "modes", "what")
ADAM = ("adamw_cosine", "adam_constant")
LIKELIHOOD = {"core", "hellaswag", "lambada"}


def turns(c: Any) -> bool:
    """Whether positions turn in some layer."""
    pattern = c.position_pattern.split(",")
    return (
        c.positions == "rope" or c.positions == "rnope" and "R" in [pattern[i % len(pattern)] for i in range(c.depth)]
    )


def has_window(c: Any) -> bool:
    """Whether some layer is one that sees a window only. The last one is not, unless the pattern is rope."""
    letters = c.window_pattern or "L"
    return turns(c) if letters == "rope" else "S" in [letters[i % len(letters)] for i in range(c.depth - 1)]


def has_vectors(c: Any) -> bool:
    """Whether the model has parameters at --scalar-lr: weights of the stream, gains, biases, sinks."""
    return (
        c.residual_scalars or c.norm_gain or bool(c.bias) or c.normaliser == "sink" or c.qk_norm in ("layernorm", "l2")
    )


def has_tables(c: Any) -> bool:
    """Whether the model has tables at --embedding-lr: a tied one is trained as the head."""
    return not c.tied_head or c.value_embeds or c.positions == "learned"


def on_the_hub(c: Any) -> bool:
    """Whether a part of --data is a corpus of the hub: neither pydocs nor a path."""
    return any(
        name.split(":")[0].strip() != "pydocs"
        for name in c.data.split(",")
        if "/" not in name and "." not in name.split(":")[0]
    )


def built(c: Any) -> bool:
    """Whether a part of --data is a corpus that is built or downloaded: not a path."""
    return any("/" not in name and "." not in name.split(":")[0] for name in c.data.split(","))


def modes(c: Any) -> set[str]:
    return {mode.strip() for mode in c.modes.split(",")}


# The rates of a recipe: for fine-tuning too, where the recipe is that of the model it starts from
RATES = [
    Condition(
        "learning_rate beta1 beta2 eps",
        "recipe",
        lambda c: c.recipe != "dial",
        "--recipe adamw_cosine or adam_constant",
    ),
    Condition(
        "embedding_lr unembedding_lr matrix_lr scalar_lr", "recipe", lambda c: c.recipe not in ADAM, "--recipe dial"
    ),
]

# Of a model that is known once it is loaded (chat_cli), and of tasks once they are opened (chat_eval)
ANSWERING = [Condition("system tool", "model", lambda c: c.answers, "a model that answers, or --chat")]
SAMPLING = [
    Condition(
        "num_samples temperature top_k max_tokens tool",
        "tasks",
        lambda c: c.sampled,
        "a task whose replies are sampled",
    )
]

TURNING = "--positions rope, or rnope with an R in --position-pattern"
EVALUATED, LOGGED = "--eval-every with a number of steps", "--log-every with a number of steps"
ANOTHER_RUN = "another --run: dummy is the name of runs without wandb"

# config -> its conditions; those of its bases apply too
CONDITIONS: dict[str, list[Condition]] = {
    "ModelFlags": [
        Condition("rope_base rope_layout rope_scaling rope_fraction", "positions", turns, TURNING),
        Condition(
            "rope_fraction",
            "attention",
            lambda c: c.attention != "mla",
            "--attention mha or gqa:G (of mla --mla-rope-dim says it)",
        ),
        Condition("position_pattern", "positions", lambda c: c.positions == "rnope", "--positions rnope"),
        Condition(
            "mla_kv_rank mla_q_rank mla_rope_dim", "attention", lambda c: c.attention == "mla", "--attention mla"
        ),
        Condition("mla_rope_dim", "positions", turns, TURNING),
        Condition("window_size", "window_pattern", has_window, "--window-pattern with an S before the last layer"),
        Condition("softmax_n", "normaliser", lambda c: c.normaliser == "softmax_n", "--normaliser softmax_n"),
    ],
    "DataConfig": [
        Condition("data", "data_dir", lambda c: not c.data_dir, "one of the two"),
        Condition("num_shards", "data_dir", lambda c: not c.data_dir, "--data with a corpus of the hub"),
        Condition("num_shards", "data", lambda c: not c.data or on_the_hub(c), "--data with a corpus of the hub"),
    ],
    "DataBuildConfig": [
        Condition("workers", "data_dir", lambda c: not c.data_dir, "--data with the name of a corpus"),
        Condition("workers", "data", built, "--data with the name of a corpus"),
    ],
    "BaseTrainConfig": [
        *RATES,
        Condition("embedding_lr", "tied_head", has_tables, "--no-tied-head, --value-embeds or --positions learned"),
        Condition(
            "scalar_lr", "residual_scalars", has_vectors, "--residual-scalars, --norm-gain or another part with vectors"
        ),
        Condition("warmdown_ratio", "recipe", lambda c: c.recipe not in ADAM, "--recipe dial"),
        Condition(
            "weight_decay warmup_steps final_lr_frac",
            "recipe",
            lambda c: c.recipe != "adam_constant",
            "--recipe dial or adamw_cosine",
        ),
        Condition(
            "final_lr_frac",
            "warmdown_ratio",
            lambda c: c.recipe != "dial" or c.warmdown_ratio > 0,
            "--warmdown-ratio above 0",
        ),
        Condition(
            "target_flops target_param_data_ratio max_seconds",
            "num_iterations",
            lambda c: c.num_iterations < 1,
            "one horizon",
        ),
        Condition("target_param_data_ratio max_seconds", "target_flops", lambda c: c.target_flops <= 0, "one horizon"),
        Condition("max_seconds", "target_param_data_ratio", lambda c: c.target_param_data_ratio <= 0, "one horizon"),
        Condition("plan_for", "dry_run", lambda c: c.dry_run, "--dry-run"),
        Condition("device_type", "plan_for", lambda c: not c.plan_for, "one of the two"),
        Condition("eval_tokens", "eval_every", lambda c: c.eval_every > 0, EVALUATED),
        Condition(
            "core_metric_max_per_task eval_bundle",
            "core_metric_every",
            lambda c: c.core_metric_every > 0,
            "--core-metric-every with a number of steps",
        ),
        Condition("log_grad_norm", "log_every", lambda c: c.log_every > 0, LOGGED),
        Condition("wandb", "run", lambda c: c.run != "dummy", ANOTHER_RUN),
    ],
    "BaseEvalConfig": [
        Condition("num_shards", "hf", lambda c: not c.hf or bool(c.data), "--data with a corpus of the hub"),
        Condition(
            "data data_dir val_data num_shards split_tokens device_batch_size",
            "modes",
            lambda c: "bpb" in modes(c),
            "bpb among --modes",
        ),
        Condition("train_text", "modes", lambda c: "bpb" in modes(c), "bpb among --modes"),
        Condition(
            "train_text",
            "all_checkpoints",
            lambda c: not c.all_checkpoints,
            "one of the two: along a curve, only validation text is scored",
        ),
        Condition("seed", "modes", lambda c: "sample" in modes(c), "sample among --modes"),
        Condition(
            "seed",
            "all_checkpoints",
            lambda c: not c.all_checkpoints,
            "one of the two: nothing is sampled along a curve",
        ),
        Condition("seed", "hf", lambda c: not c.hf, "--model: of a model of --hf only greedy texts are written"),
        Condition("trust_code", "hf", lambda c: bool(c.hf), "--hf"),
        Condition(
            "max_per_task", "modes", lambda c: bool(modes(c) & LIKELIHOOD), "core, hellaswag or lambada among --modes"
        ),
        Condition("extra", "modes", lambda c: "core" in modes(c), "core among --modes"),
        Condition("hellaswag hellaswag_bos", "modes", lambda c: "hellaswag" in modes(c), "hellaswag among --modes"),
        Condition(
            "eval_bundle", "modes", lambda c: bool(modes(c) & LIKELIHOOD), "core, hellaswag or lambada among --modes"
        ),
        Condition(
            "eval_bundle",
            "hellaswag",
            lambda c: not c.hellaswag or bool(modes(c) & {"core", "lambada"}),
            "one of the two",
        ),
    ],
    "SFTConfig": [
        Condition("tasks", "stages", lambda c: not c.stages, "one of the two: each stage of --stages has tasks"),
        Condition("epochs", "num_iterations", lambda c: c.num_iterations < 1, "one of the two"),
        Condition("final_lr_frac", "warmdown_ratio", lambda c: c.warmdown_ratio > 0, "--warmdown-ratio above 0"),
        Condition("eval_tokens eval_text", "eval_every", lambda c: c.eval_every > 0, EVALUATED),
        Condition(
            "chatcore_tasks chatcore_max_cat chatcore_max_sample",
            "chatcore_every",
            lambda c: c.chatcore_every > 0,
            "--chatcore-every with a number of steps",
        ),
        Condition("log_grad_norm", "log_every", lambda c: c.log_every > 0, LOGGED),
        Condition("wandb", "run", lambda c: c.run != "dummy", ANOTHER_RUN),
    ],
    "RLConfig": [
        Condition(
            "clip_low clip_high",
            "updates_per_batch",
            lambda c: c.updates_per_batch > 1,
            "--updates-per-batch above 1: before the second update nothing is clipped",
        ),
        Condition("num_epochs", "num_iterations", lambda c: c.num_iterations < 1, "one of the two"),
        Condition("final_lr_frac", "warmdown_ratio", lambda c: c.warmdown_ratio > 0, "--warmdown-ratio above 0"),
        Condition("eval_split eval_examples eval_samples", "eval_every", lambda c: c.eval_every > 0, EVALUATED),
        Condition("log_grad_norm", "log_every", lambda c: c.log_every > 0, LOGGED),
        Condition("wandb", "run", lambda c: c.run != "dummy", ANOTHER_RUN),
    ],
    "ChatEvalConfig": [Condition("top_k", "temperature", lambda c: c.temperature > 0, "--temperature above 0")],
    "ChatConfig": [
        Condition("system tool", "raw", lambda c: not c.raw, "--chat"),
        Condition(
            "top_k top_p seed", "temperature", lambda c: c.temperature > 0 or not c.prompt, "--temperature above 0"
        ),
    ],
    "ServeConfig": [Condition("api_key_env", "api_key", lambda c: not c.api_key, "one of the two")],
    "BenchConfig": [
        Condition(
            "steps warmup recipe grad_clip fp8 deterministic", "what", lambda c: c.what == "train", "bench train"
        ),
        Condition("device_batch_size", "what", lambda c: c.what in ("train", "data"), "bench train or data"),
        Condition(
            "DataConfig tokenizer megabytes",
            "what",
            lambda c: c.what in ("data", "tokenizer"),
            "bench data or tokenizer",
        ),
        Condition(
            "prompt_tokens decode_tokens batch_sizes clients int8", "what", lambda c: c.what == "infer", "bench infer"
        ),
        Condition("eval_bundle max_per_task", "what", lambda c: c.what == "eval", "bench eval"),
        Condition("model", "what", lambda c: c.what in ("infer", "eval"), "bench infer or eval"),
        Condition("max_seq_len", "what", lambda c: c.what != "tokenizer", "bench train, data, infer or eval"),
        Condition(
            "vocab_size",
            "tokenizer",
            lambda c: not c.tokenizer or c.what not in ("data", "tokenizer"),
            "one of the two",
        ),
        Condition(
            "Architecture depth aspect_ratio head_dim attn_kernel",
            "what",
            lambda c: c.what in ("train", "infer", "eval"),
            "bench train, infer or eval",
        ),
        Condition(
            "ModelFlags vocab_size attn_kernel",
            "model",
            lambda c: not c.model or c.what not in ("infer", "eval"),
            "a model of random weights",
        ),
    ],
}


class Bounds(NamedTuple):
    """The values that a number may have. Infinity and "not a number" are never among them."""

    low: float
    high: float = math.inf
    low_too: bool = True
    high_too: bool = True
    also: tuple[float, ...] = ()  # values with a meaning of their own, which the flag's help says

    def holds(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        above = value >= self.low if self.low_too else value > self.low
        below = value <= self.high if self.high_too else value < self.high
        return above and below or value in self.also

    def __str__(self) -> str:
        text = f"{'at least' if self.low_too else 'above'} {self.low:g}"
        if self.high < math.inf:
            text += f" and {'at most' if self.high_too else 'below'} {self.high:.20g}"
        return text + "".join(f", or {value:g}" for value in self.also)


def at_least(low: float, *also: float) -> Bounds:
    return Bounds(low, also=also)


def above(low: float, *also: float) -> Bounds:
    return Bounds(low, low_too=False, also=also)


class OneOf(NamedTuple):
    """The values that a text may have."""

    values: tuple[str, ...]
    count: bool = False  # or a whole number from 1 on

    def holds(self, value: str) -> bool:
        return value in self.values or self.count and value.isdecimal() and int(value) >= 1

    def __str__(self) -> str:
        return (
            f"one of {', '.join(self.values)}"
            if not self.count
            else f"a whole number from 1 on, or {' or '.join(self.values)}"
        )


COUNT, COUNT_OR_AUTO, POSITIVE_OR_AUTO, FROM_0 = at_least(1), at_least(1, -1), above(0, -1), at_least(0)
SHARE, SHARE_BELOW_1 = Bounds(0, 1), Bounds(0, 1, high_too=False)

# config -> the bounds of its numbers, and of texts that are checked late; "": wherever nothing else is said of the name
BOUNDS: dict[str, dict[str, Bounds | OneOf]] = {
    "": {
        "seed": Bounds(0, 2**63, high_too=False),
        "threads": FROM_0,
        "workers": COUNT,
        "vocab_size": COUNT,
        # horizon and batch
        "num_iterations": COUNT_OR_AUTO,
        "epochs": COUNT,
        "num_epochs": COUNT,
        "max_seq_len": COUNT,
        "device_batch_size": COUNT,
        "total_batch_size": COUNT_OR_AUTO,
        # optimization
        "warmup_steps": FROM_0,
        "warmup_ratio": SHARE,
        "warmdown_ratio": SHARE,
        "final_lr_frac": SHARE,
        "init_lr_frac": above(0),
        "weight_decay": FROM_0,
        "grad_clip": POSITIVE_OR_AUTO,
        # cadences, and what is measured at them
        "eval_every": COUNT_OR_AUTO,
        "save_every": COUNT_OR_AUTO,
        "log_every": COUNT_OR_AUTO,
        "eval_tokens": COUNT_OR_AUTO,
        "max_per_task": COUNT_OR_AUTO,
        "keep": OneOf(("all",), count=True),
        "wandb": OneOf(("off", "offline", "online")),
        # sampling
        "temperature": FROM_0,
        "top_k": FROM_0,
        "top_p": SHARE,
        "max_tokens": COUNT,
        "num_samples": COUNT,
    },
    "Architecture": {
        "rope_base": above(0),
        "rope_fraction": Bounds(0, 1, low_too=False),
        "mla_kv_rank": FROM_0,
        "mla_q_rank": FROM_0,
        "mla_rope_dim": at_least(0, -1),
        "window_size": FROM_0,
        "softmax_n": FROM_0,
        "qk_gain": FROM_0,
        "score_softcap": FROM_0,
        "softcap": FROM_0,
        "pad_vocab_to": COUNT,
        "embed_dropout": SHARE_BELOW_1,
        "attn_dropout": SHARE_BELOW_1,
        "resid_dropout": SHARE_BELOW_1,
        "mlp_dropout": SHARE_BELOW_1,
    },
    "GPTConfig": {"sequence_len": COUNT, "n_layer": COUNT, "n_head": COUNT, "n_embd": COUNT, "bos": at_least(0, -1)},
    "ModelFlags": {"depth": COUNT, "aspect_ratio": COUNT, "head_dim": COUNT},
    "DataConfig": {"num_shards": COUNT_OR_AUTO},
    "TokTrainConfig": {"max_chars": COUNT, "doc_cap": COUNT},
    "BaseTrainConfig": {
        "target_flops": POSITIVE_OR_AUTO,
        "target_param_data_ratio": POSITIVE_OR_AUTO,
        "max_seconds": POSITIVE_OR_AUTO,
        "embedding_lr": FROM_0,
        "unembedding_lr": FROM_0,
        "matrix_lr": FROM_0,
        "scalar_lr": FROM_0,
        "learning_rate": FROM_0,
        "lr_scale": POSITIVE_OR_AUTO,
        "beta1": SHARE_BELOW_1,
        "beta2": SHARE_BELOW_1,
        "eps": above(0),
        "sample_every": COUNT_OR_AUTO,
        "core_metric_every": COUNT_OR_AUTO,
        "core_metric_max_per_task": COUNT_OR_AUTO,
    },
    "InspectConfig": {"context": FROM_0},
    "BaseEvalConfig": {"split_tokens": COUNT_OR_AUTO},
    "ContaminationConfig": {"ngram": COUNT},
    "SFTConfig": {
        "replay": SHARE_BELOW_1,
        "max_seq_len": COUNT_OR_AUTO,
        "device_batch_size": COUNT_OR_AUTO,
        "embedding_lr": at_least(0, -1),
        "unembedding_lr": at_least(0, -1),
        "matrix_lr": at_least(0, -1),
        "learning_rate": at_least(0, -1),
        "chatcore_every": COUNT_OR_AUTO,
        "chatcore_max_cat": COUNT_OR_AUTO,
        "chatcore_max_sample": COUNT_OR_AUTO,
    },
    "RLConfig": {
        "clip_low": Bounds(0, 1, high_too=False, also=(-1,)),
        "clip_high": at_least(0, -1),
        "kl": at_least(0, -1),
        "updates_per_batch": COUNT,
        "examples_per_step": COUNT,
        "num_samples": at_least(2),
        "max_new_tokens": COUNT,
        "temperature": above(0),
        "rollout_batch_size": FROM_0,
        "embedding_lr": at_least(0, -1),
        "unembedding_lr": at_least(0, -1),
        "matrix_lr": at_least(0, -1),
        "learning_rate": at_least(0, -1),
        "eval_examples": COUNT_OR_AUTO,
        "eval_samples": COUNT,
    },
    "ChatEvalConfig": {"max_problems": COUNT_OR_AUTO},
    "GenChatConfig": {"num": COUNT, "max_tokens": FROM_0, "timeout": above(0)},
    "ServeConfig": {
        "port": Bounds(0, 65535),
        "max_rows": COUNT,
        "queue": FROM_0,
        "replicas": COUNT,
        "prefix_mb": FROM_0,
        "drain_seconds": FROM_0,
    },
    "ReportConfig": {"price_per_hour": FROM_0},
    "BenchConfig": {
        "repeats": COUNT,
        "steps": COUNT,
        "warmup": COUNT,
        "megabytes": above(0),
        "prompt_tokens": at_least(2),
        "decode_tokens": at_least(4),
        "clients": COUNT,
        "max_per_task": COUNT,
    },
}

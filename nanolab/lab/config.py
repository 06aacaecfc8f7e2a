"""Flags of the benchmarks and of the lab. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated

from nanolab.cli import Condition, Count, NonNegativeInt, OneOf, PositiveFloat, PositiveOrAuto, Seed, at_least
from nanolab.data.config import DataConfig
from nanolab.model.config import ModelFlags
from nanolab.stages.config import BaseTrainConfig


@dataclass(frozen=True)
class BenchConfig(ModelFlags, DataConfig):
    """Measure speed: of a training step, of the data path, of the tokenizer, of generation, or of evaluation."""

    what: str = "train"  # train | data | tokenizer | infer | eval; the first argument
    json: bool = False  # last line of output is one JSON document
    repeats: Count = 5  # measurements; the median is reported
    seed: Seed = 42  # seed of weights, tokens and documents
    # train: synthetic tokens, one forward and backward pass and one optimizer step
    steps: Count = 5  # steps in one measurement
    warmup: Count = 3  # steps before the first measurement
    depth: Count = 4
    recipe: str = "dial"  # dial | adamw_cosine | adam_constant
    grad_clip: PositiveOrAuto = -1.0  # largest L2 norm of all gradients together; -1: off
    max_seq_len: Count = 512  # T, context length in tokens; of data too
    vocab_size: Count = 8192  # tokenizer size of the model; for data and tokenizer, of the tokenizer that is trained
    device_batch_size: Count = 8  # rows in one forward pass; of data too
    attn_kernel: str = ""  # eager | sdpa | banded | flex | fa3; default: as in base_train
    fp8: bool = False  # matrix multiplications in 8-bit floats
    deterministic: bool = False  # on a GPU: only algorithms that give the same numbers each time
    device_type: str = ""  # cuda | mps | cpu; default: the best there is
    threads: NonNegativeInt = 0  # CPU threads; 0: all
    # data and tokenizer: real documents of --data or --data-dir
    tokenizer: str = ""  # folder or file; default: one is trained on the documents that are read
    megabytes: PositiveFloat = 8.0  # text to read
    # infer: replies as the server makes them, greedy and without stops
    model: str = ""  # NAME[@STEP|best]; default: random weights in the shape that the flags above say
    prompt_tokens: Annotated[int, at_least(2)] = 128  # tokens of a prompt
    decode_tokens: Annotated[int, at_least(4)] = 64  # tokens of a reply
    batch_sizes: str = "1,8,32,128"  # rows at once
    # requests that come one by one and run at once, their lengths from 0.5 to 1.5 times those above
    clients: Count = 16
    int8: bool = False  # weights in 8 bits; needs torchao
    # folder of the evaluation bundle, with --model; default: random tokens in the shapes of its tasks
    eval_bundle: str = ""
    max_per_task: Count = 20  # examples of each task

    GROUPS = {
        "": "what depth repeats json",
        "run": "seed device_type threads",
        "train": "steps warmup recipe grad_clip max_seq_len device_batch_size fp8 deterministic",
        "data": "DataConfig tokenizer megabytes",
        "infer": "model prompt_tokens decode_tokens batch_sizes clients int8",
        "eval": "eval_bundle max_per_task",
        "model": "ModelFlags vocab_size attn_kernel Architecture",
    }
    CONDITIONS = [
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
    ]


@dataclass(frozen=True)
class LabConfig:
    """From a question to a verdict: run a study, check its design, say its verdict; a mean against a bar."""

    what: str = "run"  # run | check | sweep | verdict | page | try | compare | threshold; the first argument
    # the study's TOML file (nanolab/lab/study.py); of threshold: runs or numbers, joined by commas; the second argument
    study: str = ""
    scale: str = ""  # one of the study's [scales]; default: the first
    jobs: NonNegativeInt = 0  # runs at a time; 0: one for each core or GPU, of --slurm all
    # of run: jobs of a SLURM cluster, for example partition=gpu,timeout_min=60; default: processes of this machine
    slurm: str = ""
    metric: str = "val/bpb"  # what of the runs' results threshold compares; A.B is B inside A
    above: float | None = None  # the bar that the mean should be above
    below: float | None = None  # the bar that it should be below

    CONDITIONS = [
        Condition("jobs slurm", "what", lambda c: c.what in ("run", "sweep"), "lab run or sweep"),
        Condition("scale", "what", lambda c: c.what != "threshold", "lab run, check, sweep, verdict or page"),
        Condition("metric above below", "what", lambda c: c.what == "threshold", "lab threshold"),
    ]


@dataclass(frozen=True)
class TryConfig(BaseTrainConfig):
    """Compare flags with others in one line: lab try FLAGS --against FLAGS, then flags of both."""

    idea: str = ""  # flags of the idea; the first argument after try
    against: str = ""  # flags of what it is compared with
    seeds: str = "42,43,44"  # seeds, joined by commas
    matters: PositiveFloat = 0.01  # the smallest difference in bits per byte that matters
    jobs: NonNegativeInt = 0  # runs at a time; 0: one for each core or GPU

    GROUPS = {
        "": "idea against seeds matters jobs",
        **{title or "both": words for title, words in BaseTrainConfig.GROUPS.items()},
    }


@dataclass(frozen=True)
class CompareConfig:
    """Compare two revisions of the code: lab compare A B [-- flags of scripts.base_train, for the runs of both]."""

    a: str = ""  # the baseline: a git revision, or the folder of a working tree; the first argument after compare
    b: str = ""  # what is compared with it, likewise; the second argument
    seeds: str = "42,43,44"  # seeds, joined by commas
    matters: PositiveFloat = 0.01  # the smallest difference of the metric that matters
    metric: str = "val/bpb"  # what of the runs' results is compared; A.B is B inside A
    direction: Annotated[str, OneOf(("lower", "higher"))] = "lower"  # which is better
    budget: str = ""  # time in which pairs of runs may begin, for example 20m or 1h30m; default: no limit


PLACES = {"try": ("--idea",), "compare": ("--a", "--b")}  # the arguments after the first one; of the others: --study
OF_TRY = tuple(f"--{name}" for name in TryConfig.__annotations__)


def spelled_out(argv: list[str]) -> tuple[list[str], list[str]]:
    """(words, those after --). The first words say what to do and with what. A flag of try and its value become one
    word.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    argv, after = argv[:end], argv[end + 1 :]
    words = []
    for name in ("--what", *PLACES.get(" ".join(argv[:1]), ("--study",))):
        if argv and (not argv[0].startswith("-") or " " in argv[0]):
            words.append(f"{name}={argv.pop(0)}")
    left = iter(argv)
    for word in left:
        words.append(f"{word}={next(left, '')}" if words[:1] == ["--what=try"] and word in OF_TRY else word)
    return words, after

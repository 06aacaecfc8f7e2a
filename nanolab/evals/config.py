"""Flags of the evaluations and the report. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from nanolab.cli import Condition, Count, CountOrAuto, NonNegativeFloat, NonNegativeInt, Seed
from nanolab.data.config import DataConfig
from nanolab.evals.modes import MODES
from nanolab.evals.probes import PROBES

LIKELIHOOD = {name for name, mode in MODES.items() if mode.questions}
# read once the tasks are open
SAMPLING = [
    Condition("num_samples temperature top_k max_tokens tool", "tasks", lambda c: c.sampled, "a task that is sampled")
]


def modes(c: Any) -> set[str]:
    return {mode.strip() for mode in c.modes.split(",")}


@dataclass(frozen=True)
class BaseEvalConfig(DataConfig):
    """Evaluate a base model: bits per byte, samples, and with --modes in-context tasks and probes."""

    data: str = ""  # corpus name, or a weighted mixture; default: the run's own data
    # NAME[@STEP|best]; default: the newest finished run; with --all-checkpoints also several, NAME,NAME
    model: str = ""
    hf: str = ""  # folder of a causal language model of Hugging Face, to evaluate instead of a run
    trust_code: bool = False  # run Python code that the folder of --hf brings
    # any of bpb,sample,core,hellaswag,lambada, and of the probes lengths,attention,kurtosis,
    # perplexity,passkey,gold
    modes: str = "bpb,sample"
    all_checkpoints: bool = False  # every checkpoint of the run, and the curve of each mode's score over training
    # folder of the results; default: the run's directory, or eval/NAME-WEIGHTS in the base directory with --hf
    out: str = ""
    split_tokens: CountOrAuto = -1  # tokens of each split at most; -1: 40 x 524288 on a GPU, 524288 on a CPU
    train_text: bool = True  # score training text too, beside the validation text
    probe_tokens: CountOrAuto = -1  # validation tokens of each probe at most; -1: 1048576 on a GPU, 8192 on a CPU
    device_batch_size: Count = 32  # rows of text in one forward pass on one device
    # folder of the evaluation bundle; default: eval_bundle in the base directory, downloaded if it is not there
    eval_bundle: str = ""
    max_per_task: CountOrAuto = -1  # items of each task at most, drawn by a fixed seed; -1: all
    extra: bool = False  # with core, also run the tasks of the bundle's extra.yaml, which do not count
    hellaswag: str = ""  # HellaSwag as its authors publish it (jsonl with ctx, endings, label); default: the bundle's
    hellaswag_bos: bool = True  # texts of HellaSwag begin as in training; reproductions of GPT-2 go without
    device_type: str = ""  # cuda | mps | cpu; default: the best there is
    seed: Seed = 42  # seed of the samples
    json: bool = False  # last line of output is one JSON document

    GROUPS = {
        "": "model modes all_checkpoints hf trust_code out json",
        "data": "DataConfig split_tokens train_text probe_tokens",
        "tasks": "eval_bundle max_per_task extra hellaswag hellaswag_bos",
        "run": "device_batch_size device_type seed",
    }
    CONDITIONS = [
        Condition("num_shards", "hf", lambda c: not c.hf or bool(c.data), "--data with a corpus of the hub"),
        Condition(
            "data data_dir val_data num_shards device_batch_size",
            "modes",
            lambda c: bool(modes(c) & {"bpb", *PROBES}),
            "bpb or a probe among --modes",
        ),
        Condition("split_tokens train_text", "modes", lambda c: "bpb" in modes(c), "bpb among --modes"),
        Condition("probe_tokens", "modes", lambda c: bool(modes(c) & {*PROBES}), "a probe among --modes"),
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
        Condition("extra", "modes", lambda c: "core" in modes(c), "core among --modes"),
        Condition("hellaswag hellaswag_bos", "modes", lambda c: "hellaswag" in modes(c), "hellaswag among --modes"),
        Condition(
            "max_per_task eval_bundle",
            "modes",
            lambda c: bool(modes(c) & {*LIKELIHOOD, "gold"}),
            "core, hellaswag, lambada or gold among --modes",
        ),
        Condition(
            "eval_bundle",
            "hellaswag",
            lambda c: not c.hellaswag or bool(modes(c) & {"core", "lambada", "gold"}),
            "one of the two",
        ),
    ]


@dataclass(frozen=True)
class ContaminationConfig(DataConfig):
    """Find the items of an evaluation set that share a run of words with the training text."""

    eval_set: str = ""  # a .jsonl file of items, or the folder of an evaluation bundle (core.yaml and extra.yaml)
    ngram: Count = 13  # words in a run
    # folder of contamination.json and contaminated.jsonl; default: contamination/NAME in the base directory
    out: str = ""
    json: bool = False  # last line of output is one JSON document


@dataclass(frozen=True)
class ChatEvalConfig:
    """Evaluate a chat model: questions with options by the letters' logits, others by sampled replies; ChatCORE."""

    model: str = ""  # NAME[@STEP|best]; default: the newest finished run
    # tasks joined by commas: NAME or NAME:SPLIT (tasks/__init__.py; split test); default: all that can be graded and
    # whose data is there; of jsonl=FILE the loss
    tasks: str = ""
    data: str = ""  # local folder of published datasets; default: the hub
    # sampled replies to each problem: pass@1 to pass@num_samples; more than one needs a temperature
    num_samples: Count = 1
    temperature: NonNegativeFloat = 0.0  # sampling temperature; 0: the likeliest token each time
    top_k: NonNegativeInt = 50  # sample from the k likeliest tokens; 0: from all
    max_tokens: Count = 512  # tokens of a sampled reply at most
    tool: str = "calculator"  # calculator | python: what answers the calls in sampled replies; empty: nothing
    # run code that a model writes even where the sandbox lacks landlock or seccomp: it can then do what you can
    allow_unsandboxed: bool = False
    max_problems: CountOrAuto = -1  # problems of each task, a random subset that is the same for every model; -1: all
    device_batch_size: Count = 32  # rows read or replies drawn at once on one device
    device_type: str = ""  # cuda | mps | cpu; default: the best there is
    seed: Seed = 42  # seed of the subset and the samples
    json: bool = False  # last line of output is one JSON document

    GROUPS = {
        "": "model tasks max_problems json",
        "data": "data",
        "sampling": "num_samples temperature top_k max_tokens tool allow_unsandboxed",
        "run": "device_batch_size device_type seed",
    }
    CONDITIONS = [Condition("top_k", "temperature", lambda c: c.temperature > 0, "--temperature above 0")]


@dataclass(frozen=True)
class ReportConfig:
    """Write the card of a model: what each stage of its training brought and cost, how good it is, where it lies."""

    model: str = ""  # NAME[@STEP|best]; default: the newest finished run
    output: str = "report.md"  # a copy is kept in the run directory
    price_per_hour: NonNegativeFloat = 0.0  # price of one device in dollars; 0: no costs
    site: str = ""  # folder of a static site of all studies, reports and runs, made instead of one report
    studies: str = ""  # folder of the studies' results for the site; default: dev/results
    watch: bool = False  # make the site's pages again while runs go on, until Ctrl-C

    CONDITIONS = [
        Condition("model output", "site", lambda c: not c.site, "one of the two"),
        Condition("studies watch", "site", lambda c: bool(c.site), "--site"),
    ]

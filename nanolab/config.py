"""Config = command line = JSON: plain dataclasses, one per command, parsed by tyro. Imports no torch.

A field's trailing comment is its help text. Flag names follow the reference harness (karpathy/nanochat) where it has
one. A cadence or count of -1 means "off" or "automatic", as the comment says.
"""

import dataclasses
import difflib
import sys
from dataclasses import dataclass
from typing import Any, Callable, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """A mistake that a person can mend; the text says what was seen, what was expected and what to type."""


@dataclass(frozen=True)
class GPTConfig:
    """The architecture: everything that is needed to rebuild the module that a checkpoint's weights fit."""

    sequence_len: int = 2048  # longest training row; windows are fractions of it
    vocab_size: int = 32768  # tokenizer size, special tokens included (table rows are padded up to a multiple of 64)
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"  # tiled over layers; S = a quarter of the row, L = the whole row; the last layer is L
    rope_base: float = 100_000.0
    qk_gain: float = 1.2  # multiplies queries and keys after QK norm
    softcap: float = 15.0  # logits become softcap * tanh(logits / softcap)

    def __post_init__(self) -> None:
        _check_gpt(self)


def _check_gpt(c: GPTConfig) -> None:
    for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
        if getattr(c, name) < 1:
            raise UserError(f"{name} is {getattr(c, name)}; expected at least 1")
    if c.n_embd % c.n_head or (c.n_embd // c.n_head) % 2:
        raise UserError(
            f"width {c.n_embd} over {c.n_head} heads gives head size {c.n_embd / c.n_head:g}; rotary positions need an even "
            f"whole number; choose --head-dim so that it divides the width"
        )
    if c.n_head % c.n_kv_head:
        raise UserError(f"n_head {c.n_head} is not a multiple of n_kv_head {c.n_kv_head}; try n_kv_head {c.n_head}")
    if not c.window_pattern or set(c.window_pattern) - set("SL"):
        raise UserError(f"window pattern {c.window_pattern!r} has letters other than S and L; try --window-pattern SSSL")
    if c.n_embd < 32:
        raise UserError(f"width {c.n_embd} is below 32, which the smear and value gates read; raise --depth or --aspect-ratio")


@dataclass
class DataConfig:
    """Where documents come from."""

    data: str = "pydocs"  # corpus name, or a weighted mixture such as pydocs:0.7,tinystories:0.3
    data_dir: str = ""  # a folder or file of your own text (parquet with a `text` column, .jsonl, .txt); overrides --data
    val_data: str = ""  # file or folder that is the validation text; default: the corpus's own, or a pinned split
    num_shards: int = -1  # training shards to use of a hub corpus; -1: those that are on disk, at least 8


@dataclass
class DataBuildConfig(DataConfig):
    """Build or download a corpus and say what it holds."""

    workers: int = 4  # parallel downloads or builders
    json: bool = False  # last line of output is one JSON document


@dataclass
class TokTrainConfig(DataConfig):
    """Train the byte-level BPE tokenizer."""

    vocab_size: int = 32768  # special tokens included
    max_chars: int = 2_000_000_000  # characters to read
    doc_cap: int = 10_000  # characters read of one document
    tokenizer: str = ""  # folder to write tokenizer.json to; default: tokenizer/ in the base directory
    seed: int = 1


@dataclass
class TokEvalConfig(DataConfig):
    """Compare the tokenizer with GPT-2's and GPT-4's on several kinds of text."""

    tokenizer: str = ""  # folder or file of the tokenizer; default: tokenizer/ in the base directory
    json: bool = False  # last line of output is one JSON document


@dataclass
class BaseTrainConfig(DataConfig):
    """Pretrain a model: one dial, --depth, sets everything else."""

    run: str = ""  # run directory under <base>/runs/; default: d<depth>
    resume: bool = False  # continue from the newest valid checkpoint of --run
    dry_run: bool = False  # print the plan and stop
    plan_for: str = ""  # with --dry-run: pretend this hardware, for example 8xH100
    device_type: str = ""  # cuda | mps | cpu; default: the best there is
    seed: int = 42  # governs everything random
    tokenizer: str = ""  # folder of tokenizer.json (or vocab.json + merges.txt); default: tokenizer/ in the base directory
    # architecture
    depth: int = 20  # layers; the dial
    aspect_ratio: int = 64  # width = depth * aspect_ratio, rounded up to a multiple of head_dim
    head_dim: int = 128
    max_seq_len: int = 2048  # T, tokens in a row
    window_pattern: str = "SSSL"  # S = a quarter of the row, L = the whole row
    # horizon: the first one given, in this order
    num_iterations: int = -1  # optimizer steps
    target_flops: float = -1.0  # training FLOPs
    target_param_data_ratio: float = -1.0  # tokens per scaling parameter; 12 if no horizon is given
    max_seconds: float = -1.0  # training time; schedules follow the clock
    # batch
    device_batch_size: int = 32  # rows in one forward pass on one device
    total_batch_size: int = -1  # tokens in one optimizer step; -1: by the scaling law
    # optimization
    embedding_lr: float = 0.3
    unembedding_lr: float = 0.008
    matrix_lr: float = 0.02
    scalar_lr: float = 0.5
    weight_decay: float = 0.28  # Muon's at the reference point; the dial scales it
    lr_scale: float = -1.0  # multiplies every learning rate; -1: sqrt(batch / 2^19), the batch law (small batches do better with 0.5 to 1)
    warmup_steps: int = 40
    warmdown_ratio: float = 0.65
    final_lr_frac: float = 0.05
    # cadences in steps; -1 is off
    eval_every: int = 250  # validation bits per byte
    eval_tokens: int = -1  # validation tokens at most; -1: 80 x 524288 on a GPU, 524288 on a CPU
    sample_every: int = 2000
    save_every: int = 1000  # checkpoints; one is always written at the end
    keep: str = "2"  # checkpoints kept beside the best: a number, or all
    log_every: int = 1
    log_grad_norm: bool = False
    wandb: str = "off"  # online | offline | off
    attn_kernel: str = ""  # eager | sdpa | banded; default: the fastest for the device
    threads: int = 0  # CPU threads; 0: all


@dataclass
class BaseEvalConfig(DataConfig):
    """Evaluate a base model: bits per byte and samples."""

    data: str = ""  # default: the run's own data
    model: str = ""  # NAME[@STEP|best]; default: the newest finished run
    modes: str = "bpb,sample"
    split_tokens: int = -1  # tokens of each split at most; -1: 40 x 524288 on a GPU, 524288 on a CPU
    device_batch_size: int = 32
    device_type: str = ""
    seed: int = 42
    json: bool = False  # last line of output is one JSON document


@dataclass
class ChatConfig:
    """Talk to a model in the terminal."""

    model: str = ""  # NAME[@STEP|best]; default: the newest finished run
    prompt: str = ""  # -p TEXT: one reply, then leave
    temperature: float = 0.8
    top_k: int = 50  # 0: off
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 42
    device_type: str = ""


@dataclass
class ReportConfig:
    """Write a short report of a run: what was trained, on how much, how good it is, where it lies."""

    model: str = ""  # NAME[@STEP|best]; default: the newest finished run
    output: str = "report.md"  # a copy is kept in the run directory


@dataclass
class BenchConfig(DataConfig):
    """Measure speed: of a training step, of the data path, or of the tokenizer."""

    what: str = "train"  # train | data | tokenizer; the first argument
    json: bool = False  # last line of output is one JSON document
    repeats: int = 5  # measurements; the median is reported
    seed: int = 42
    # train: synthetic tokens, one forward and backward pass and one optimizer step
    steps: int = 5  # steps in one measurement
    warmup: int = 3  # steps before the first measurement
    depth: int = 4
    aspect_ratio: int = 64
    head_dim: int = 128
    max_seq_len: int = 512  # train and data
    vocab_size: int = 8192  # train; for data and tokenizer, what is trained when --tokenizer is not given
    device_batch_size: int = 8  # train and data
    window_pattern: str = "SSSL"
    attn_kernel: str = ""  # as in base_train
    device_type: str = ""
    threads: int = 0  # CPU threads; 0: all
    # data and tokenizer: real documents of --data or --data-dir
    tokenizer: str = ""  # folder or file; default: one is trained on the documents that are read
    megabytes: float = 8.0  # text to read


def parse(cls: type[T], argv: list[str] | None = None) -> T:
    """Read `argv` (default: the command line) into `cls`. Unknown flags exit with code 2 and the nearest name."""
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    if "-p" in argv and any(f.name == "prompt" for f in dataclasses.fields(cls)):
        argv[argv.index("-p")] = "--prompt"
    for i, arg in enumerate(argv):
        name = arg.split("=")[0]
        if name.startswith("--") and (bad := unknown_flag(cls, name[2:].replace("-", "_"))):
            print(f"{name} is not a flag of this command{bad}; --help lists them", file=sys.stderr)
            raise SystemExit(2)
    return tyro.cli(cls, args=argv)


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


def to_json(config: Any) -> dict[str, Any]:
    """The dataclass as a JSON-ready dict."""
    return dataclasses.asdict(config)


def from_json(cls: type[T], values: dict[str, Any]) -> T:
    """Rebuild `cls` from `to_json`'s dict. Raises UserError for a field that `cls` does not have."""
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise UserError(f"{cls.__name__} has no field {key!r}{nearest(key, names)}; the file is from another version of nanolab")
    return cls(**values)


def main(command: Callable[[], Any]) -> None:
    """Run a script's body: a UserError becomes one message on stderr and exit code 1; Ctrl-C becomes 130."""
    try:
        code = command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(code if isinstance(code, int) else 0)

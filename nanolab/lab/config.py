"""Flags of the benchmarks. Imports no torch."""

from dataclasses import dataclass

from nanolab.data.config import DataConfig
from nanolab.model.config import ModelFlags


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

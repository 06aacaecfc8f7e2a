"""What is evaluated as a base model: a run's checkpoint, or a folder of transformers."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from nanolab.evals.config import BaseEvalConfig

HF_ROW = 2048  # tokens of a row of text at most, for a model from elsewhere


class Subject(NamedTuple):
    """What is evaluated."""

    about: dict[str, Any]  # what a record says of it
    folder: Path  # of its results
    model: Any  # model(inputs, targets, reduction="none"): nats
    tokenizer: Any
    seq_len: int
    pretraining: dict[str, Any] | None  # its flags, where they are known
    # what scores texts, the same one each time; after it the model cannot be trained, but measured as before
    reader: Callable[[], Any]


def of_run(cfg: BaseEvalConfig, found, rt) -> Subject:
    from nanolab.evals.checkpoints import weights_of
    from nanolab.evals.likelihood import GPTReader
    from nanolab.inference.prepare import prepare_for_inference
    from nanolab.records.models import load_model

    model, tokenizer, _ = load_model(found, rt)
    about = {
        "model": found.name,
        "step": found.step,
        "weights": weights_of(found.checkpoint),
        "device": rt.device_name,
        "dtype": rt.dtype_name,
    }
    folder = Path(cfg.out).expanduser() if cfg.out else found.run_dir
    reader = functools.cache(lambda: GPTReader(prepare_for_inference(model), rt))
    return Subject(about, folder, model, tokenizer, model.config.sequence_len, pretraining(found), reader)


def pretraining(found) -> dict[str, Any]:
    """The flags that the model was pretrained with, and the fingerprint of its validation text."""
    from nanolab.records.checkpoint import load_meta
    from nanolab.records.models import read_json

    meta = load_meta(found.checkpoint)
    # a fine-tuned model's is the first model's
    flags = meta["origin"]["pretraining"] if "origin" in meta else read_json(found.run_dir / "config.json")
    return flags | ({"val_fingerprint": meta["val_fingerprint"]} if "val_fingerprint" in meta else {})


def of_folder(cfg: BaseEvalConfig, rt) -> Subject:
    from nanolab.interop.hf_model import load_folder, weights_hash
    from nanolab.runtime import base_dir, print0

    path = Path(cfg.hf).expanduser().resolve()
    reader, tokenizer = load_folder(path, rt, cfg.trust_code)
    print0(f"model {path} in {reader.dtype_name}")
    about = {
        "model": path.name,
        "step": None,
        "hf": str(path),
        "weights": weights_hash(path),
        "device": rt.device_name,
        "dtype": reader.dtype_name,
    }
    folder = Path(cfg.out).expanduser() if cfg.out else base_dir() / "eval" / f"{path.name}-{about['weights'][:8]}"
    return Subject(about, folder, reader, tokenizer, min(reader.limit, HF_ROW), None, lambda: reader)

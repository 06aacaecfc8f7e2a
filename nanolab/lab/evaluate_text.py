"""Bits per byte of a model on training and validation text, by source, beside compressors."""

import math

from nanolab.cli import UserError
from nanolab.data.config import DataConfig
from nanolab.data.corpus import Documents, open_data
from nanolab.data.validation import validation_rows
from nanolab.evals.bpb import bits_per_byte
from nanolab.evals.compressors import AT_MOST, compressor_bpb
from nanolab.evals.config import BaseEvalConfig
from nanolab.lab.subject import Subject
from nanolab.runtime import print0
from nanolab.tables import interval_text, text_table

SPLIT_TOKENS = {"cuda": 40 * 524288}  # tokens of each split, by device; elsewhere:
SPLIT_TOKENS_ELSEWHERE = 524288


def measure_text(cfg: BaseEvalConfig, subject: Subject, rt) -> dict:
    """{"train": {...} (with --train-text), "val": {...}, "domains": {...}, "compressors": {...}}: bits per byte and
    what they were measured on.
    """
    wanted, data = open_text(cfg, subject.pretraining)
    if (subject.pretraining or {}).get("val_fingerprint", data.val_fingerprint) != data.val_fingerprint:
        print0("note: this is not the validation text that the run was measured on while training")
    limit, result = split_tokens(cfg, rt), {"data": wanted.data_dir or wanted.data}
    settings = {"text": data.val_fingerprint, "tokens": limit, "dtype": subject.about["dtype"]}
    result["bpb"] = {"settings": settings, "device": rt.device_name}  # of all that follows
    if cfg.train_text:
        result["train"] = text_bpb(
            cfg, subject, [(source, max(1, round(weight * limit))) for source, weight in data.train], rt
        )
    result["val"] = text_bpb(cfg, subject, [(data.val, limit)], rt, keep=True)
    if domains := domains_of(wanted, data):
        result["domains"] = {
            name: text_bpb(cfg, subject, [(documents, limit // len(domains))], rt)
            for name, documents in domains.items()
        }
    if rt.is_main:
        text = beginning(data.val, min(result["val"]["bytes"], AT_MOST))
        result |= {"compressors": compressor_bpb([text]), "compressor_bytes": len(text)}
    return result


def open_text(cfg: BaseEvalConfig, pretraining: dict | None):
    """(what --data or --data-dir asks for, else the run's own data, --val-data replacing the validation text of either;
    that data).
    """
    wanted = DataConfig(cfg.data or DataConfig.data, cfg.data_dir, cfg.val_data, cfg.num_shards)
    if pretraining and not (cfg.data or cfg.data_dir):
        shards = cfg.num_shards if cfg.num_shards > 0 else pretraining["num_shards"]
        wanted = DataConfig(
            pretraining["data"], pretraining["data_dir"], cfg.val_data or pretraining["val_data"], shards
        )
    return wanted, open_data(wanted, (pretraining or {}).get("seed", 0))


def split_tokens(cfg: BaseEvalConfig, rt) -> int:
    return cfg.split_tokens if cfg.split_tokens > 0 else SPLIT_TOKENS.get(rt.device.type, SPLIT_TOKENS_ELSEWHERE)


def text_bpb(cfg: BaseEvalConfig, subject: Subject, sources: list, rt, keep: bool = False) -> dict:
    """Of these (documents, tokens of them at most) together. keep: nats and bytes of each row too, by which two models
    can be compared.
    """
    import numpy as np

    rows = [validation_rows(documents, subject.tokenizer, subject.seq_len, tokens) for documents, tokens in sources]
    halves = [np.concatenate(parts) for parts in list(zip(*rows))[:2]]
    each: list[tuple[float, int]] = []
    score = bits_per_byte(subject.model, halves, subject.tokenizer.token_bytes(), rt, cfg.device_batch_size, keep=each)
    if not math.isfinite(score.nats):
        expected = (
            "expected a number: its weights are damaged, or too large for their dtype; try NANOLAB_DTYPE=float32 or"
            " another @STEP"
        )
        raise UserError(
            f"the loss of {subject.about['model']} is {score.nats}; {expected}",
            "not-finite",
            model=subject.about["model"],
        )
    found = {
        "bpb": score.bpb,
        "interval": score.interval,
        "nats": score.nats,
        "bytes": score.n_bytes,
        "tokens": score.n_tokens,
    }
    return found | ({"rows": [[round(nats, 3), n] for nats, n in each]} if keep else {})


def domains_of(wanted: DataConfig, data) -> dict:
    """The validation text of each source, or of each file of --val-data; nothing where there is but one."""
    names = [path.name for path in data.val.paths] if wanted.val_data else [source.name for source, _ in data.train]
    texts = {name: Documents(name, [path]) for name, path in zip(names, data.val.paths)}
    return texts if 1 < len(texts) == len(data.val.paths) else {}


def beginning(documents, n_bytes: int) -> bytes:
    """The first bytes of all documents, one after the other: what the model was measured on, in the order of the
    corpus.
    """
    out = bytearray()
    for text in documents.iterate():
        out += text.encode("utf-8", "replace")
        if len(out) >= n_bytes:
            break
    return bytes(out[:n_bytes])


def bpb_table(result: dict) -> list[str]:
    """Bits per byte, one line per reader of the text, then by source."""
    lines = [
        f"bits per byte of {result['model']}{'' if result['step'] is None else '@' + str(result['step'])} on"
        f" {result['data']}"
    ]
    rows = [
        [
            f"model, {label}",
            f"{row['bpb']:.4f}",
            interval_text(row["interval"]),
            f"{row['bytes']:,} bytes, {row['tokens']:,} tokens",
        ]
        for split, label in (("val", "validation"), ("train", "training"))
        if (row := result.get(split))
    ]
    read = read_by_compressors(result)
    rows += [[name, f"{value:.4f}", "-", read] for name, value in result.get("compressors", {}).items()]
    rows += [
        [
            f"model, {name}",
            f"{row['bpb']:.4f}",
            interval_text(row["interval"]),
            f"{row['bytes']:,} bytes of its validation text",
        ]
        for name, row in result.get("domains", {}).items()
    ]
    return lines + text_table({"reader": "left", "bits": "right", "95 % interval": "left", "of": "left"}, rows)


def read_by_compressors(result: dict) -> str:
    n, whole = result.get("compressor_bytes"), result["val"]["bytes"]
    return f"the first {n:,} of these {whole:,} bytes" if n not in (None, whole) else f"the same {whole:,} bytes"

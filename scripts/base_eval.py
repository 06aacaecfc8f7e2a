"""Evaluate a base model: python -m scripts.base_eval [--model NAME | --hf FOLDER] [--modes
bpb,sample,core,hellaswag,lambada].

bpb: bits per byte on training and validation text (--no-train-text: on the latter alone), by source where there are
several, beside compressors on the same validation text. sample: what it writes. core: 22 in-context tasks of the
evaluation bundle (--eval-bundle); hellaswag, lambada: these two by themselves. --max-per-task N takes N items of each
task. Results go to eval_base.json and eval_base.csv in the run directory. --all-checkpoints evaluates every checkpoint
once and draws the curves. Exit code 1: something could not be had."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from nanolab.cli import UserError, as_json, main, nearest, parse
from nanolab.data.config import DataConfig
from nanolab.evals.config import BaseEvalConfig, check_max_per_task

SPLIT_TOKENS = {"cuda": 40 * 524288}  # tokens of each split, by device; elsewhere:
SPLIT_TOKENS_ELSEWHERE = 524288
MODES = ("bpb", "sample", "core", "hellaswag", "lambada")
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


def run(cfg: BaseEvalConfig) -> int:
    modes = [mode.strip() for mode in cfg.modes.split(",") if mode.strip()]
    for mode in modes:
        if mode not in MODES:
            raise UserError(
                f"mode {mode!r} is unknown; expected one or more of"
                f" {', '.join(MODES)}{nearest(mode, list(MODES), prefix='--modes ')}"
            )
    if cfg.hf and (cfg.model or cfg.all_checkpoints):
        raise UserError(
            f"--hf {cfg.hf} with {'--all-checkpoints' if cfg.all_checkpoints else f'--model {cfg.model}'}; expected one"
            " of them; leave one out"
        )
    check_max_per_task(cfg.max_per_task, "--max-per-task")
    from nanolab import runtime
    from nanolab.evals.suite import Suite

    rt = runtime.start(cfg.device_type, seed=cfg.seed)
    try:
        suite = Suite(cfg, modes, rt)
        return evaluate_all(cfg, modes, suite, rt) if cfg.all_checkpoints else evaluate(cfg, modes, suite, rt)
    finally:
        rt.close()


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
    from nanolab.interop.hf_model import load, weights_of
    from nanolab.runtime import base_dir, print0

    path = Path(cfg.hf).expanduser().resolve()
    reader, tokenizer = load(path, rt, cfg.trust_code)
    print0(f"model {path} in {reader.dtype_name}")
    about = {
        "model": path.name,
        "step": None,
        "hf": str(path),
        "weights": weights_of(path),
        "device": rt.device_name,
        "dtype": reader.dtype_name,
    }
    folder = Path(cfg.out).expanduser() if cfg.out else base_dir() / "eval" / f"{path.name}-{about['weights'][:8]}"
    return Subject(about, folder, reader, tokenizer, min(reader.limit, HF_ROW), None, lambda: reader)


def evaluate(cfg: BaseEvalConfig, modes: list[str], suite, rt) -> int:
    from nanolab.evals.likelihood import check_finite
    from nanolab.records.models import find_model
    from nanolab.runtime import print0

    subject = of_folder(cfg, rt) if cfg.hf else of_run(cfg, find_model(cfg.model), rt)
    check_finite(subject.model, subject.tokenizer, rt.device, subject.about["model"])
    result = dict(subject.about)

    def keep(found: dict) -> None:
        """What is found is on disk from here on, whatever ends the evaluation."""
        result.update(found)
        if rt.is_main:
            write(subject.folder, result)

    if "bpb" in modes:
        keep(measure(cfg, subject, rt))
        print0(*table(result), sep="\n")
    if "sample" in modes and rt.is_main:
        keep(samples(cfg, subject, rt))
    reader = subject.reader() if suite.modes else None
    for mode in suite.modes:
        try:
            keep(
                {
                    mode: suite(
                        mode, reader, subject.tokenizer, subject.about["dtype"], lambda found: keep({mode: found})
                    )
                }
            )
        except UserError as error:
            keep({mode: {"failed": {mode: str(error)}}})
            print0(f"failed: {mode}: {error}")
    print0(
        f"written: {subject.folder / 'eval_base.json'}",
        *([f"written: {subject.folder / 'eval_base.csv'}"] if "core" in suite.modes else []),
        sep="\n",
    )
    if cfg.json:
        print0(as_json(result, "the result"))
    rt.barrier()
    return 1 if any(result[mode].get("failed") for mode in suite.modes) else 0


def samples(cfg: BaseEvalConfig, subject: Subject, rt) -> dict:
    """What the model writes, printed; of a model from elsewhere only greedy continuations."""
    from nanolab.evals.samples import PROMPTS, Sample, continue_prompts, one_line, unconditioned
    from nanolab.runtime import print0

    model, tokenizer = subject.model, subject.tokenizer
    if cfg.hf:
        greedy = [
            Sample(prompt, tokenizer.decode(model.greedy([tokenizer.bos, *tokenizer.encode(prompt)], 16)))
            for prompt in PROMPTS
        ]
    else:
        greedy = continue_prompts(model, tokenizer, rt)
    drawn = [] if cfg.hf else unconditioned(model, tokenizer, rt, seed=cfg.seed)
    print0("greedy continuations", *map(one_line, greedy), sep="\n")
    if drawn:
        print0("from nothing, temperature 1", *(f"  {text!r}" for text in drawn), sep="\n")
    return {"samples": [sample._asdict() for sample in greedy], "unconditioned": drawn}


def measure(cfg: BaseEvalConfig, subject: Subject, rt) -> dict:
    """{"train": {...} (with --train-text), "val": {...}, "domains": {...}, "compressors": {...}}: bits per byte and
    what they were measured on.
    """
    from nanolab.evals.compressors import AT_MOST, compressor_bpb
    from nanolab.runtime import print0

    wanted, data = open_text(cfg, subject.pretraining)
    if (subject.pretraining or {}).get("val_fingerprint", data.val_fingerprint) != data.val_fingerprint:
        print0("note: this is not the validation text that the run was measured on while training")
    limit, result = split_tokens(cfg, rt), {"data": wanted.data_dir or wanted.data}
    settings = {"text": data.val_fingerprint, "tokens": limit, "dtype": subject.about["dtype"]}
    result["bpb"] = {"settings": settings, "device": rt.device_name}  # of all that follows
    if cfg.train_text:
        result["train"] = bpb(
            cfg, subject, [(source, max(1, round(weight * limit))) for source, weight in data.train], rt
        )
    result["val"] = bpb(cfg, subject, [(data.val, limit)], rt, keep=True)
    if domains := domains_of(wanted, data):
        result["domains"] = {
            name: bpb(cfg, subject, [(documents, limit // len(domains))], rt) for name, documents in domains.items()
        }
    if rt.is_main:
        text = beginning(data.val, min(result["val"]["bytes"], AT_MOST))
        result |= {"compressors": compressor_bpb([text]), "compressor_bytes": len(text)}
    return result


def open_text(cfg: BaseEvalConfig, pretraining: dict | None):
    """(what --data or --data-dir asks for, else the run's own data, --val-data replacing the validation text of either;
    that data).
    """
    from nanolab.data.corpus import open_data

    wanted = DataConfig(cfg.data or DataConfig.data, cfg.data_dir, cfg.val_data, cfg.num_shards)
    if pretraining and not (cfg.data or cfg.data_dir):
        shards = cfg.num_shards if cfg.num_shards > 0 else pretraining["num_shards"]
        wanted = DataConfig(
            pretraining["data"], pretraining["data_dir"], cfg.val_data or pretraining["val_data"], shards
        )
    return wanted, open_data(wanted, (pretraining or {}).get("seed", 0))


def split_tokens(cfg: BaseEvalConfig, rt) -> int:
    return cfg.split_tokens if cfg.split_tokens > 0 else SPLIT_TOKENS.get(rt.device.type, SPLIT_TOKENS_ELSEWHERE)


def bpb(cfg: BaseEvalConfig, subject: Subject, sources: list, rt, keep: bool = False) -> dict:
    """Of these (documents, tokens of them at most) together. keep: nats and bytes of each row too, by which two models
    can be compared.
    """
    import numpy as np

    from nanolab.data.packing import validation_rows
    from nanolab.evals.bpb import bits_per_byte

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
    from nanolab.data.corpus import Documents

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


def table(result: dict) -> list[str]:
    """Bits per byte, one line per reader of the text, then by source."""
    lines = [
        f"bits per byte of {result['model']}{'' if result['step'] is None else '@' + str(result['step'])} on"
        f" {result['data']}"
    ]
    for split, label in (("val", "model, validation"), ("train", "model, training")):
        if split in result:
            row = result[split]
            lines += [f"  {label:<20}{row['bpb']:>8.4f}   {ends(row)}{row['bytes']:,} bytes, {row['tokens']:,} tokens"]
    lines += [
        f"  {name:<20}{value:>8.4f}   {read_by_compressors(result)}"
        for name, value in result.get("compressors", {}).items()
    ]
    for name, row in result.get("domains", {}).items():
        lines += [f"  model, {name:<13}{row['bpb']:>8.4f}   {ends(row)}{row['bytes']:,} bytes of its validation text"]
    return lines


def read_by_compressors(result: dict) -> str:
    n, whole = result.get("compressor_bytes"), result["val"]["bytes"]
    return f"the first {n:,} of these {whole:,} bytes" if n not in (None, whole) else f"the same {whole:,} bytes"


def ends(row: dict) -> str:
    return "{:.4f} to {:.4f}, ".format(*row["interval"]) if row["interval"] else ""


def write(folder: Path, result: dict) -> None:
    """eval_base.json, with what earlier evaluations found beside it; and CORE as CSV, which is of the same weights."""
    from nanolab.evals.core import csv_lines
    from nanolab.evals.record import merge_base
    from nanolab.files import write_text
    from nanolab.records.models import read_json

    path, table = folder / "eval_base.json", folder / "eval_base.csv"
    folder.mkdir(parents=True, exist_ok=True)
    whole = merge_base(read_json(path) if path.exists() else {}, result)
    write_text(path, as_json(whole, "eval_base.json", indent=1) + "\n")
    if "core" in whole and "tasks" in whole["core"]:
        write_text(table, "\n".join(csv_lines(whole["core"])) + "\n")
    else:
        table.unlink(missing_ok=True)


def evaluate_all(cfg: BaseEvalConfig, modes: list[str], suite, rt) -> int:
    """Every checkpoint of one or several runs, and a curve for each mode that has a score."""
    from nanolab.evals.checkpoints import Mode, follow, picture
    from nanolab.evals.curve import drawing
    from nanolab.records.models import find_model
    from nanolab.runtime import print0

    def text_settings(found) -> dict:
        return {
            "text": open_text(cfg, pretraining(found))[1].val_fingerprint,
            "tokens": split_tokens(cfg, rt),
            "dtype": rt.dtype_name,
        }

    def text_score(subject: Subject) -> dict:
        return bpb(cfg, subject, [(open_text(cfg, subject.pretraining)[1].val, split_tokens(cfg, rt))], rt)

    def of_suite(mode: str, score, ylabel) -> Mode:
        def measure(subject: Subject) -> dict:
            return suite(mode, subject.reader(), subject.tokenizer, rt.dtype_name)

        return Mode(lambda found: suite.settings(mode, rt.dtype_name), measure, score, ylabel)

    known = {
        "bpb": Mode(
            text_settings,
            text_score,
            lambda r: (r["bpb"], *(r["interval"] or (None, None))),
            lambda r: "bits per byte of validation text",
        ),
        "core": of_suite("core", lambda r: (r["value"], *(r["interval"] or (None, None))), lambda r: r["label"]),
        "hellaswag": of_suite(
            "hellaswag",
            lambda r: (r["per_token"]["accuracy"], *r["per_token"]["interval"]),
            lambda r: "HellaSwag, loss per token",
        ),
        "lambada": of_suite("lambada", lambda r: (r["accuracy"], *r["interval"]), lambda r: "LAMBADA accuracy"),
    }
    wanted = {mode: known[mode] for mode in modes if mode in known}
    if not wanted:
        raise UserError(
            f"--modes {cfg.modes} with --all-checkpoints, but no score among them; expected one or more of"
            f" {', '.join(known)}; try --modes core"
        )
    drawing()  # found out before the evaluation, not behind it
    if "@" in cfg.model:
        raise UserError(
            f"--model {cfg.model} with --all-checkpoints, but a step in it; expected names of runs; leave @STEP or"
            " --all-checkpoints out"
        )
    runs = [find_model(name.strip()) for name in cfg.model.split(",")]
    if len({found.name for found in runs}) < len(runs):
        raise UserError(f"--model {cfg.model} names a run twice; expected each once; leave one out")
    points, failed = follow(runs, wanted, lambda found: of_run(cfg, found, rt), rt)
    folder = Path(cfg.out).expanduser() if cfg.out else runs[0].run_dir
    if rt.is_main:
        for mode, found in points.items():
            if picture(mode, wanted[mode], found, folder):
                print0(f"written: {folder / f'curve_{mode}.svg'} and .csv")
        print0(*(f"failed: {why}" for why in failed), sep="\n" if failed else "", end="\n" if failed else "")
        if cfg.json:
            print0(
                as_json(
                    {
                        "curves": {mode: [point._asdict() for point in found] for mode, found in points.items()},
                        "failed": failed,
                    },
                    "the result",
                )
            )
    rt.barrier()
    return 1 if failed else 0


if __name__ == "__main__":
    main(lambda: run(parse(BaseEvalConfig)))

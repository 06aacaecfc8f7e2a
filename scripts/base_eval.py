"""Evaluate a base model: python -m scripts.base_eval [--model NAME] [--modes bpb,sample] [--split-tokens N].

bpb: bits per byte on training and validation text (--no-train-text: on the latter alone), beside compressors on the same
validation text. sample: what it writes. Results go to eval_base.json in the run directory.
"""

import json

from nanolab.config import BaseEvalConfig, DataConfig, UserError, main, parse

SPLIT_TOKENS = {"cuda": 40 * 524288}  # tokens of each split, by device; elsewhere:
SPLIT_TOKENS_ELSEWHERE = 524288
MODES = ("bpb", "sample")


def run(cfg: BaseEvalConfig) -> int:
    modes = [mode.strip() for mode in cfg.modes.split(",") if mode.strip()]
    for mode in modes:
        if mode not in MODES:
            raise UserError(f"mode {mode!r} is unknown; expected one or more of {', '.join(MODES)}; try --modes {','.join(MODES)}")
    from nanolab import runtime

    rt = runtime.start(cfg.device_type, seed=cfg.seed)
    try:
        return evaluate(cfg, modes, rt)
    finally:
        rt.close()


def evaluate(cfg: BaseEvalConfig, modes: list[str], rt) -> int:
    from nanolab.evals.samples import continue_prompts, one_line, unconditioned
    from nanolab.runtime import print0
    from nanolab.training.checkpoint import write_text
    from nanolab.training.run import find_model, load_model

    found = find_model(cfg.model)
    model, tokenizer, meta = load_model(found, rt)
    result = {"model": found.name, "step": found.step, "device": rt.device_name, "dtype": rt.dtype_name}
    if "bpb" in modes:
        result |= measure(cfg, found.run_dir, model, tokenizer, meta, rt)
        for line in table(result):
            print0(line)
    if "sample" in modes and rt.is_main:
        greedy = continue_prompts(model, tokenizer, rt)
        drawn = unconditioned(model, tokenizer, rt, seed=cfg.seed)
        result["samples"] = [sample._asdict() for sample in greedy]
        result["unconditioned"] = drawn
        print0("greedy continuations", *map(one_line, greedy), sep="\n")
        print0("from nothing, temperature 1", *(f"  {text!r}" for text in drawn), sep="\n")
    if rt.is_main:
        path = found.run_dir / "eval_base.json"
        write_text(path, json.dumps(merged(path, result), indent=1) + "\n")
        print0(f"written: {path}")
        if cfg.json:
            print0(json.dumps(result))
    rt.barrier()
    return 0


def measure(cfg: BaseEvalConfig, run_dir, model, tokenizer, meta: dict, rt) -> dict:
    """{"train": {...} (with --train-text), "val": {...}, "compressors": {...}}: bits per byte and what they were measured on."""
    import numpy as np

    from nanolab.data.corpus import open_data
    from nanolab.data.packing import validation_rows
    from nanolab.evals.bpb import bits_per_byte
    from nanolab.evals.compressors import compressor_bpb
    from nanolab.runtime import print0
    from nanolab.training.models import read_json

    recorded = meta["origin"]["pretraining"] if "origin" in meta else read_json(run_dir / "config.json")  # a fine-tuned model's is the first model's
    data = open_data(data_config(cfg, recorded), recorded.get("seed", 0))
    if meta.get("val_fingerprint", data.val_fingerprint) != data.val_fingerprint:
        print0("note: this is not the validation text that the run was measured on while training")
    T = model.config.sequence_len
    limit = cfg.split_tokens if cfg.split_tokens > 0 else SPLIT_TOKENS.get(rt.device.type, SPLIT_TOKENS_ELSEWHERE)
    lengths = tokenizer.token_bytes()
    splits = {"train": [(source, max(1, round(weight * limit))) for source, weight in data.train]} if cfg.train_text else {}
    splits["val"] = [(data.val, limit)]
    result: dict = {"data": cfg.data_dir or cfg.data or recorded["data_dir"] or recorded["data"]}
    for split, sources in splits.items():
        rows = [validation_rows(documents, tokenizer, T, tokens) for documents, tokens in sources]
        score = bits_per_byte(model, [np.concatenate(halves) for halves in list(zip(*rows))[:2]], lengths, rt, cfg.device_batch_size)
        result[split] = {"bpb": score.bpb, "nats": score.nats, "bytes": score.n_bytes, "tokens": score.n_tokens}
    if rt.is_main:
        result["compressors"] = compressor_bpb([beginning(data.val, result["val"]["bytes"])])
    return result


def data_config(cfg: BaseEvalConfig, recorded: dict) -> DataConfig:
    """What --data or --data-dir asks for, else the run's own data; --val-data replaces the validation text of either."""
    if cfg.data or cfg.data_dir:
        return DataConfig(cfg.data or DataConfig.data, cfg.data_dir, cfg.val_data, cfg.num_shards)
    shards = cfg.num_shards if cfg.num_shards > 0 else recorded["num_shards"]
    return DataConfig(recorded["data"], recorded["data_dir"], cfg.val_data or recorded["val_data"], shards)


def beginning(documents, n_bytes: int) -> bytes:
    """The first bytes of all documents, one after the other: what the model was measured on, in the order of the corpus."""
    out = bytearray()
    for text in documents.iterate():
        out += text.encode("utf-8", "replace")
        if len(out) >= n_bytes:
            break
    return bytes(out[:n_bytes])


def table(result: dict) -> list[str]:
    """Bits per byte, one line per reader of the text."""
    lines = [f"bits per byte of {result['model']}@{result['step']} on {result['data']}"]
    for split, label in (("val", "model, validation"), ("train", "model, training")):
        if split in result:
            lines += [f"  {label:<20}{result[split]['bpb']:>8.4f}   {result[split]['bytes']:,} bytes, {result[split]['tokens']:,} tokens"]
    return lines + [f"  {name:<20}{bpb:>8.4f}   the same validation text" for name, bpb in result.get("compressors", {}).items()]


def merged(path, result: dict) -> dict:
    """`result` over what an earlier evaluation of the same step found in other modes."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    same = (earlier.get("model"), earlier.get("step")) == (result["model"], result["step"])
    return {**earlier, **result} if same else result


if __name__ == "__main__":
    main(lambda: run(parse(BaseEvalConfig)))

"""A GPT-2 of a transformers folder becomes a finished run."""

from pathlib import Path

from nanolab.cli import UserError, from_preset
from nanolab.interop.config import ImportConfig
from nanolab.stages.config import BaseTrainConfig

PADDED_TO = (1, 8, 16, 32, 64, 128)  # rows may be the tokens' number rounded up to a multiple of one of these
BATCH = 512  # rows of an optimizer step, as GPT-2 was trained; fine-tuning has its own flags for less


def import_folder(cfg: ImportConfig) -> list[str]:
    """Write the run; returns what a person should know of it, a line each. Raises UserError."""
    from nanolab import runtime
    from nanolab.data.tokenizer import Tokenizer
    from nanolab.data.tokenizer_files import read_tokenizer
    from nanolab.interop import gpt2
    from nanolab.records.models import runs_dir
    from nanolab.records.run import check_name

    folder = Path(cfg.folder).expanduser()
    if not cfg.folder or not folder.is_dir():
        raise UserError(
            f"no folder {cfg.folder!r}; expected one that transformers' save_pretrained wrote; try python -m"
            " scripts.import_hf DIR --run NAME"
        )
    name = cfg.run or folder.resolve().name
    check_name(name)
    if (runs_dir() / name).exists():
        raise UserError(
            f"run {name!r} exists already: {runs_dir() / name}; expected a new name; try --run {name}-2, or remove it"
            " first"
        )
    c, state = gpt2.read_folder(folder)
    try:
        bpe = read_tokenizer(folder)
    except UserError as error:  # whose advice is for commands with --tokenizer
        seen = str(error).rpartition("; ")[0]
        raise UserError(
            f"{seen}; the model's own tokenizer is imported with it: put that there, or import another DIR",
            error.code,
            **error.values,
        ) from None
    tokenizer, known = Tokenizer(bpe), max(*bpe.vocab.values(), *bpe.specials.values()) + 1
    if c.vocab_size not in {-(-known // multiple) * multiple for multiple in PADDED_TO}:
        raise UserError(
            f"the tokenizer in {folder} has {known} tokens, but the weights have {c.vocab_size} rows; expected as many,"
            " or rounded up to a multiple of 8 to 128; put the model's own tokenizer there"
        )
    kind, why = kind_of_folder(folder, tokenizer.vocab_size == known)
    added, padding = tokenizer.vocab_size - known, c.vocab_size - known
    state, c = gpt2.with_rows(state, c, known, tokenizer.vocab_size)
    rt = runtime.start("cpu")
    try:
        flags = write_run(name, folder, state, c, tokenizer, rt, kind)
    finally:
        rt.close()
    return [
        (
            f"imported        {folder}: {flags.preset}, {c.n_layer} layers, width {c.n_embd}, {c.n_head} heads, rows of"
            f" {c.sequence_len}"
        ),
        (
            f"vocabulary      {c.vocab_size:,} tokens: {known:,} of its own, {added} chat tokens added"
            + (f"; {padding} rows without a token left out" if padding else "")
        ),
        f"texts begin     with {tokenizer.decode([tokenizer.bos])}",
        f"kind            {kind}: {why}",
        f"evaluate it     python -m scripts.{'base_eval' if kind == 'base' else 'chat_eval'} --model {name}",
        (
            f"fine-tune it    python -m scripts.chat_sft --model {name} --no-load-optimizer --init-lr-frac 0.05"
            f" --total-batch-size {16 * c.sequence_len}"
        ),
    ]


def kind_of_folder(folder: Path, knows_chat: bool) -> tuple[str, str]:
    """(base, sft or rl; how that is known). A chat model is one that reads nanolab's template. knows_chat: whether the
    tokenizer has all chat tokens.
    """
    from nanolab.data.turn import PARTS
    from nanolab.interop.export import KIND
    from nanolab.records.models import read_json

    said, tokenizer, template = (
        read_json(folder / "config.json").get(KIND),
        folder / "tokenizer_config.json",
        folder / "chat_template.jinja",
    )
    if said in ("base", "sft", "rl"):
        return said, "as it was exported"
    text = (
        template.read_text(encoding="utf-8")
        if template.is_file()
        else read_json(tokenizer).get("chat_template")
        if tokenizer.is_file()
        else None
    )
    if not text:
        return "base", "the folder has no chat template"
    marks = ["<|user_start|>", "<|assistant_start|>", *(mark.start for mark in PARTS.values())]
    if knows_chat and isinstance(text, str) and all(mark in text for mark in marks):
        return "sft", "the folder has nanolab's chat template"
    return (
        "base",
        "the folder's chat template is not nanolab's, and is left out; fine-tune the model to chat with it here",
    )


def write_run(name: str, folder: Path, state: dict, c, tokenizer, rt, kind: str = "base") -> BaseTrainConfig:
    """The run's directory, as base_train leaves it after no step of its own. Returns the flags that it is known by."""
    from dataclasses import asdict, replace

    from nanolab.model.accounting import train_flops_per_token
    from nanolab.records import checkpoint
    from nanolab.records.run import Run
    from nanolab.training.saving import LoopState
    from nanolab.training.schedule import make_plan

    c = replace(c, bos=tokenizer.bos)
    flags = replace(flags_like(c), run=name, tokenizer=str(folder))
    plan = replace(
        make_plan(flags, c.vocab_size, 1, c.bos), model=c, flops_per_token=train_flops_per_token(c), num_iterations=0
    )
    record = Run.start(name, flags, rt, kind=kind, env={"imported": str(folder.resolve())})
    try:
        record.pin_tokenizer(lambda: tokenizer)
        meta = {
            "run": name,
            "kind": kind,
            **record.facts,
            "model_config": asdict(c),
            "config": record.config,
            "plan": asdict(plan),
            "env": record.env,
            "loop": asdict(LoopState()),
            "tokens": 0,
        }
        checkpoint.save(record.checkpoints, 0, weights=state, optimizer=None, meta=meta, runtime=rt)
        record.finish(
            {
                "run": name,
                "kind": kind,
                "step": 0,
                "tokens": 0,
                "imported": str(folder.resolve()),
                "total_training_time": 0.0,
                "total_training_flops": 0,
            }
        )
    finally:
        record.close()
    return flags


def flags_like(c) -> BaseTrainConfig:
    """The flags of base_train for a model like `c`: the preset of its size, else gpt2 with the size beside it."""
    from nanolab.presets import PRESETS
    from nanolab.training.schedule import gpt_config

    size = dict(max_seq_len=c.sequence_len, tied_head=c.tied_head, total_batch_size=BATCH * c.sequence_len)
    for preset in (name for name in PRESETS if name.startswith("gpt2")):
        flags = from_preset(BaseTrainConfig, preset, **size)
        like = gpt_config(flags, c.vocab_size)
        if (like.n_layer, like.n_embd, like.n_head) == (c.n_layer, c.n_embd, c.n_head):
            return flags
    return from_preset(
        BaseTrainConfig,
        "gpt2",
        depth=c.n_layer,
        aspect_ratio=max(1, c.n_embd // c.n_layer),
        head_dim=c.head_dim,
        **size,
    )

"""Runs on disk, read: metrics, the best checkpoint, and `--model NAME[@STEP|best]` to a loaded model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanolab.cli import UserError, from_json
from nanolab.data.tokenizer import Tokenizer
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.records import checkpoint
from nanolab.records.checkpoint import CheckpointError
from nanolab.runtime import Runtime, base_dir, print0

# Fine-tuning logs both losses: there bits per byte are of the text that it moves away from. 1: lower is better, -1:
# higher is.
JUDGES = {"val/loss": 1, "val/bpb": 1, "eval/pass@1": -1}
TRAINED_BY = {
    "base": "python -m scripts.base_train",
    "sft": "python -m scripts.chat_sft",
    "rl": "python -m scripts.chat_rl",
}
OF_STUDIES = "lab-"  # begins the names of a study's runs, which are never taken unless they are named
WEIGHTS_ONLY = ("model.safetensors", "meta.json")  # what a reader of weights has to verify


@dataclass(frozen=True)
class ModelRef:
    """One checkpoint of one run."""

    name: str
    run_dir: Path
    checkpoint: Path
    step: int


def runs_dir() -> Path:
    return base_dir() / "runs"


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is missing or damaged ({error}); expected the record of a run; start a new one with --run NAME"
        ) from None


def recorded(name: str) -> dict[str, Any]:
    """env.json of a run that has something to resume (device, dtype, threads, ...), else {}."""
    folder = runs_dir() / name
    return read_json(folder / "env.json") if checkpoint.steps(folder / "checkpoints") else {}


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order. A line that a crash tore is left out."""
    path, rows = run_dir / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def best_step(run_dir: Path) -> int | None:
    """The saved step with the best score (the earliest of equals), or None if no saved step was evaluated.

    The score is the first of JUDGES that the run has measured.
    """
    saved = {step for step, _ in checkpoint.steps(run_dir / "checkpoints")}
    rows = read_metrics(run_dir)
    judge = next((name for name in JUDGES if any(row.get(name) is not None for row in rows)), "val/loss")
    scores = [
        (JUDGES[judge] * row[judge], row["step"]) for row in rows if row.get(judge) is not None and row["step"] in saved
    ]
    return min(scores)[1] if scores else None


def find_model(ref: str = "", kind: str = "") -> ModelRef:
    """NAME, NAME@STEP or NAME@best -> a verified checkpoint; "" is the newest finished run (of that kind: base, sft or
    rl). Prints which.

    NAME alone is that run's newest whole checkpoint; damaged ones are named and skipped. Raises UserError, listing what
    exists, when there is no such run or step, and CheckpointError when the step asked for is damaged.
    """
    name, _, which = ref.partition("@")
    known = sorted(p.parent.name for p in runs_dir().glob("*/checkpoints")) if runs_dir().exists() else []
    known = [n for n in known if checkpoint.steps(runs_dir() / n / "checkpoints")]
    if not name:
        finished = sorted(
            (p for p in runs_dir().glob("*/result.json") if p.parent.name in known), key=lambda p: p.stat().st_mtime_ns
        )
        finished = [p for p in finished if not p.parent.name.startswith(OF_STUDIES)]
        finished = [p for p in finished if kind in ("", read_json(p).get("kind"))]
        if not finished:
            others = (
                f"; {'there are' if kind else 'not finished'}: {', '.join(known)} (name one with --model)"
                if known
                else ""
            )
            raise UserError(
                f"no finished {kind + ' ' if kind else ''}run in {runs_dir()}{others}. Train one:"
                f" {TRAINED_BY.get(kind, TRAINED_BY['base'])} --run NAME"
            )
        name = finished[-1].parent.name
    if name not in known:
        raise UserError(
            f"no model {name!r} in {runs_dir()}; there are: {', '.join(known) or 'none'}. Type --model NAME[@STEP|best]"
        )
    run_dir = runs_dir() / name
    saved = dict(checkpoint.steps(run_dir / "checkpoints"))
    listing = ", ".join(map(str, saved))
    if which == "":
        path = checkpoint.newest_valid(run_dir / "checkpoints", WEIGHTS_ONLY)
        if path is None:
            raise UserError(f"every checkpoint of {name!r} is damaged (steps {listing}); train it again: --run NAME")
    else:
        step = best_step(run_dir) if which == "best" else int(which) if which.isdigit() else -1
        if step not in saved:
            why = "no saved step was evaluated" if which == "best" else f"no step {which!r}"
            raise UserError(f"model {name!r}: {why}; saved steps: {listing}. Type --model {name}@{max(saved)}")
        path = saved[step]
        try:
            checkpoint.verify(path, WEIGHTS_ONLY)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; saved steps of {name!r}: {listing}. Type --model {name}@STEP") from None
    found = ModelRef(name, run_dir, path, int(path.name[5:]))
    state = "finished" if (run_dir / "result.json").exists() else "not finished"
    print0(f"model {name}@{found.step} ({state}) from {path}")
    return found


def load_model(ref: str | ModelRef, runtime: Runtime) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """(model in eval mode on the runtime's device and compute dtype, its tokenizer, the checkpoint's meta).

    Raises UserError for another tokenizer than the model's, a text that begins otherwise than in its training, and
    weights that do not fit."""
    found = find_model(ref) if isinstance(ref, str) else ref
    meta = checkpoint.load_meta(found.checkpoint)
    tokenizer = Tokenizer.load(found.run_dir / "tokenizer", checked=True)
    if tokenizer.hash != meta["tokenizer_hash"]:
        raise UserError(
            f"model {found.name!r} was trained with tokenizer {meta['tokenizer_hash'][:12]}, but"
            f" {found.run_dir / 'tokenizer'} holds {tokenizer.hash[:12]}: its ids would mean other text. Put the run's"
            " own tokenizer back, or use another --model"
        )
    c = from_json(GPTConfig, meta["model_config"])
    if c.bos >= 0 and c.bos != tokenizer.bos:
        was, now = (
            f"{tokenizer.decode([i])} (token {i})" if i < tokenizer.vocab_size else f"token {i}"
            for i in (c.bos, tokenizer.bos)
        )
        raise UserError(
            f"model {found.name!r} was trained on texts that begin with {was}, but this version of nanolab begins them"
            f" with {now}: its prompts would be unlike its training; use the nanolab of commit"
            f" {meta.get('env', {}).get('commit')}, or train it again"
        )
    model = GPT(c, runtime.dtype)
    try:
        model.load_state_dict(checkpoint.load_weights(found.checkpoint), strict=True)
    except RuntimeError as error:
        raise UserError(
            f"the weights of {found.checkpoint} do not fit this version of the model: {error}; use the nanolab of"
            f" commit {meta.get('env', {}).get('commit')}"
        ) from None
    model = model.to(runtime.device).eval()
    # now that it is there: a kernel may have to be fetched and tried, which has no place in the first pass
    model.place(runtime.device.type)
    return model, tokenizer, meta

"""Evaluate a chat model on tasks: replies graded, losses of conversations; records, and the table of them."""

import math
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from nanolab import runtime
from nanolab.cli import UserError, as_json, check_given
from nanolab.data.chat import parts_of
from nanolab.data.conversations import packed_rows
from nanolab.data.survey import Reader
from nanolab.evals.bpb import bits_per_byte
from nanolab.evals.card import differences
from nanolab.evals.chat import MEMBERS, chatcore_score, evaluate_task
from nanolab.evals.config import SAMPLING, ChatEvalConfig
from nanolab.evals.likelihood import check_finite
from nanolab.evals.record import merge_chat
from nanolab.evals.score import centred, check_some, readable_turn, wilson
from nanolab.files import write_text
from nanolab.inference.engine import Engine
from nanolab.inference.request import Request
from nanolab.inference.sampling import check_settings
from nanolab.inference.sandbox import walls
from nanolab.inference.tools import find_tool
from nanolab.records.checkpoint import load_meta, steps
from nanolab.records.models import find_model, load_model, read_json, runs_dir
from nanolab.runtime import Runtime, print0
from nanolab.stages.base_run import task_versions
from nanolab.tables import interval_text, text_table
from tasks import TASKS, Mixture, build

SETTINGS = ("data", "num_samples", "temperature", "top_k", "max_tokens", "tool", "max_problems", "seed")
SHOWN = 4  # replies of each task that are kept for eyes


def evaluate_chat(cfg: ChatEvalConfig) -> int:
    """Grade the model of `cfg` on its tasks, print and record it; returns 0.

    Raises UserError for flags, models and tasks that do not fit.
    """
    with closing(runtime.start(cfg.device_type, seed=cfg.seed)) as rt:
        return grade_tasks(cfg, rt)


def grade_tasks(cfg: ChatEvalConfig, rt: Runtime) -> int:
    check_settings(cfg.temperature, cfg.top_k, 1.0)
    tool = find_tool(cfg.tool)
    found = find_model(cfg.model)
    tasks, missing = open_tasks(cfg, split_versions(load_meta(found.checkpoint)))
    tasks, missing, said = with_walls(cfg, tasks, missing)
    check_given(cfg, SAMPLING, sampled=any(task.kind == "generate" for task in tasks.values()))
    model, tokenizer, meta = load_model(found, rt)
    check_finite(model, tokenizer, rt.device, found.name)
    engine = Engine(model, tokenizer, rt)
    if meta.get("kind", "base") == "base":
        print0("note: this is a base model, which has not learned the marks of a conversation")
    for line in (
        *said,
        *(f"missing: {name}: {why}" for name, why in missing.items()),
        *dict.fromkeys(f"note: {note}" for task in tasks.values() for note in task.notes),
    ):
        print0(line)
    made = {
        "device": rt.device_name,
        "dtype": rt.dtype_name,
        "settings": {name: getattr(cfg, name) for name in SETTINGS},
    }
    result = {
        "model": found.name,
        "step": found.step,
        "kind": meta.get("kind", "base"),
        **made,
        "tasks": {},
        "missing": missing,
    }
    path, whole = found.run_dir / "eval_chat.json", {}
    for spec, task in tasks.items():
        row = losses(cfg, model, tokenizer, task, rt) if task.kind == "likelihood" else grade(cfg, engine, task, tool)
        result["tasks"][spec] = row | made
        if rt.is_main:
            whole = save_chat(path, result)  # what is found is on disk from here on, whatever ends the evaluation
    if rt.is_main:
        print0(*chat_table(whole), f"written: {path}", *([as_json(whole, "the result")] if cfg.json else []), sep="\n")
    rt.barrier()
    return 0


def save_chat(path: Path, result: dict) -> dict:
    """The file with `result` beside what it held; the whole of it."""
    whole = merge_chat(read_json(path) if path.exists() else {}, result)
    whole["chatcore"] = chatcore_of(
        {spec: row for spec, row in whole["tasks"].items() if row["settings"] == result["settings"]}
    )
    write_text(path, as_json(whole, "eval_chat.json", indent=1) + "\n")
    return whole


def split_versions(meta: dict) -> dict[str, int]:
    """The rule by which files of conversations were split for this model, or for the one that it started from: what was
    held out then is so now.
    """
    while meta.get("kind") == "rl":
        name, _, step = meta["origin"]["name"].partition("@")
        saved = dict(steps(runs_dir() / name / "checkpoints"))
        if int(step) not in saved:
            return {}
        meta = load_meta(saved[int(step)])
    versions = task_versions(meta) if meta.get("kind") == "sft" else {}
    return {name: version for name, version in versions.items() if name == "jsonl"}


def open_tasks(cfg: ChatEvalConfig, versions: Mapping[str, int] = {}) -> tuple[dict, dict[str, str]]:
    """The tasks asked for; or all that can be graded and opened, and why each of the others cannot."""
    named = [spec.strip() for spec in cfg.tasks.split(",") if spec.strip()]
    if named:
        return {spec: build(*name_and_split(spec), cfg.data, seed=cfg.seed, versions=versions) for spec in named}, {}
    tasks, missing = {}, {}
    for name, task in TASKS.items():
        if task.kind == "likelihood" or (task.argument_is and not task.argument_is.endswith("?")):
            continue
        try:
            tasks[name] = build(name, "test", cfg.data, seed=cfg.seed)
        except UserError as error:
            missing[name] = str(error)
    if not tasks:
        raise UserError(
            f"no task can be opened: {'; '.join(missing.values())}; type --tasks NAME,... with --data FOLDER"
        )
    return tasks, missing


def with_walls(cfg: ChatEvalConfig, tasks: dict, missing: dict[str, str]) -> tuple[dict, dict[str, str], list[str]]:
    """The tasks, those missing, and what the sandbox is like where code of the model's runs. Without one, tasks that
    nobody named are missing.
    """
    safe = {name: task for name, task in tasks.items() if not task.runs_code}
    called = cfg.tool == "python" and any(task.kind == "generate" for task in tasks.values())
    try:
        return tasks, missing, walls(cfg, called or len(safe) < len(tasks))
    except UserError as error:
        if error.code != "no-sandbox" or called or cfg.tasks or not safe:
            raise
        return safe, missing | {name: str(error) for name in tasks if name not in safe}, []


def name_and_split(spec: str) -> tuple[str, str]:
    """NAME:SPLIT in two; the split test where there is none. A file's name may have colons of its own: there only a
    split follows one.
    """
    name, colon, split = spec.rpartition(":")
    task, equals, _ = name.partition("=")
    of_file = equals and split not in (TASKS[task].splits if task in TASKS else ())
    return (spec, "test") if not colon or of_file else (name, split or "test")


def grade(cfg: ChatEvalConfig, engine, task, tool) -> dict:
    """What one task gives, for the record."""
    began = time.perf_counter()
    result = evaluate_task(
        engine,
        task,
        cfg.max_problems,
        Request(max_tokens=cfg.max_tokens, temperature=cfg.temperature, top_k=cfg.top_k, seed=cfg.seed, tools=tool),
        num_samples=cfg.num_samples,
        batch_size=cfg.device_batch_size,
    )
    cut = sum(not reply.ended for reply in result.replies)
    return strict_accuracy(task, result) | {
        "task": task.name,
        "split": task.split,
        "version": task.version,
        "kind": task.kind,
        "measures": task.measures,
        "baseline": task.baseline,
        "n": result.n,
        "k": result.k,
        "accuracy": result.accuracy,
        "interval": result.interval,
        "pass_at": result.pass_at,
        "intervals": result.intervals,
        "too_long": result.too_long,
        "replies": len(result.replies),
        "cut": cut,
        "called": share_calling(result.replies),
        "seconds": time.perf_counter() - began,
        "examples": [as_people_read(task, reply, cfg.tool) for reply in result.replies[:: result.k][:SHOWN]],
        "outcomes": result.outcomes,
    }


def strict_accuracy(task, result) -> dict:
    """The accuracy where only an answer in the asked-for form counts, for tasks that know one."""
    if not hasattr(task, "strict"):
        return {}
    right = Counter(reply.index for reply in result.replies if task.strict(task.example(reply.index), reply.content))
    outcomes = [right[i] / result.k for i in range(result.n)]
    accuracy = math.fsum(outcomes) / result.n
    return {"strict": {"accuracy": accuracy, "interval": wilson(accuracy, result.n), "outcomes": outcomes}}


def losses(cfg: ChatEvalConfig, model, tokenizer, task, rt) -> dict:
    """The loss on the assistant's turns of conversations: nats per supervised token, in rows packed as fine-tuning
    packs those of its val/loss.
    """
    import numpy as np

    n, began = len(task) if cfg.max_problems < 0 else min(cfg.max_problems, len(task)), time.perf_counter()
    check_some(task, n)
    reader = Reader(Mixture([(task, 1.0)], cfg.seed), tokenizer, model.config.sequence_len + 1)
    read = [reader.read(i) for i in range(n)]
    kept = [one for one, _ in read if one.ids]
    # bits per token
    found = bits_per_byte(
        model, packed_rows(reader, kept), np.ones(tokenizer.vocab_size, dtype=np.int32), rt, cfg.device_batch_size
    )
    nats = math.log(2)
    return {
        "task": task.name,
        "split": task.split,
        "version": task.version,
        "kind": task.kind,
        "n": len(kept),
        "tokens": found.n_tokens,
        "loss": found.bpb * nats,
        "interval": found.interval and [end * nats for end in found.interval],
        "too_long": n - len(kept),
        "cut": sum(0 < len(one.ids) < before for one, before in read),
        "seconds": time.perf_counter() - began,
    }


def share_calling(replies) -> float:
    """The share of replies that call a tool."""
    return sum(any(part["type"] == "python" for part in parts_of(reply.content)) for reply in replies) / max(
        1, len(replies)
    )


def as_people_read(task, reply, tool: str) -> dict:
    """A reply beside its question and the task's own answer, as people read them."""
    *_, question, reference = task.example(reply.index).messages
    texts = {
        "question": question["content"],
        "reply": readable_turn(reply.content, tool),
        "reference": readable_turn(reference["content"], tool),
    }
    return {"index": reply.index, **texts, "correct": reply.correct}


def chatcore_of(tasks: dict[str, dict]) -> dict | None:
    """ChatCORE over these records, with the members that it lacks; None where fewer than two are among them."""
    by_name = {row["task"]: row for row in tasks.values() if row["split"] == "test" and "accuracy" in row}
    total = chatcore_score([(name, row["baseline"], row["accuracy"], row["interval"]) for name, row in by_name.items()])
    return total and {
        "label": total.label,
        "value": total.value,
        "interval": total.interval,
        "lacks": [name for name in MEMBERS if name not in by_name],
    }


def chat_table(result: dict) -> list[str]:
    """One line for each task; then ChatCORE; then the losses."""
    s = result["settings"]
    replies = (
        f"{s['num_samples']} {'reply' if s['num_samples'] == 1 else 'replies'} of at most {s['max_tokens']} tokens"
    )
    lines = [
        f"chat evaluation of {result['model']}@{result['step']} ({result['kind']}): {replies}, temperature"
        f" {s['temperature']:g}, tool {s['tool'] or 'none'}"
    ]
    graded, read = ({spec: row for spec, row in result["tasks"].items() if key in row} for key in ("accuracy", "loss"))
    cells = []
    for spec, row in graded.items():
        accuracy, interval = f"{row['accuracy']:.4f}", interval_text(row["interval"])
        above = f"{centred(row['accuracy'], row['baseline']):.4f}"
        cells += [[spec, f"{row['n']:,}", accuracy, interval, f"{row['baseline']:.2f}", above, notes(row, s)]]
        if found := row.get("strict"):
            accuracy, interval = f"{found['accuracy']:.4f}", interval_text(found["interval"])
            cells += [["  strict extract", "", accuracy, interval, "", "", "only the number after ####"]]
        for k, p in row["pass_at"].items():
            if int(k) in powers(row["k"]):  # a string in what was read from the file
                cells += [[f"  pass@{k}", "", f"{p:.4f}", interval_text(row["intervals"][k])]]
    if result["chatcore"]:
        label, value, interval, lacks = result["chatcore"].values()
        without = f"without {', '.join(lacks)}" if lacks else ""
        cells += [[label, "", f"{value:.4f}", interval_text(interval), "", "", without]]
    if cells:
        numbers = dict.fromkeys(("problems", "accuracy"), "right") | {"95 % interval": "left"}
        numbers |= dict.fromkeys(("baseline", "above it"), "right")
        lines += text_table({"task": "left", **numbers, "": "left"}, cells)
    cells = [
        [
            spec,
            f"{row['n']:,}",
            f"{row['loss']:.4f}",
            interval_text(row["interval"]),
            f"n = {row['tokens']:,}  {notes(row, s)}",
        ]
        for spec, row in read.items()
    ]
    columns = {"task": "left", "chats": "right", "loss": "right", "95 % interval": "left"}
    return lines + (text_table(columns | {"nats per supervised token": "left"}, cells) if cells else [])


def notes(row: dict, settings: dict) -> str:
    """What a reader of the number should know."""
    if "loss" in row:
        said = [f"{row['too_long']} left out, too long for the model"] * bool(row["too_long"]) + [
            f"{row['cut']} cropped after a whole turn"
        ] * bool(row["cut"])
    else:
        said = [row["measures"]] * bool(row.get("measures")) + [
            f"{row['too_long']} too long for the model, counted as wrong"
        ] * bool(row["too_long"])
        said += [f"{row['cut']} of {row['replies']} replies cut"] * bool(row["cut"])
    return "  ".join([*said, *filter(None, [differences(row["settings"], settings)])])


def powers(k: int) -> list[int]:
    """2, 4, 8, ... below k, and k; none for a single reply."""
    return [2**e for e in range(1, k.bit_length()) if 2**e < k] + [k] if k > 1 else []

"""Evaluate a chat model: python -m scripts.chat_eval [--model NAME] [--tasks gsm8k,arc-easy] [--data FOLDER] [--max-problems N].

Options are chosen by the logits of their letters, other replies sampled and graded; every number has its n and its 95 %
interval. Results go to eval_chat.json in the run directory, beside those of other tasks of the same step and settings.
"""

import json
import time

from nanolab.config import ChatEvalConfig, UserError, main, parse

SETTINGS = ("data", "num_samples", "temperature", "top_k", "max_tokens", "tool", "max_problems", "seed")
SHOWN = 4  # replies of each task that are kept for eyes


def run(cfg: ChatEvalConfig) -> int:
    from nanolab import runtime

    rt = runtime.start(cfg.device_type, seed=cfg.seed)
    try:
        return evaluate(cfg, rt)
    finally:
        rt.close()


def evaluate(cfg: ChatEvalConfig, rt) -> int:
    from nanolab.inference.engine import Engine
    from nanolab.inference.sampling import check_settings
    from nanolab.inference.tools import find_tool
    from nanolab.runtime import print0
    from nanolab.training.checkpoint import write_text
    from nanolab.training.run import find_model, load_model

    check_settings(cfg.temperature, cfg.top_k, 1.0)
    tool = find_tool(cfg.tool)
    tasks, missing = open_tasks(cfg)
    found = find_model(cfg.model)
    model, tokenizer, meta = load_model(found, rt)
    engine = Engine(model, tokenizer, rt)
    if meta.get("kind", "base") == "base":
        print0("note: this is a base model, which has not learned the marks of a conversation")
    for name, why in missing.items():
        print0(f"missing: {name}: {why}")
    settings = {name: getattr(cfg, name) for name in SETTINGS}
    result = {"model": found.name, "step": found.step, "kind": meta.get("kind", "base"), "device": rt.device_name, "dtype": rt.dtype_name, "settings": settings}
    result |= {"tasks": {spec: measure(cfg, engine, task, tool) for spec, task in tasks.items()}, "missing": missing}
    path = found.run_dir / "eval_chat.json"
    if rt.is_main:
        result = merged(path, result)
        result["chatcore"] = score(result["tasks"])
        print0(*table(result), sep="\n")
        write_text(path, json.dumps(result, indent=1) + "\n")
        print0(f"written: {path}")
        if cfg.json:
            print0(json.dumps(result))
    rt.barrier()
    return 0


def open_tasks(cfg: ChatEvalConfig) -> tuple[dict, dict[str, str]]:
    """The tasks asked for; or all that can be graded and opened, and why each of the others cannot."""
    from tasks import TASKS, build

    named = [spec.strip() for spec in cfg.tasks.split(",") if spec.strip()]
    if named:
        return {spec: build(*name_and_split(spec), cfg.data, seed=cfg.seed) for spec in named}, {}
    tasks, missing = {}, {}
    for name, task in TASKS.items():
        if task.kind == "chat" or (task.argument_is and not task.argument_is.endswith("?")):
            continue
        try:
            tasks[name] = build(name, "test", cfg.data, seed=cfg.seed)
        except UserError as error:
            missing[name] = str(error)
    if not tasks:
        raise UserError(f"no task can be opened: {'; '.join(missing.values())}; type --tasks NAME,... with --data FOLDER")
    return tasks, missing


def name_and_split(spec: str) -> tuple[str, str]:
    """NAME:SPLIT in two; the split test where there is none. A file's name may have colons of its own: there only a split follows one."""
    from tasks import TASKS

    name, colon, split = spec.rpartition(":")
    task, equals, _ = name.partition("=")
    of_file = equals and split not in (TASKS[task].splits if task in TASKS else ())
    return (spec, "test") if not colon or of_file else (name, split or "test")


def measure(cfg: ChatEvalConfig, engine, task, tool) -> dict:
    """What one task gives, for the record."""
    from nanolab.evals.chatcore import evaluate

    began = time.perf_counter()
    result = evaluate(
        engine, task, cfg.max_problems, num_samples=cfg.num_samples, max_tokens=cfg.max_tokens, temperature=cfg.temperature, top_k=cfg.top_k,
        seed=cfg.seed, tools=tool, batch_size=cfg.device_batch_size,
    )  # fmt: skip
    cut = sum(not reply.ended for reply in result.replies)
    return {
        "task": task.name, "split": task.split, "version": task.version, "kind": task.kind, "baseline": task.baseline, "n": result.n, "k": result.k,
        "accuracy": result.accuracy, "interval": result.interval, "pass_at": result.pass_at, "intervals": result.intervals,
        "too_long": result.too_long, "replies": len(result.replies), "cut": cut, "called": called(result.replies), "seconds": time.perf_counter() - began,
        "examples": [shown(task, reply, cfg.tool) for reply in result.replies[:: result.k][:SHOWN]], "outcomes": result.outcomes,
    }  # fmt: skip


def called(replies) -> float:
    """The share of replies that call a tool."""
    from nanolab.data.chat import parts_of

    return sum(any(part["type"] == "python" for part in parts_of(reply.content)) for reply in replies) / max(1, len(replies))


def shown(task, reply, tool: str) -> dict:
    """A reply beside its question and the task's own answer, as people read them."""
    from nanolab.evals.score import readable

    *_, question, reference = task.example(reply.index).messages
    texts = {"question": question["content"], "reply": readable(reply.content, tool), "reference": readable(reference["content"], tool)}
    return {"index": reply.index, **texts, "correct": reply.correct}


def score(tasks: dict[str, dict]) -> dict | None:
    """ChatCORE over these records, with the members that it lacks; None where fewer than two are among them."""
    from nanolab.evals.chatcore import MEMBERS, chatcore_score

    by_name = {row["task"]: row for row in tasks.values() if row["split"] == "test"}
    total = chatcore_score([(name, row["baseline"], row["accuracy"], row["interval"]) for name, row in by_name.items()])
    return total and {"label": total.label, "value": total.value, "interval": total.interval, "lacks": [name for name in MEMBERS if name not in by_name]}


def table(result: dict) -> list[str]:
    """One line for each task; then ChatCORE."""
    from nanolab.evals.chatcore import centred

    s = result["settings"]
    replies = f"{s['num_samples']} {'reply' if s['num_samples'] == 1 else 'replies'} of at most {s['max_tokens']} tokens"
    lines = [f"chat evaluation of {result['model']}@{result['step']} ({result['kind']}): {replies}, temperature {s['temperature']:g}, tool {s['tool'] or 'none'}"]
    width = max(20, *(len(spec) + 1 for spec in result["tasks"]))
    lines += [f"  {'task':<{width}}{'problems':>9}{'accuracy':>10}  {'95 % interval':<18}{'baseline':>8}{'above it':>10}"]
    for spec, row in result["tasks"].items():
        low, high = row["interval"]
        above = centred(row["accuracy"], row["baseline"])
        lines += [f"  {spec:<{width}}{row['n']:>9,}{row['accuracy']:>10.4f}  {f'{low:.4f} to {high:.4f}':<18}{row['baseline']:>8.2f}{above:>10.4f}{notes(row)}"]
        for k, p in row["pass_at"].items():
            if int(k) in powers(row["k"]):  # a string in what was read from the file
                lines += [f"  {f'  pass@{k}':<{width + 9}}{p:>10.4f}  {'{:.4f} to {:.4f}'.format(*row['intervals'][k])}"]
    if result["chatcore"]:
        label, value, (low, high), lacks = result["chatcore"].values()
        lines += [f"  {label:<{width + 9}}{value:>10.4f}  {low:.4f} to {high:.4f}{'  without ' + ', '.join(lacks) if lacks else ''}"]
    return lines


def notes(row: dict) -> str:
    """What a reader of the number should know."""
    too_long = f"  {row['too_long']} too long for the model, counted as wrong" if row["too_long"] else ""
    return too_long + (f"  {row['cut']} of {row['replies']} replies cut" if row["cut"] else "")


def powers(k: int) -> list[int]:
    """2, 4, 8, ... below k, and k; none for a single reply."""
    return [2**e for e in range(1, k.bit_length()) if 2**e < k] + [k] if k > 1 else []


def merged(path, result: dict) -> dict:
    """`result` over what an earlier evaluation of the same step with the same settings found for other tasks."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if any(earlier.get(key) != result[key] for key in ("model", "step", "settings")):
        return result
    tasks = {**earlier["tasks"], **result["tasks"]}
    missing = {name: why for name, why in {**earlier["missing"], **result["missing"]}.items() if name not in tasks}
    return {**result, "tasks": tasks, "missing": missing}


if __name__ == "__main__":
    main(lambda: run(parse(ChatEvalConfig)))

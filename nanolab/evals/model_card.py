"""README.md of a model that leaves the house: how to load it, what it is, how it was made, how good it is, what it
cannot do.

Written from the records of its runs (card.py); what is not on record is not on the card. Paths of the machine are cut
to their last part."""

import json
import re
from collections.abc import Iterator
from typing import Any

from nanolab.data.tokenizer import Tokenizer
from nanolab.evals.card import PERCENT, Stage, chain, results_of
from nanolab.evals.card_tables import amount, exchanges, head, number_text
from nanolab.evals.hellaswag import RULES
from nanolab.evals.record import of_step
from nanolab.model.accounting import n_params
from nanolab.model.config import GPTConfig, chosen
from nanolab.records import checkpoint
from nanolab.records.environment import git_commit
from nanolab.records.models import ModelRef, runs_dir
from nanolab.tables import markdown_table

# kind -> (what a run of it did, what it learnt from, by its flags)
DID = {
    "base": ("pretrained on", lambda c: c["data_dir"] or c["data"]),
    "sft": ("fine-tuned on conversations of", lambda c: c["stages"] or c["tasks"]),
    "rl": ("improved by its own replies to", lambda c: c["task"]),
}


def model_card(found: ModelRef, c: GPTConfig, tokenizer: Tokenizer, dtype: str, code: str, licence: str) -> str:
    """Markdown with the hub's header. code: the file that transformers needs to read the folder, under `licence`; empty
    where it needs none.
    """
    stages, gap = stages_of(found)
    chat, known = stages[-1].kind != "base", not gap and not any("imported" in stage.meta["env"] for stage in stages)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- nanolab",
        "---",
        "",
        f"# {found.name}",
        "",
        (
            f"A {'chat' if chat else 'base'} language model of {n_params(c)['total']:,} parameters, made with nanolab:"
            f" run {found.name}, step {found.step:,}."
        ),
        "",
        *loading(chat, code, licence, tokenizer.decode([tokenizer.bos]), known),
        *shape(c, tokenizer, dtype),
        *history(stages, gap),
        *quality(stages[-1], dtype),
        *limit_lines(c, chat, bool(code)),
    ]
    return "\n".join(lines)


def stages_of(found: ModelRef) -> tuple[list[Stage], str]:
    """The stages that led to the model; where the records before its own run are gone, that one and what it started
    from.
    """
    if is_whole(found):
        return chain(found), ""
    meta = checkpoint.load_meta(found.checkpoint)
    text, chat = (of_step(found.run_dir / name, found.step) for name in ("eval_base.json", "eval_chat.json"))
    stage = Stage(
        meta["kind"], found.name, found.step, found.run_dir, meta, text if text and "val" in text else None, chat
    )
    return (
        [stage],
        (
            f"It started from {meta['origin']['name']}, whose records, or those of what that started from, are not"
            " there any more."
        ),
    )


def is_whole(found: ModelRef) -> bool:
    """Whether every checkpoint that led to the model is there; each names the one before."""
    name, step = found.name, found.step
    while name:
        path = dict(checkpoint.steps(runs_dir() / name / "checkpoints")).get(step)
        if path is None:
            return False
        name, _, at = checkpoint.load_meta(path).get("origin", {"name": ""})["name"].partition("@")
        step = int(at or 0)
    return True


def loading(chat: bool, code: str, licence: str, bos: str, known: bool) -> list[str]:
    """known: whether all of its training is on record."""
    trust = ", trust_remote_code=True" if code else ""
    prompt = (
        [
            'messages = [{"role": "user", "content": "What is 6 times 7?"}]',
            (
                "inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True,"
                ' return_tensors="pt")'
            ),
        ]
        if chat
        else ['inputs = tokenizer(tokenizer.bos_token + "Once upon a time", return_tensors="pt")']
    )
    lines = [
        "## How to load it",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # this folder, or USER/NAME where it was uploaded',
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
        f"model = AutoModelForCausalLM.from_pretrained(folder{trust})",
        *prompt,
        "output = model.generate(**inputs, max_new_tokens=64)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
        "",
    ]
    if code:
        at = f" at commit {commit}" if (commit := git_commit()) else ""
        lines += [
            (
                f"transformers does not have this architecture: its code is `{code}`, nanolab's own source{at} in one"
                f" file. {licence}. Read it before you trust it."
            ),
            "",
        ]
    template = (
        "The chat template puts it there; it renders conversations as nanolab's server does, and marks what nanolab"
        " trains on, for `assistant_only_loss=True` of TRL."
    )
    start = template if chat else "The tokenizer does not add it: put `tokenizer.bos_token` before a text, as above."
    said = (
        f"Every text that the model was trained on begins with `{bos}`."
        if known
        else f"nanolab begins every text with `{bos}`."
    )
    return [*lines, f"{said} {start}", ""]


def shape(c: GPTConfig, tokenizer: Tokenizer, dtype: str) -> list[str]:
    return [
        "## What it is",
        "",
        *markdown_table(
            ["", ""],
            ["layers, width, heads", f"{c.n_layer}, {c.n_embd}, {c.n_head}"],
            ["parameters", f"{n_params(c)['total']:,}"],
            ["longest text", f"{c.sequence_len:,} tokens, prompt and reply together"],
            ["vocabulary", f"{c.vocab_size:,} tokens, {len(tokenizer.specials)} of them special"],
            ["architecture", ", ".join(chosen(c)) or "nanolab's defaults"],
            ["weights", {"fp32": "fp32, as trained", "bf16": "rounded to bf16"}[dtype]],
        ),
        "",
    ]


def history(stages: list[Stage], gap: str) -> list[str]:
    rows = [
        [
            stage.label,
            f"{stage.run}@{stage.step}",
            "-" if "imported" in stage.meta["env"] else amount(stage.tokens, ",.0f"),
            amount(stage.flops, ".2e"),
            f"{stage.seconds:,.0f} s",
            f"{stage.meta['env']['world_size']} x {stage.meta['env']['device_name']}, {stage.meta['env']['dtype']}",
            f"`{stage.meta['env']['commit'] or 'not known'}`",
        ]
        for stage in stages
    ]
    lines = [
        "## How it was made",
        "",
        *(f"- {stage.label}: {made(stage)}" for stage in stages),
        "",
        *markdown_table(
            ["stage", "run and step", "tokens", "FLOPs", "training", "hardware", "nanolab's commit"], *rows
        ),
        "",
    ]
    notes = [gap] if gap else []
    if any(stage.kind == "rl" and not stage.work for stage in stages):
        notes += ["Tokens of rl are those of the replies that it drew; its FLOPs are not on record."]
    for stage in stages:
        if stage.work:
            spent = (
                f"{stage.work['training_flops']:.2e} are of training and {stage.work['generating_flops']:.2e} of"
                " drawing the replies"
            )
            notes += [f"Tokens of {stage.label} are those of prompts and replies in each update; of its FLOPs {spent}."]
    if any((stage.meta["env"]["commit"] or "").endswith("+changes") for stage in stages):
        notes += ["A commit with +changes: the code had changes that are in no commit."]
    return [*lines, *([" ".join(notes), ""] if notes else [])]


def made(stage: Stage) -> str:
    """What a stage did."""
    if source := stage.meta["env"].get("imported"):
        return (
            f"imported from a folder of transformers, `{last_parts(source.replace(',', '_'))}`; how that was trained is"
            " not on record"
        )
    did, of = DID[stage.kind]
    return f"{did} `{last_parts(of(stage.meta['config']))}`"


def last_parts(mixture: str) -> str:
    """A mixture of names and paths with each path cut: jsonl=/home/me/a.jsonl:2,gsm8k:1 -> jsonl=a.jsonl:2, gsm8k:1."""
    return ", ".join(re.sub(r"[^=,]*[/\\]", "", part) for part in mixture.rstrip("/\\").split(","))


def quality(last: Stage, dtype: str) -> list[str]:
    """Figures of the last stage, and a few of its words."""
    lines = ["## How good it is", ""]
    found = [(row, at) for _, row, at, _ in results_of(last, last.chat)] + list(
        published(of_step(last.run_dir / "eval_base.json", last.step) or {})
    )
    if not found:
        return [*lines, f"No evaluation of {last.run}@{last.step} is on record.", ""]
    rows = [
        [
            head(row),
            "-" if row["baseline"] is None else number_text(row["baseline"], row["unit"]),
            number_text(at["value"], row["unit"]),
            interval(row, at),
        ]
        for row, at in found
    ]
    lines += [*markdown_table(["", "by guessing", "this model", "95 % interval"], *rows), ""]
    if dtype != "fp32":
        lines += [f"All of this was measured before the weights were rounded to {dtype}.", ""]
    if last.text:
        lines += [f"Bits per byte: on held-out text of {last_parts(last.text['data'])}; lower is better.", ""]
    if last.chat:
        lines += [f"Tasks: right answers; n problems. {sampling_text(last.chat['settings'])}", ""]
        lines += [
            "The first questions of each task, as they come:",
            "",
            "```text",
            *exchanges(last.chat["tasks"]),
            "```",
            "",
        ]
    elif samples := (last.text or {}).get("samples"):
        lines += [
            "It continues text like this, choosing the likeliest token each time:",
            "",
            *(
                f"- {json.dumps(s['prompt'], ensure_ascii=False)} -> {json.dumps(s['text'], ensure_ascii=False)}"
                for s in samples[:3]
            ),
            "",
        ]
    return lines


def sampling_text(settings: dict[str, Any]) -> str:
    """How the replies came about, of which the tasks' shares are."""
    k = settings.get("num_samples", 1)
    said = ", ".join(
        f"{name.replace('_', ' ')} {settings[name]}" for name in ("temperature", "max_tokens") if name in settings
    )
    each = f", {k} to each problem, of which the share of right ones counts," if k > 1 else ""
    calls = (
        ""
        if "tool" not in settings
        else (
            f"; calls in them were answered by the tool {settings['tool']}"
            if settings["tool"]
            else "; calls of a tool in them were not answered"
        )
    )
    return f"Replies were drawn{each} with {said}{calls}."


def published(record: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """CORE with its tasks, HellaSwag and LAMBADA of eval_base.json, as `measured` gives others: (the metric's facts,
    the figure).
    """

    def share(name: str, found: dict[str, Any], n: int, baseline: float | None):
        return {"metric": name, "unit": PERCENT, "n": n, "baseline": baseline}, {
            "value": found["accuracy"],
            "interval": found["interval"],
        }

    if core := record.get("core"):
        if core["value"] is not None:
            yield (
                {"metric": core["label"], "unit": "score", "n": None, "baseline": None},
                {"value": core["value"], "interval": core["interval"]},
            )
        for name, task in core["tasks"].items():
            yield share(f"{name}:{task['shots']}-shot", task, task["n"], task["baseline"])
    if (found := record.get("hellaswag")) and "n" in found:
        for rule in (rule for rule in RULES if rule in found):  # older files lack some
            yield share(f"hellaswag:by loss {rule.replace('_', ' ')}", found[rule], found["n"], 0.25)
    if (found := record.get("lambada")) and "n" in found:
        yield share("lambada:last word", found, found["n"], None)


def interval(row: dict[str, Any], at: dict[str, Any]) -> str:
    return "-" if at["interval"] is None else " to ".join(number_text(end, row["unit"]) for end in at["interval"])


def limit_lines(c: GPTConfig, chat: bool, own_code: bool) -> list[str]:
    end, stop = (
        "<|assistant_end|>",
        (
            "generation stops there"
            if own_code
            else "`generate` does not stop there, but fails: leave room for `max_new_tokens`"
        ),
    )
    said = [
        (
            "What it writes can be false, offensive or nonsense. It was measured on what stands above and on nothing"
            " else; nothing on record makes it safe to rely on."
        ),
        f"Prompt and reply together are {c.sequence_len:,} tokens at most; {stop}.",
        (
            f"A text that contains the name of a special token (`{end}`) is read as that token, also inside a message. "
            "`tokenizer(text, split_special_tokens=True)` reads it as text, as nanolab does."
        ),
        "Which licence the weights and the data are under is not on record.",
    ]
    if chat:
        said.insert(
            2,
            "It may call a calculator between `<|python_start|>` and `<|python_end|>`. nanolab answers such calls;"
            " `generate` does not: what follows a call is made up, unless `<|python_end|>` is among its"
            " `eos_token_id`.",
        )
    if own_code:
        said.insert(
            -1,
            "Its vocabulary cannot be resized, and attention weights and hidden states are not returned. Beam search"
            " works; assisted generation does not.",
        )
    else:
        said.insert(
            -1,
            "Padding on the left shifts the positions that transformers' GPT-2 counts in `forward`: pass `position_ids`"
            " there, or pad on the right. `generate` counts them from the mask.",
        )
    return ["## What it cannot do", "", *(f"- {line}" for line in said), ""]

"""HellaSwag (arXiv 1905.07830) and LAMBADA (arXiv 1606.06031) by themselves, as GPT-2's reproductions and
lm-evaluation-harness score them.

Of a HellaSwag item the ending with the lowest loss is chosen: of the sum over its tokens (both report it), of the mean
over its tokens (reproductions of GPT-2), or of the sum divided by its characters (the harness's acc_norm) or its bytes
(its acc_bytes, which is another number where a text is not ASCII). The texts are those of the data: the original file's
as they are, which the reproductions read, or the bundle's, cleaned as the harness cleans them. The ending is encoded by
itself, behind a blank, and all of its tokens count. A tokenizer that puts a blank of its own before every text would
make that two; there texts are encoded whole."""

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from nanolab.evals import icl
from nanolab.evals.bundle import TaskSpec, read_items
from nanolab.evals.likelihood import Scorer, judge_groups
from nanolab.evals.score import Z95, Interval, perplexity, wilson
from nanolab.runtime import Runtime
from nanolab.tables import interval_text, text_table

RULES = ("sum", "per_token", "per_character", "per_byte")


def hellaswag(
    reader: Scorer, tokenizer: icl.Encoder, items: Sequence[icl.Question], runtime: Runtime, *, bos: bool = True
) -> dict[str, Any]:
    """{"n", rule: {"accuracy", "interval"} for each of RULES, "cut"}. bos: whether texts begin with that token. On
    every rank.
    """
    groups = encode_ending(items, range(runtime.rank, len(items), runtime.world_size), tokenizer, bos)

    def judge(scores: Sequence[icl.Score], group: icl.ItemGroup) -> tuple[bool, ...]:
        answers = items[group.index].answers
        sizes = [
            (1, s.n_tokens, max(1, len(a)), max(1, len(a.encode("utf-8", "surrogatepass"))))
            for s, a in zip(scores, answers)
        ]
        losses = [[s.nats / size for s, size in zip(scores, of_rule)] for of_rule in zip(*sizes)]
        return *(row.index(min(row)) == group.gold for row in losses), any(s.cut for s in scores)

    found = judge_groups(reader, groups, runtime, judge, "hellaswag")
    n = len(found)
    right = {rule: sum(outcome[i] for outcome in found) / n for i, rule in enumerate(RULES)}
    return {
        "n": n,
        **{rule: {"accuracy": p, "interval": wilson(p, n)} for rule, p in right.items()},
        "cut": sum(outcome[-1] for outcome in found),
    }


def encode_ending(
    items: Sequence[icl.Question], indices: Sequence[int], tokenizer: icl.Encoder, bos: bool
) -> Iterator[icl.ItemGroup]:
    first = [tokenizer.bos] if bos else []
    before, behind, both = tokenizer.encode_batch(["a", " b", "a b"])
    alone = before + behind == both  # whether what stands behind a blank is encoded there as it is by itself
    contexts = tokenizer.encode_batch([items[i].contexts[0] for i in indices])
    endings = iter(
        tokenizer.encode_batch(
            [f"{'' if alone else items[i].contexts[0]} {answer}" for i in indices for answer in items[i].answers]
        )
    )
    for i, context in zip(indices, contexts):
        head = [*first, *context]
        texts = [[*(head if alone else first), *next(endings)] for _ in items[i].answers]
        yield icl.group(i, items[i].gold, texts, [len(head) if alone else icl.common([head, text]) for text in texts])


def lambada(
    reader: Scorer, tokenizer: icl.Encoder, task: TaskSpec, runtime: Runtime, max_items: int = -1
) -> dict[str, Any]:
    """{"n", "accuracy", "interval", "perplexity", "perplexity_interval", "cut"}, on every rank.

    accuracy: of items whose last word's tokens are each the likeliest. perplexity: exp of the mean over items of the
    word's nats, as lm-evaluation-harness has it; its interval by the standard error of that mean."""
    items = read_items(task, max_items)
    mine = range(runtime.rank, len(items), runtime.world_size)
    groups = icl.encode_groups(task.kind, items, mine, task.shots, task.delimiter, tokenizer)
    found = judge_groups(reader, groups, runtime, lambda scores, group: scores[0], task.label)
    n, nats = len(found), [s.nats for s in found]
    accuracy, mean = sum(s.greedy for s in found) / n, statistics.fmean(nats)
    half = Z95 * statistics.stdev(nats) / math.sqrt(n) if n > 1 else None
    ends = None if half is None else Interval(perplexity(mean - half), perplexity(mean + half))
    return {
        "n": n,
        "accuracy": accuracy,
        "interval": wilson(accuracy, n),
        "perplexity": perplexity(mean),
        "perplexity_interval": ends,
        "cut": sum(s.cut > 0 for s in found),
    }


def hellaswag_table(found: dict[str, Any]) -> list[str]:
    """One line for each way to choose."""
    says = {
        "sum": "lowest sum of losses (acc)",
        "per_token": "lowest loss per token (acc_norm of GPT-2's reproductions)",
        "per_character": "lowest loss per character (acc_norm of lm-evaluation-harness)",
        "per_byte": "lowest loss per byte (acc_bytes of lm-evaluation-harness)",
    }
    rows = [
        [what, f"{found[rule]['accuracy']:.4f}", interval_text(found[rule]["interval"])] for rule, what in says.items()
    ]
    columns = {"chosen by": "left", "accuracy": "right", "95 % interval": "left"}
    return [f"HellaSwag, {found['n']:,} items; guessing reaches 0.25", *text_table(columns, rows)]


def lambada_table(found: dict[str, Any]) -> list[str]:
    rows = [
        [name, f"{found[name]:,.4f}", interval_text(found[ends], ",.4f")]
        for name, ends in (("accuracy", "interval"), ("perplexity", "perplexity_interval"))
    ]
    columns = {"": "left", "value": "right", "95 % interval": "left"}
    return [f"LAMBADA, {found['n']:,} items", *text_table(columns, rows)]

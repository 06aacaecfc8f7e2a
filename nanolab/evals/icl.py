"""In-context items, as CORE has them: an item of a task, after k solved ones, becomes texts whose likelihoods decide
it.

    multiple_choice     one context, several answers          right: the answer with the lowest mean loss per token is
                        the true one
    schema              several contexts, one answer          right: the answer is likeliest, per token, after the true
                        context
    language_modeling   one context, one answer               right: each token of the answer is the likeliest one

A solved item is context + delimiter + answer and a blank line behind it. The k of item i are drawn from the others by
the seed
1234 + i. Prompts, draws and decisions are those of karpathy/nanochat (core_eval.py), which follows DCLM (arXiv
2406.11794). A text that is
longer than the model reads is cut to the model's context, as in DCLM: its last tokens count. nanochat's own model reads
such texts whole.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from nanolab.cli import UserError
from nanolab.evals.likelihood import Score, Scorer, Text, common, score
from nanolab.runtime import Runtime, Stop, Stopped

T = TypeVar("T")


class Encoder(Protocol):
    """What is asked of a tokenizer."""

    @property
    def bos(self) -> int: ...  # what a text begins with
    def encode_batch(self, texts: Sequence[str], /) -> list[list[int]]: ...


SHOT_SEED = 1234
CHUNK = 1 << 20  # tokens of texts that are lists at once: a list takes ten times the room of an array


class Question(NamedTuple):
    """A question; one of `contexts` and `answers` has several entries, of which number `gold` is the true one."""

    contexts: tuple[str, ...]
    answers: tuple[str, ...]
    gold: int = 0


class ItemGroup(NamedTuple):
    """The texts of one item in tokens: what they begin with in common, what each goes on with, and where the scored
    ones begin.
    """

    index: int
    gold: int
    prefix: np.ndarray  # int32
    tails: list[np.ndarray]
    starts: list[int]

    def texts(self) -> list[Text]:
        prefix = self.prefix.tolist()
        return [Text(prefix + tail.tolist(), start) for tail, start in zip(self.tails, self.starts)]

    @property
    def n_tokens(self) -> int:
        return sum(len(self.prefix) + len(tail) for tail in self.tails)


class Kind(NamedTuple):
    """A type of task."""

    item: Callable[[dict[str, Any]], Question]  # of a row of the data; raises UserError
    starts: Callable[[list[list[int]]], list[int]]  # where the scored tokens of each text begin
    right: Callable[[Sequence[Score], int], bool]  # by the scores of the texts and the true one's number
    continues: bool = False  # the text without its answer is needed to find out where that begins


def _text(row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, (str, int, float)):
        raise UserError(f"{field} is {_seen(value)}; expected text")
    return str(value)


def _options(row: dict[str, Any], field: str) -> tuple[tuple[str, ...], int]:
    """(texts to choose from, number of the true one)."""
    found, gold = row.get(field), row.get("gold")
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(x, (str, int, float)) for x in found):
        raise UserError(f"{field} is {_seen(found)}; expected a list of at least 2 texts")
    if not isinstance(gold, int) or not 0 <= gold < len(found):
        raise UserError(
            f"gold is {_seen(gold)}; expected the number of the true one of {len(found)} {field}, from 0 to"
            f" {len(found) - 1}"
        )
    if len(set(found)) == 1:
        raise UserError(f"all {len(found)} {field} are the same; expected texts that differ")
    return tuple(map(str, found)), gold


def _seen(value: Any) -> str:
    return "missing" if value is None else repr(value)[:60]


def _choice_item(row: dict[str, Any]) -> Question:
    answers, gold = _options(row, "choices")
    return Question((_text(row, "query"),), answers, gold)


def _schema_item(row: dict[str, Any]) -> Question:
    contexts, gold = _options(row, "context_options")
    return Question(contexts, (_text(row, "continuation"),), gold)


def _language_item(row: dict[str, Any]) -> Question:
    if not (answer := _text(row, "continuation")).strip():
        raise UserError("continuation is empty; expected text to predict")
    return Question((_text(row, "context").strip(),), (answer,))


def _after_prefix(texts: list[list[int]]) -> list[int]:
    """After what all have in common; where one choice is the beginning of the others, its last token is scored, and
    theirs there.
    """
    return [min(common(texts), min(map(len, texts)) - 1)] * len(texts)


def _before_suffix(texts: list[list[int]]) -> list[int]:
    suffix = common([text[::-1] for text in texts])
    return [len(text) - suffix for text in texts]


def _after_context(texts: list[list[int]]) -> list[int]:
    """texts: with the answer, and without it. Where a token spans the seam (the reference stops there), it is
    scored.
    """
    return [common(texts)]


def lowest_mean(scores: Sequence[Score], gold: int) -> bool:
    means = [score.nats / score.n_tokens for score in scores]
    return means.index(min(means)) == gold


def is_greedy(scores: Sequence[Score], gold: int) -> bool:
    return scores[0].greedy


KINDS = {
    "multiple_choice": Kind(_choice_item, _after_prefix, lowest_mean),
    "schema": Kind(_schema_item, _before_suffix, lowest_mean),
    "language_modeling": Kind(_language_item, _after_context, is_greedy, continues=True),
}


def shots(i: int, n: int, k: int) -> list[int]:
    """The k of n items, without item i, that are shown solved before it."""
    return [j + (j >= i) for j in random.Random(SHOT_SEED + i).sample(range(n - 1), k)]


def prompts(item: Question, solved: Sequence[Question], delimiter: str) -> list[str]:
    """One text for each context and answer of the item, after the solved ones."""
    head = "".join(
        f"{s.contexts[s.gold if s.contexts[1:] else 0]}{delimiter}{s.answers[s.gold if s.answers[1:] else 0]}\n\n"
        for s in solved
    )
    return [f"{head}{context}{delimiter}{answer}" for context in item.contexts for answer in item.answers]


def rendered(kind: str, items: Sequence[Question], i: int, k: int, delimiter: str) -> list[str]:
    """What is encoded for item i: its texts, and where the kind asks for it the one without its answer, stripped."""
    solved = [items[j] for j in shots(i, len(items), k)] if k else []
    texts = prompts(items[i], solved, delimiter)
    return texts + (
        [prompts(items[i]._replace(answers=("",)), solved, delimiter)[0].strip()] if KINDS[kind].continues else []
    )


def encode_groups(
    kind: str, items: Sequence[Question], indices: Sequence[int], k: int, delimiter: str, tokenizer: Encoder
) -> Iterator[ItemGroup]:
    """The groups of items `indices`, each text after the beginning-of-text token.

    Texts are encoded whole: what a tokenizer joins across the seams of their parts is joined.
    """
    rule = KINDS[kind]
    for first in range(0, len(indices), 256):  # so that the texts need not all be there at once
        part = indices[first : first + 256]
        texts = [rendered(kind, items, i, k, delimiter) for i in part]
        ids = iter(tokenizer.encode_batch([text for of_item in texts for text in of_item]))
        for i, of_item in zip(part, texts):
            encoded = [[tokenizer.bos, *next(ids)] for _ in of_item]
            starts = rule.starts(encoded)
            yield group(i, items[i].gold, encoded[: len(starts)], starts)


def group(index: int, gold: int, texts: Sequence[Sequence[int]], starts: list[int]) -> ItemGroup:
    """The texts with what they have in common held once."""
    shared = common(texts)
    return ItemGroup(
        index,
        gold,
        np.array(texts[0][:shared], np.int32),
        [np.array(text[shared:], np.int32) for text in texts],
        starts,
    )


def judge_groups(
    reader: Scorer,
    groups: Iterable[ItemGroup],
    runtime: Runtime,
    judge: Callable[[Sequence[Score], ItemGroup], T],
    label: str = "",
    stop: Stop = lambda: False,
) -> list[T]:
    """judge(scores, group) of every rank's groups, in the order of their indices, on every rank.

    groups: those of this rank. Raises UserError on every rank where one of them cannot be made or has a text that
    cannot be scored, and Stopped where `stop`, which is asked before each pass, said so on one: when the others are
    done or were asked too."""
    found: list[tuple[int, T]] = []
    why: str | Stopped = ""
    try:
        for part in _chunks(sorted(groups, key=lambda group: group.n_tokens)):
            scores = score(reader, [group.texts() for group in part], label=label, stop=stop)
            found += [(group.index, judge(of_group, group)) for group, of_group in zip(part, scores)]
    except UserError as error:
        why = str(error)
    except Stopped as error:
        why = error
    parts = runtime.gather_objects((found, why))
    if any(isinstance(why, Stopped) for _, why in parts):
        raise Stopped
    if why := next((why for _, why in parts if why), ""):
        raise UserError(why)
    return [result for _, result in sorted((pair for part, _ in parts for pair in part), key=lambda pair: pair[0])]


def _chunks(groups: Sequence[ItemGroup]) -> Iterator[list[ItemGroup]]:
    chunk, size = [], 0
    for group in groups:
        if chunk and size + group.n_tokens > CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append(group)
        size += group.n_tokens
    if chunk:
        yield chunk

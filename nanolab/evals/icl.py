"""Questions of kind likelihood, as CORE asks them: a question, after k solved ones, becomes texts whose likelihoods
decide it. Imports no torch.

    multiple_choice     one context, several answers          right: the answer with the lowest mean loss per token is
                        the true one
    schema              several contexts, one answer          right: the answer is likeliest, per token, after the true
                        context
    language_modeling   one context, one answer               right: each token of the answer is the likeliest one

A solved item is context + delimiter + answer and a blank line. The k of item i are drawn from the others by the seed
1234 + i. Prompts, draws and decisions are those of karpathy/nanochat (core_eval.py), which follows DCLM (arXiv
2406.11794). A text longer than the model's context is cut to it, as in DCLM: its last tokens count. nanochat's own
model reads such texts whole.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from nanolab.cli import UserError


class Encoder(Protocol):
    """What is asked of a tokenizer."""

    @property
    def bos(self) -> int: ...  # what a text begins with
    def encode_batch(self, texts: Sequence[str], /) -> list[list[int]]: ...


SHOT_SEED = 1234


class Question(NamedTuple):
    """A question; one of `contexts` and `answers` has several entries, of which number `gold` is the true one."""

    contexts: tuple[str, ...]
    answers: tuple[str, ...]
    gold: int = 0


class Text(NamedTuple):
    """A text in tokens, of which those from `start` on are scored; 1 <= start < len(ids)."""

    ids: Sequence[int]
    start: int


class Score(NamedTuple):
    nats: float  # -log p of the scored tokens, their sum
    n_tokens: int  # that were scored
    greedy: bool  # each of them is the likeliest one; of equals the lowest id is
    cut: int  # tokens dropped on the left, since the text is longer than the model reads


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


def common(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts begin with: as many as the first and the last in lexical order."""
    first, last = min(texts), max(texts)
    return next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))


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


def all_greedy(scores: Sequence[Score], gold: int) -> bool:
    return scores[0].greedy


KINDS = {
    "multiple_choice": Kind(_choice_item, _after_prefix, lowest_mean),
    "schema": Kind(_schema_item, _before_suffix, lowest_mean),
    "language_modeling": Kind(_language_item, _after_context, all_greedy, continues=True),
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

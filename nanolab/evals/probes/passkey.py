"""Passkey retrieval: can a number be read back from a long text of filler? Mohtashami and Jaggi, arXiv 2305.16300.

A text of k T tokens, T the training length, is filler around one sentence with a random number of five digits, and ends
with the question for it. depth: the share of the filler that comes before that sentence. The same numbers and places
are asked at every length. Of each text the answer's tokens are scored in one pass:

    exact   share of texts whose answer is, token by token, the likeliest: what greedy decoding writes
    nats    mean -log p of the answer
    gain    mean over texts of log p(answer) - log p(another number as the answer): above 0 where the model tells the
            number that it has read from one that it has not, which small models do long before they are exact

    {"x1", "x2", "x4": {"exact", "nats", "gain", "by_depth": {"0.0": {"exact", "nats", "gain"}, ...}} or null where the
     model cannot read such rows, "unread": the lengths that are null -> why, "length": T, "n": texts of one length and
     depth}"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanolab.cli import UserError
from nanolab.evals.icl import ItemGroup, Score, group
from nanolab.evals.likelihood import GPTReader, judge_groups
from nanolab.evals.probes import Result
from nanolab.evals.probes.common import Given, token_limit
from nanolab.runtime import print0

TIMES, DEPTHS = (1, 2, 4), (0.0, 0.25, 0.5, 0.75, 1.0)
LEAST = 4  # texts of each length and depth
SEED = 42
FILLER = " The water rises and the water falls. Boats lie on the sand and wait for the evening."
NEEDLE, QUESTION = (
    " The pass key is {0}. Keep it in mind: {0} is the pass key.",
    " What is the pass key? The pass key is",
)


def measure_passkey(given: Given) -> Result:
    """What the file's docstring says. Raises UserError where a row of T does not hold sentence and question."""
    T, draws = given.seq_len, random.Random(SEED)
    of_all = 2 * len(DEPTHS) * sum(TIMES) * T  # tokens read for one number
    n = max(LEAST, token_limit(given.tokens, given.runtime) // of_all)
    numbers = [draws.sample(range(10_000, 100_000), 2) for _ in range(n)]
    reader = GPTReader(given.model, given.runtime)
    found: Result = {"length": T, "n": n}
    unread: dict[str, str] = {}
    for k in TIMES:
        reader.limit = k * T + 1  # the last token is not read
        try:
            found[f"x{k}"] = of_length(given, reader, k * T, numbers)
            says = "exact {exact:.3f}, {nats:.3f} nats, gain {gain:+.3f}".format(**found[f"x{k}"])
        except UserError as error:
            if k == 1:
                raise
            found[f"x{k}"], unread[f"x{k}"], says = None, str(error), str(error)
        print0(f"probe           passkey: {k * T} tokens: {says}")
    return found | {"unread": unread}


def of_length(given: Given, reader: GPTReader, length: int, numbers: list[list[int]]) -> Result:
    cells, runtime = [(depth, *pair) for depth in DEPTHS for pair in numbers], given.runtime
    mine = range(runtime.rank, len(cells), runtime.world_size)
    groups = (text_group(given.tokenizer, i, length, *cells[i]) for i in mine)
    stop = given.stop or (lambda: False)
    pairs = judge_groups(reader, groups, runtime, lambda scores, group: scores, f"passkey {length}", stop)
    n = len(numbers)
    by_depth = {str(depth): of_cell(pairs[i * n : (i + 1) * n]) for i, depth in enumerate(DEPTHS)}
    return of_cell(pairs) | {"by_depth": by_depth}


def text_group(tokenizer: Any, index: int, length: int, depth: float, number: int, other: int) -> ItemGroup:
    """The text of `length` tokens that hides `number`, with it as the answer, and the same with `other`."""
    needle, question, filler = map(tokenizer.encode, (NEEDLE.format(number), QUESTION, FILLER))
    answers = [tokenizer.encode(f" {answer}") for answer in (number, other)]
    room = length - 1 - len(needle) - len(question) - max(map(len, answers))
    if room < 0:
        raise UserError(
            f"a text of {length} tokens does not hold the {length - room} of pass key and question; expected a longer"
            " context; leave the probe passkey out",
            "passkey-room",
            length=length,
            needed=length - room,
        )
    hay = (filler * (room // len(filler) + 1))[:room]
    at = round(depth * room)
    head = [tokenizer.bos, *hay[:at], *needle, *hay[at:], *question]
    return group(index, 0, [[*head, *answer] for answer in answers], [len(head)] * 2)


def of_cell(pairs: list[Sequence[Score]]) -> dict[str, float]:
    """Of (score of the number that was read, score of the other one)."""
    right = [score for score, _ in pairs]
    return {
        "exact": float(np.mean([score.greedy for score in right])),
        "nats": float(np.mean([score.nats for score in right])),
        "gain": float(np.mean([other.nats - score.nats for score, other in pairs])),
    }

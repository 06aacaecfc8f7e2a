"""Log-likelihoods of texts' tails: how well a model expects what is there, token by token, whatever task asks.

What texts of one group begin with in common is read once, into a KV cache whose row is then copied to each of them;
texts of like lengths are read together, up to so many tokens; the head sees only the places that count. Texts that
share little are read whole, padded on the right: attention is causal, so that nothing behind a place reaches it. Dims:
N prefixes, R rows, L tokens of a prefix, T of a row, K places that count, C width, V vocabulary."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanolab.cli import UserError
from nanolab.evals.icl import ItemGroup, Score, Text, common
from nanolab.inference.cache import KVCache
from nanolab.inference.prefill import in_blocks
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime, Stop, Stopped
from nanolab.terminal import progress

T = TypeVar("T")
CHUNK = 1 << 20  # tokens of texts that are lists at once: a list takes ten times the room of an array
WORTH = 48  # tokens that a shared prefix has to save: less, and the second pass costs more
ALIKE = 16  # tokens of texts that begin alike; those that were cut at different places do not


class Reads(NamedTuple):
    """One pass of a model: rows, padded on the right, each behind its prefix where there are prefixes."""

    prefixes: np.ndarray | None  # (N, L) int64
    of: list[int]  # R: the prefix of each row
    ids: np.ndarray  # (R, T) int64
    # (K,): places that count, row by row: after which tokens of `ids` the next one's probability is asked
    rows: np.ndarray
    columns: np.ndarray  # (K,)


class Scorer(Protocol):
    """What scores texts."""

    limit: int  # tokens of a text
    tokens: int  # of one pass, where nobody says how many
    shares: bool  # whether `logits` reads prefixes

    def logits(
        self, reads: Reads
    ) -> Iterator[Tensor]: ...  # (n, V), at least fp32, for the next n places, until all K are done


class GPTReader:
    """A model of nanolab, in eval mode, as it is: `served` makes one faster that is not trained any more."""

    shares = True

    def __init__(self, model: GPT, runtime: Runtime):
        self.model, self.device, self.limit = model, runtime.device, model.config.sequence_len
        self.tokens = 2048 if runtime.device.type == "cpu" else 32768

    def logits(self, reads: Reads) -> Iterator[Tensor]:
        cache = None
        if reads.prefixes is not None:
            (N, L), T = reads.prefixes.shape, reads.ids.shape[1]
            sizes = {"capacity": L + T, "limit": self.limit}
            cache = KVCache(self.model.config, N, **sizes, dtype=self.model.compute_dtype, device=self.device)
            nowhere = torch.zeros(0, dtype=torch.int64, device=self.device)
            self.model.hidden(torch.from_numpy(reads.prefixes).to(self.device), cache, at=(nowhere, nowhere))
            cache.select(reads.of)
        yield from logits_at(self.model, reads.ids, reads.rows, reads.columns, self.device, cache)


def logits_at(
    model: GPT,
    ids: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    device: torch.device,
    cache: KVCache | None = None,
) -> Iterator[Tensor]:
    """Logits (n, V) after the tokens `columns` (K,) of `rows` (K,) of ids (R, T), n places at a time."""
    at = torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)
    yield from in_blocks(model, model.hidden(torch.from_numpy(ids).to(device), cache, at))


def padded(texts: Sequence[Sequence[int]]) -> np.ndarray:
    """(R, T) int64: a row for each text, zeros behind it."""
    out = np.zeros((len(texts), max(map(len, texts))), dtype=np.int64)
    for row, ids in zip(out, texts):
        row[: len(ids)] = ids
    return out


class PackedRow(NamedTuple):
    """Tokens to read, and the texts that are scored by reading them: a text without its last token, and those that it
    begins with.
    """

    ids: Sequence[int]
    texts: list[int]  # numbers among all texts
    first: int  # the first place that counts: one before the lowest start


class Item(NamedTuple):
    """Rows that begin with the same `shared` tokens, and have no place that counts among them."""

    rows: list[PackedRow]
    shared: int


@torch.no_grad()
def score(
    reader: Scorer, groups: Sequence[Sequence[Text]], *, tokens: int = 0, label: str = "", stop: Stop = lambda: False
) -> list[list[Score]]:
    """The score of every text, in the order of `groups`, whatever is read with what.

    groups: texts that may begin alike, such as the choices of one item. A text longer than `reader.limit` loses its
    first tokens. tokens: of one pass, padding included, where an item has no more than that; 0: as the reader says.
    Results depend on it by rounding only. label: of the progress bar. stop: asked before each pass, Stopped is raised
    where it says so. Raises UserError for a text without a scored token, or of which none would be left before the
    scored ones, and where a model's loss is not a finite number."""
    texts = [[shortened(text, reader.limit) for text in group] for group in groups]
    flat, numbers = [text for group in texts for text in group], iter(range(sum(map(len, texts))))
    items = [item for group in texts for item in arranged(group, [next(numbers) for _ in group], reader.shares)]
    nats, greedy = np.zeros(len(flat)), np.ones(len(flat), dtype=bool)
    for batch in progress(list(token_batches(items, tokens or reader.tokens)), label):
        if stop():
            raise Stopped
        measure(reader, batch, flat, nats, greedy)
    if (bad := np.flatnonzero(~np.isfinite(nats))).size:
        raise UserError(
            f"the loss of {bad.size} of {len(flat)} texts is {nats[bad[0]]}; expected a finite number: its weights are"
            " damaged, or too large for their dtype; try NANOLAB_DTYPE=float32"
        )
    done = iter(zip(nats.tolist(), greedy.tolist()))

    def result(text: Text, whole: Text) -> Score:
        lost, is_greedy = next(done)
        return Score(lost, len(text.ids) - text.start, is_greedy, len(whole.ids) - len(text.ids))

    return [[result(*pair) for pair in zip(*both)] for both in zip(texts, groups)]


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


@torch.no_grad()
def check_finite(model: Any, tokenizer: Any, device: torch.device, name: str) -> None:
    """Raises UserError where the losses of a first sentence are not all finite numbers: nothing that the model says
    would mean anything.
    """
    ids = torch.tensor([[tokenizer.bos, *tokenizer.encode("The capital of France is")]], device=device)
    losses = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), reduction="none")
    if bad := int((~torch.isfinite(losses)).sum()):
        seen = f"{name} gives losses that are not finite numbers ({bad} of {losses.numel()} tokens of a first sentence)"
        raise UserError(
            f"{seen}; expected numbers: its weights are damaged, or too large for their dtype; try"
            " NANOLAB_DTYPE=float32 or another @STEP",
            "not-finite",
            model=name,
        )


def shortened(text: Text, limit: int) -> Text:
    """The text's last `limit` tokens."""
    cut = max(0, len(text.ids) - limit)
    if not cut < text.start < len(text.ids):
        raise UserError(
            f"a text of {len(text.ids)} tokens, scored from token {text.start} on, for a model that reads {limit};"
            " expected at least one scored token, and one before it among those that are read; shorten the text, or"
            " use a model with a longer --max-seq-len"
        )
    return Text(list(text.ids[cut:]), text.start - cut)


def arranged(group: Sequence[Text], numbers: Sequence[int], shares: bool) -> list[Item]:
    """An item for the rows that begin alike, where it is worth sharing what they begin with, and one for each of the
    others.
    """
    alike: dict[tuple[int, ...], list[PackedRow]] = {}
    for number, text in sorted(zip(numbers, group), key=lambda pair: -len(pair[1].ids)):
        ids = text.ids[:-1]
        rows = alike.setdefault(tuple(ids[:ALIKE]), [])
        for i, row in enumerate(rows):
            if row.ids[: len(ids)] == ids:
                rows[i] = PackedRow(row.ids, [*row.texts, number], min(row.first, text.start - 1))
                break
        else:
            rows.append(PackedRow(ids, [number], text.start - 1))
    items = []
    for rows in alike.values():
        shared = min(common([row.ids for row in rows]), *(row.first for row in rows)) if shares else 0
        items += [Item(rows, shared)] if (len(rows) - 1) * shared >= WORTH else [Item([row], 0) for row in rows]
    return items


def token_batches(items: Iterable[Item], tokens: int) -> Iterator[list[Item]]:
    """Items to read in one pass, the longest first: of each batch all prefixes are cut to the shortest one's length."""
    batch: list[Item] = []
    for item in sorted(items, key=lambda item: (item.shared, max(len(row.ids) for row in item.rows)), reverse=True):
        if batch and (size([*batch, item]) > tokens or bool(item.shared) != bool(batch[0].shared)):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def size(batch: Sequence[Item]) -> int:
    """Tokens to read, padding included."""
    shared = batch[-1].shared
    rows = [len(row.ids) for item in batch for row in item.rows]
    return len(batch) * shared + len(rows) * (max(rows) - shared)


def measure(reader: Scorer, batch: Sequence[Item], texts: Sequence[Text], nats: np.ndarray, greedy: np.ndarray) -> None:
    """Read a batch and enter what it says of its texts."""
    shared = batch[-1].shared
    prefixes = np.array([item.rows[0].ids[:shared] for item in batch], dtype=np.int64) if shared else None
    rows = [row for item in batch for row in item.rows]
    places = [(r, column - shared) for r, row in enumerate(rows) for column in range(row.first, len(row.ids))]
    reads = Reads(
        prefixes,
        [i for i, item in enumerate(batch) for _ in item.rows],
        padded([row.ids[shared:] for row in rows]),
        *np.array(places).T,
    )

    asked, base = [], 0  # (place, target, number of the text)
    for row in rows:
        for number in row.texts:
            ids, start = texts[number]
            asked += zip(
                range(base + start - 1 - row.first, base + len(ids) - 1 - row.first), ids[start:], [number] * len(ids)
            )
        base += len(row.ids) - row.first
    place, target, number = np.array(sorted(asked)).T
    done = 0
    for logits in reader.logits(reads):
        mine = slice(*np.searchsorted(place, (done, done + len(logits))))
        at, wanted = (torch.from_numpy(x[mine]).to(logits.device) for x in (place - done, target))
        np.subtract.at(nats, number[mine], logits.log_softmax(-1)[at, wanted].double().cpu().numpy())
        np.logical_and.at(greedy, number[mine], is_greedy(logits, at, wanted).cpu().numpy())
        done += len(logits)


def is_greedy(logits: Tensor, at: Tensor, wanted: Tensor) -> Tensor:
    """Whether the tokens `wanted` are the first ones with the largest logit of rows `at`. Few are, and only of these
    argmax is taken, which is slow on CPUs.
    """
    found = logits[at, wanted] == logits.amax(-1)[at]
    rows = found.nonzero()[:, 0]
    found[rows] = logits[at[rows]].argmax(-1) == wanted[rows]
    return found

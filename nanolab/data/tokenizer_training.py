"""Documents -> a tokenizer: training text in file order, long documents as even samples, to a tokenizer.json."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanolab.cli import UserError, check_bounds
from nanolab.data.config import TokTrainConfig
from nanolab.data.corpus import Documents, open_data
from nanolab.data.tokenizer import MIN_VOCAB_SIZE, SPECIAL_TOKENS, Tokenizer
from nanolab.runtime import base_dir

CHECK_CHARS = 4_000_000  # validation text to measure and to round-trip
PART_CHARS = 1000  # of a document over the cap, parts of about this size are read


def train_tokenizer(cfg: TokTrainConfig) -> Tokenizer:
    """Train a tokenizer, write it to `cfg.tokenizer`/tokenizer.json, and return it as it is read from there.

    Raises UserError for flags and data that do not fit, and for text that yields too few merges.
    """
    check_bounds(type(cfg), vars(cfg))
    folder = Path(cfg.tokenizer).expanduser() if cfg.tokenizer else base_dir() / "tokenizer"
    merges = max(cfg.vocab_size - MIN_VOCAB_SIZE, 0)
    print(f"tokenizer    {cfg.vocab_size:,} tokens: 256 bytes, {merges:,} merges, {len(SPECIAL_TOKENS)} special")
    data = open_data(cfg)  # read in file order: no seed
    for label, facts in data.describe():
        print(f"{label:<12} {facts}")
    print(f"reading      at most {cfg.max_chars:,} characters, and {cfg.doc_cap:,} of one document")

    sample, start = Sample(data.train, cfg.max_chars, cfg.doc_cap), time.perf_counter()
    try:
        tokenizer = Tokenizer.train(sample, cfg.vocab_size)
    except UserError as error:
        if error.code != "too-few-merges" or not sample.capped_hard:
            raise
        raise UserError(
            f"the text that was read yields {error.values['merges']:,} merges, but a vocabulary of {cfg.vocab_size:,}"
            f" tokens needs {error.values['needed']:,}; {sample.capped:,} of {sample.documents:,} documents are longer"
            f" than --doc-cap {cfg.doc_cap:,}, so that {sample.chars:,} of {sample.seen:,} characters were read;"
            f" expected more of them; raise --doc-cap, or try --vocab-size {error.values['possible']}",
            error.code,
            **error.values,
            capped=sample.capped,
            doc_cap=cfg.doc_cap,
        ) from error
    seconds, mb = time.perf_counter() - start, sample.bytes / 1e6
    print(f"trained      on {mb:,.1f} MB of {sample.documents:,} documents in {seconds:.1f} s, {mb / seconds:.1f} MB/s")
    if sample.capped_hard:
        print(
            f"capped       {sample.capped:,} of {sample.documents:,} documents are longer than {cfg.doc_cap:,}"
            f" characters: {sample.chars / sample.seen:.1%} of their text was read, evenly spread; --doc-cap raises it"
        )
    path = tokenizer.save(folder)
    tokenizer = Tokenizer.load(path)
    n_bytes, n_tokens = read_back(tokenizer, data.val, path)
    print(f"validation   {n_bytes / 1e6:,.1f} MB, {n_bytes / max(n_tokens, 1):.3f} bytes/token, read back without loss")
    print(f"wrote        {path} ({tokenizer.hash[:12]})")
    return tokenizer


class Sample:
    """Documents for the trainer, those over the cap as even samples, with counts of what was read."""

    def __init__(self, sources: Sequence[tuple[Documents, float]], max_chars: int, doc_cap: int) -> None:
        self.sources, self.max_chars, self.doc_cap = sources, max_chars, doc_cap
        self.documents = self.chars = self.bytes = 0
        self.capped = self.seen = 0  # documents over the cap, and the characters of all documents that were looked at

    def __iter__(self) -> Iterator[str]:
        left = {i: documents.iterate() for i, (documents, _) in enumerate(self.sources)}
        taken = [0.0] * len(left)  # characters by weight
        while left and self.chars < self.max_chars:
            i = min(left, key=taken.__getitem__)
            text = next(left[i], None)
            if text is None:
                del left[i]
                continue
            parts = even_parts(text, min(self.doc_cap, self.max_chars - self.chars))
            n_chars = sum(map(len, parts))
            taken[i] += n_chars / self.sources[i][1]
            self.capped += len(text) > self.doc_cap
            self.seen += len(text)
            self.documents += 1
            self.chars += n_chars
            self.bytes += sum(len(part.encode()) for part in parts)
            yield from parts

    @property
    def capped_hard(self) -> bool:
        """Is less than half of the text of the documents read because of the cap?"""
        return bool(self.capped) and self.chars < 0.5 * self.seen


def even_parts(text: str, cap: int) -> list[str]:
    """`text`, or `cap` characters of it: parts at even distances from its beginning to its end."""
    if len(text) <= cap:
        return [text]
    n = min(max(2, cap // PART_CHARS), cap)
    bounds = [i * cap // n for i in range(n + 1)]
    gap = (len(text) - cap) / max(n - 1, 1)
    return [text[a + int(i * gap) : b + int(i * gap)] for i, (a, b) in enumerate(zip(bounds, bounds[1:]))]


def read_back(tokenizer: Tokenizer, val: Documents, path: Path) -> tuple[int, int]:
    """(bytes, tokens) of the first validation text. Raises RuntimeError where decoding gives another text, or text has
    become a special token.
    """
    texts, chars = [], 0
    for text in val.iterate():
        texts.append(text[: CHECK_CHARS - chars])
        chars += len(texts[-1])
        if chars >= CHECK_CHARS:
            break
    ids = tokenizer.encode_batch(texts)
    for text, row in zip(texts, ids):
        if tokenizer.decode(row) != text or max(row, default=0) >= tokenizer.bos:
            raise RuntimeError(f"round trip failed on {text[:80]!r}: {path} is not to be used")
    return sum(len(text.encode()) for text in texts), sum(map(len, ids))

"""Train the tokenizer: python -m scripts.tok_train --data pydocs --vocab-size 32768

Reads the training documents in file order (a mixture in proportion to its weights) and writes <folder>/tokenizer.json.
"""

import time
from pathlib import Path
from typing import Iterator, Sequence

from nanolab.config import TokTrainConfig, UserError, main, parse

CHECK_CHARS = 4_000_000  # validation text to measure and to round-trip


class Sample:
    """Documents for the trainer, cut and capped, with counts of what was read."""

    def __init__(self, sources: Sequence, max_chars: int, doc_cap: int) -> None:
        self.sources, self.max_chars, self.doc_cap = sources, max_chars, doc_cap
        self.documents = self.chars = self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        left = {i: documents.iterate() for i, (documents, _) in enumerate(self.sources)}
        taken = [0.0] * len(left)  # characters by weight
        while left and self.chars < self.max_chars:
            i = min(left, key=taken.__getitem__)
            text = next(left[i], None)
            if text is None:
                del left[i]
                continue
            text = text[: min(self.doc_cap, self.max_chars - self.chars)]
            taken[i] += len(text) / self.sources[i][1]
            self.documents, self.chars, self.bytes = self.documents + 1, self.chars + len(text), self.bytes + len(text.encode())
            yield text


def run(cfg: TokTrainConfig) -> None:
    from nanolab.data.corpus import open_data
    from nanolab.data.tokenizer import MIN_VOCAB_SIZE, SPECIAL_TOKENS, Tokenizer
    from nanolab.runtime import base_dir

    if cfg.max_chars < 1 or cfg.doc_cap < 1:
        raise UserError(f"--max-chars {cfg.max_chars} and --doc-cap {cfg.doc_cap}; expected at least 1 of each; leave them out for the defaults")
    folder = Path(cfg.tokenizer).expanduser() if cfg.tokenizer else base_dir() / "tokenizer"
    merges = max(cfg.vocab_size - MIN_VOCAB_SIZE, 0)
    print(f"tokenizer    {cfg.vocab_size:,} tokens: 256 bytes, {merges:,} merges, {len(SPECIAL_TOKENS)} special")
    data = open_data(cfg, cfg.seed)
    for documents, weight in data.train:
        print(f"text         {documents.name}: weight {weight:.3g}, {documents.n_documents:,} documents in {len(documents.paths)} files")
    print(f"reading      at most {cfg.max_chars:,} characters, and {cfg.doc_cap:,} of one document")

    sample, start = Sample(data.train, cfg.max_chars, cfg.doc_cap), time.perf_counter()
    tokenizer = Tokenizer.train(sample, cfg.vocab_size)
    seconds = time.perf_counter() - start
    print(f"trained      on {sample.bytes / 1e6:,.1f} MB of {sample.documents:,} documents in {seconds:.1f} s, {sample.bytes / 1e6 / seconds:.1f} MB/s")

    path = tokenizer.save(folder)
    again, texts, chars = Tokenizer.load(path), [], 0
    for text in data.val.iterate():
        texts.append(text[: CHECK_CHARS - chars])
        chars += len(texts[-1])
        if chars >= CHECK_CHARS:
            break
    ids = again.encode_batch(texts)
    for text, row in zip(texts, ids):
        if again.decode(row) != text or max(row, default=0) >= again.bos:
            raise RuntimeError(f"round trip failed on {text[:80]!r}: {path} is not to be used")
    n_bytes, n_tokens = sum(len(text.encode()) for text in texts), sum(map(len, ids))
    print(f"validation   {n_bytes / 1e6:,.1f} MB, {n_bytes / max(n_tokens, 1):.3f} bytes/token, read back without loss")
    print(f"wrote        {path} ({again.hash[:12]})")


if __name__ == "__main__":
    main(lambda: run(parse(TokTrainConfig)))

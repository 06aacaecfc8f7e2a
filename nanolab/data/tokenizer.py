"""Text <-> token ids: byte-level BPE trained with `tokenizers`, served by `tiktoken`, kept in one tokenizer.json.

Ordinary text never yields a special id, whatever it looks like: only code inserts special tokens, by id.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import pre_tokenizers, trainers

from nanolab.cli import UserError
from nanolab.data import tokenizer_files as files

# In the order in which they follow the ordinary tokens. A document starts with bos; the others mark up conversations.
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
# what a document starts with: the one that the vocabulary had first, since GPT-2's weights know theirs
BEGINNINGS = ("<|bos|>", "<|endoftext|>")
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
# tiktoken's regex engine dies on a run of a million blanks; runs longer than this are encoded in parts.
MAX_BLANKS = 500_000
_BLANKS = re.compile(rf"\s{{{MAX_BLANKS + 1},}}")


class Tokenizer:
    """A vocabulary with all nine special tokens; those that a foreign one lacks are appended after its last id."""

    def __init__(self, bpe: files.BPE) -> None:
        specials = dict(bpe.specials)
        end = max(chain(bpe.vocab.values(), specials.values())) + 1
        for name in SPECIAL_TOKENS:
            if name not in specials:
                specials[name] = end
                end += 1
        self._bpe = bpe._replace(specials=specials)
        self._encoding, self._id_of_rank = files.encoding(self._bpe)
        self._bytes = [b""] * end
        for token, i in chain(bpe.vocab.items(), ((name.encode(), i) for name, i in specials.items())):
            self._bytes[i] = token
        self.vocab_size = end
        self.specials: dict[str, int] = specials
        self.bos: int = min(specials[name] for name in BEGINNINGS if name in specials)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn `vocab_size` tokens, special ones included, from `texts`. The same texts give the same tokenizer.

        A pair has to occur twice to become a token. Raises UserError for a size that is too small, or larger than the
        texts support.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(
                f"vocabulary of {vocab_size} tokens; expected at least {MIN_VOCAB_SIZE} (256 bytes and"
                f" {len(SPECIAL_TOKENS)} special tokens); try --vocab-size 4096"
            )
        split = pre_tokenizers.Split(tokenizers.Regex(files.PATTERN), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        learner = tokenizers.Tokenizer(tokenizers.models.BPE())
        learner.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            min_frequency=2,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=sys.stderr.isatty(),
        )
        learner.train_from_iterator(map(_valid, texts), trainer)
        learned = json.loads(learner.to_str())["model"]["merges"]
        merges = [(files.to_bytes(a), files.to_bytes(b)) for a, b in learned]
        tokens = list(dict.fromkeys([bytes([b]) for b in range(256)] + [a + b for a, b in merges]))
        found = len(tokens) + len(SPECIAL_TOKENS)
        if found < vocab_size:
            raise UserError(
                f"the text yields {len(tokens) - 256} merges (pairs that occur twice), but a vocabulary of {vocab_size}"
                f" tokens needs {vocab_size - MIN_VOCAB_SIZE}; train on more text or try --vocab-size {found}",
                "too-few-merges",
                merges=len(tokens) - 256,
                needed=vocab_size - MIN_VOCAB_SIZE,
                possible=found,
            )
        bpe = files.BPE(files.PATTERN, {token: i for i, token in enumerate(tokens)}, merges, {})
        files.check_reachable(bpe, "the trained tokenizer")
        return cls(bpe)

    @classmethod
    def load(cls, path: Path | str, checked: bool = False) -> "Tokenizer":
        """Read a folder or file (tokenizer.json, or vocab.json + merges.txt). checked: it is a run's copy. Raises
        UserError, see `tokenizer_files.read_tokenizer`.
        """
        return cls(files.read_tokenizer(Path(path), checked))

    def save(self, folder: Path | str) -> Path:
        """Write `folder`/tokenizer.json, whole or not at all, and return its path."""
        return files.write_tokenizer(self._bpe, Path(folder))

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text; no bos is added."""
        return self.encode_arrays([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str], threads: int = 2) -> list[list[int]]:
        """`encode` of each text, on several threads."""
        return [ids.tolist() for ids in self.encode_arrays(texts, threads)]

    def encode_arrays(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """`encode` of each text as int32 arrays, which is quicker to slice and copy than lists."""
        if threads <= 1 or len(texts) <= 1:
            return [self._encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:  # tiktoken lets go of the interpreter lock
            return list(pool.map(self._encode, texts))

    def _encode(self, text: str) -> np.ndarray:
        parts = _parts(_valid(text))
        arrays = [self._encoding.encode_to_numpy(part, disallowed_special=()) for part in parts]
        ids = (arrays[0] if len(arrays) == 1 else np.concatenate(arrays)).astype(np.int32)
        return ids if self._id_of_rank is None else self._id_table[ids]

    @cached_property
    def _id_table(self) -> np.ndarray:
        return np.array(self._id_of_rank, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens as their names, bytes that are not UTF-8 as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`: exact, also where an id stands for a part of a character."""
        return b"".join([self._bytes[i] for i in ids])

    def name(self, i: int) -> str:
        """A unique name: a token's text or a special token's name; where that is no whole text, or another's name, its
        bytes as bytes:\\xe2.
        """
        data = self._bytes[i]
        text = data.decode("utf-8", errors="ignore")
        plain = text and text.encode() == data and not text.startswith("bytes:") and self.specials.get(text, i) == i
        return text if plain else "bytes:" + ("".join(f"\\x{byte:02x}" for byte in data) or f"none for id {i}")

    def special(self, name: str) -> int:
        """The id of a special token. Raises KeyError for a name that is not one."""
        return self.specials[name]

    def token_bytes(self) -> np.ndarray:
        """(V,) int32: how many bytes of text each id stands for; 0 for special tokens."""
        lengths = np.array([len(token) for token in self._bytes], dtype=np.int32)
        lengths[list(self.specials.values())] = 0
        return lengths

    @cached_property
    def hash(self) -> str:
        """sha256 of pattern, vocabulary, merges and special tokens; independent of the file they came from."""
        pattern, vocab, merges, specials = self._bpe
        content = [
            pattern,
            sorted((i, token.hex()) for token, i in vocab.items()),
            [(a.hex(), b.hex()) for a, b in merges],
            sorted((i, name) for name, i in specials.items()),
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _valid(text: str) -> str:
    """`text` with half surrogate pairs (possible in JSON, impossible in UTF-8) replaced by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parts(text: str) -> list[str]:
    """`text`, cut inside runs of blanks that are too long for the regex engine."""
    if len(text) <= MAX_BLANKS:
        return [text]
    cuts = [c for run in _BLANKS.finditer(text) for c in range(run.start() + MAX_BLANKS, run.end(), MAX_BLANKS)]
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]

"""Tokenizer files: byte-level BPE to and from tokenizer.json (Hugging Face), and from vocab.json + merges.txt (GPT-2).

Two programs read these files and must give the same ids: `tokenizers`, which merges the listed pairs in the order of
the list, and `tiktoken`, which merges whichever neighbours spell the token of lowest rank, listed as a pair or not.
They agree on every text if each token, spelled out in bytes, is merged back into that one token by the list:

  Merging in list order, what happens between two token borders never depends on what lies outside them. So wherever
  neighbours a, b spell a token w, they came about as they do when w is encoded alone. There the list reaches w itself
  at its own turn; hence a, b is the listed pair of w and its turn has not passed. The neighbours of lowest rank are
  therefore always the next listed pair, and both programs take the same step.

`read` checks this for every token it loads, and refuses a file that fails: a proof costs 0.1 s where a comparison on
samples would prove nothing. Patterns other than the two below must cut all kinds of characters alike
(`_check_pattern`)."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import tokenizers
from tokenizers import pre_tokenizers

from nanolab.cli import UserError
from nanolab.data.kinds import check_pointer
from nanolab.data.tokenizer_checks import first_difference, probe_texts
from nanolab.files import write_text

# Text is cut into pieces by the first alternative that matches; tokens never span pieces. In order: English
# contractions; a run of letters with at most one other character before it (a space, a bracket); digits in groups of at
# most two, which measured better at 32k tokens than one or three; punctuation with a space before and line ends after;
# white space up to and with its last line end; white space except the last blank, which goes with the next word; any
# other white space.
PATTERN = "|".join(
    [
        r"'(?i:s|d|m|t|ll|ve|re)",
        r"[^\r\n\p{L}\p{N}]?+\p{L}+",
        r"\p{N}{1,2}",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*",
        r"\s*[\r\n]",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# GPT-2's pattern: https://github.com/openai/gpt-2/blob/master/src/encoder.py; ByteLevel(use_regex) in `tokenizers`.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class BPE(NamedTuple):
    """What a tokenizer file says. `vocab` and `merges` hold raw bytes; `specials` are texts that only code can
    insert.
    """

    pattern: str
    vocab: dict[bytes, int]
    merges: list[tuple[bytes, bytes]]
    specials: dict[str, int]


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself where printable in Latin-1, else the next one from U+0100
    on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


CHAR_OF_BYTE = _byte_alphabet()
BYTE_OF_CHAR = {c: b for b, c in CHAR_OF_BYTE.items()}


def to_chars(token: bytes) -> str:
    return "".join(CHAR_OF_BYTE[b] for b in token)


def to_bytes(token: str) -> bytes:
    """Raises KeyError for a character that stands for no byte."""
    return bytes(BYTE_OF_CHAR[c] for c in token)


def tokenizer_json(bpe: BPE) -> dict[str, Any]:
    """tokenizer.json as `tokenizers` reads it. Its `encode_special_tokens` must be set for text to stay text there too.

    Special tokens are in the vocabulary as well: one that is only added gets the number of tokens before it as its id
    there, not the id in the file. Raises UserError for a special token that is written like an ordinary one, whose id
    it would get."""
    vocab = {to_chars(t): i for t, i in bpe.vocab.items()}
    if shared := [s for s in bpe.specials if s in vocab]:
        raise UserError(
            f"the special token {shared[0]!r} ({bpe.specials[shared[0]]}) is written like the ordinary token"
            f" {vocab[shared[0]]}, so `tokenizers` would take one for the other; expected special tokens that no text"
            " is; pass another --tokenizer or train one with scripts.tok_train",
            "special-token-is-ordinary",
            token=shared[0],
        )
    added = [
        {
            "id": i,
            "content": s,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for s, i in sorted(bpe.specials.items(), key=lambda item: item[1])
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": bpe.pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted((vocab | bpe.specials).items(), key=lambda item: item[1])),
            "merges": [[to_chars(a), to_chars(b)] for a, b in bpe.merges],
        },
    }


def write_tokenizer(bpe: BPE, folder: Path) -> Path:
    """Write `folder`/tokenizer.json, whole or not at all."""
    path = folder / "tokenizer.json"
    write_text(path, json.dumps(tokenizer_json(bpe), ensure_ascii=False, indent=1))
    return path


def read_tokenizer(path: Path, checked: bool = False) -> BPE:
    """Read a folder or file: tokenizer.json, or vocab.json beside merges.txt.

    checked: it is a run's copy, which was checked when it was made; its pattern and its special ids are taken as they
    are.

    Raises UserError for a file that is missing, damaged, not byte-level BPE, or not certain to give the ids that
    `tokenizers` gives.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        path = folder / "tokenizer.json" if (folder / "tokenizer.json").exists() else folder / "vocab.json"
    if not path.exists():
        raise UserError(
            f"no tokenizer in {folder}; expected tokenizer.json, or vocab.json and merges.txt; "
            f"train one with: python -m scripts.tok_train --tokenizer {folder}"
        )
    raw = _load_json(path)
    if isinstance(raw.get("model"), dict):  # a vocabulary may have a token "model"
        bpe = _from_tokenizer_json(raw, path)
    elif (folder / "merges.txt").exists():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for i, line in enumerate(lines) if line.strip() and not (i == 0 and line.startswith("#version"))]
        bpe = _build(GPT2_PATTERN, raw, merges, {}, path)
    else:
        raise UserError(
            f"{path} is a plain vocabulary; expected merges.txt beside it, or a tokenizer.json; pass --tokenizer FOLDER"
        )
    check_reachable(bpe, path)
    if not checked:
        _check_pattern(bpe.pattern, path)
        _note_other_ids(bpe, raw, path)
    return bpe


def _load_json(path: Path) -> dict[str, Any]:
    check_pointer(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError; brackets nested too deep
        raise UserError(
            f"{path} is not JSON ({error}); expected a tokenizer.json; write it again or pass another --tokenizer"
        ) from None
    if not isinstance(raw, dict):
        raise UserError(
            f"{path} holds a JSON {type(raw).__name__}; expected the object of a tokenizer.json or vocab.json"
        )
    return raw


def _refuse(path: Path | str, seen: str, code: str = "", **values: Any) -> UserError:
    return UserError(
        f"{path} {seen}; expected plain byte-level BPE, as GPT-2's; pass another --tokenizer or train one with"
        " scripts.tok_train",
        code,
        **values,
    )


def _from_tokenizer_json(raw: dict[str, Any], path: Path) -> BPE:
    model = raw["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise _refuse(path, f"holds a {model.get('type')} model")
    if raw.get("normalizer"):
        raise _refuse(path, f"changes the text first (normalizer {raw['normalizer'].get('type')})")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise _refuse(path, f"sets {option} = {model[option]!r}")
    plain = [t["content"] for t in raw.get("added_tokens") or [] if not t["special"]]
    if plain:
        raise _refuse(
            path,
            f"cuts text at added tokens that are not special ({', '.join(map(repr, plain[:3]))})",
            "added-tokens",
            tokens=plain,
        )
    specials = {t["content"]: t["id"] for t in raw.get("added_tokens") or []}
    bpe = _build(_pattern(raw.get("pre_tokenizer"), path), model["vocab"], model["merges"], specials, path)
    orphans = [s for s in bpe.specials if s not in specials]
    if model.get("ignore_merges") and orphans:
        raise _refuse(path, f"has {len(orphans)} whole-word tokens that no merge makes (first {orphans[0]!r})")
    return bpe


def _pattern(pre: dict[str, Any] | None, path: Path) -> str:
    """The regular expression that a pre-tokenizer cuts by: ByteLevel's own (GPT-2's), or one Split before ByteLevel."""
    steps = [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    names = [step["type"] for step in steps]
    if names not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise _refuse(path, f"has pre-tokenizer {' + '.join(names) or 'none'}, not ByteLevel or Split + ByteLevel")
    split, level = (None if len(steps) == 1 else steps[0]), steps[-1]
    if level.get("add_prefix_space"):
        raise _refuse(path, "puts a space before the text (add_prefix_space)")
    if level.get("use_regex", True) != (split is None):
        raise _refuse(path, "cuts text twice or not at all (use_regex of ByteLevel)")
    if split is None:
        return GPT2_PATTERN
    if (split["behavior"], split["invert"]) not in (("Isolated", False), ("Removed", True)) or "Regex" not in split[
        "pattern"
    ]:
        raise _refuse(
            path, f"has a Split that does more than cut (behavior {split['behavior']}, pattern {split['pattern']})"
        )
    return split["pattern"]["Regex"]


def _build(pattern: str, vocab: dict[str, int], merges: list[Any], specials: dict[str, int], path: Path) -> BPE:
    """Raw bytes for characters; pairs that are never met dropped; tokens that no pair makes become special."""
    try:
        pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
        byte_pairs = [(to_bytes(a), to_bytes(b)) for a, b in pairs]
    except (KeyError, ValueError) as error:
        raise _refuse(path, f"lists a merge that is not of two byte-level tokens ({error})") from None
    missing = [b for b, c in CHAR_OF_BYTE.items() if c not in vocab]
    if missing:
        raise _refuse(path, f"has no token for {len(missing)} of the 256 bytes (first {missing[0]:#04x})")
    if len(set(pairs)) != len(pairs):
        raise _refuse(path, "lists a merge twice")
    made = {bytes([b]): b for b in range(256)}  # token -> its turn
    kept, last = [], b""
    for a, b in byte_pairs:
        token = a + b
        if to_chars(token) not in vocab:
            raise _refuse(path, f"merges {to_chars(a)!r} and {to_chars(b)!r} to a token that is not in the vocabulary")
        # A pair made of later tokens, or listed after its token's turn, is never met if every token reaches itself: the
        # neighbours a, b would be what their token is made of when encoded alone, and that is the pair kept here.
        if a in made and b in made and (token not in made or token == last):
            made.setdefault(token, len(made))
            kept.append((a, b))
            last = token
    chars = {to_chars(token): token for token in made}
    ordinary = {chars[s]: i for s, i in vocab.items() if s in chars}
    specials = {s: i for s, i in vocab.items() if s not in chars} | specials
    ids = [*ordinary.values(), *specials.values()]
    if len(set(ids)) != len(ids):
        raise _refuse(path, "gives two tokens the same id")
    return BPE(pattern, ordinary, kept, specials)


def encoding(bpe: BPE) -> tuple[tiktoken.Encoding, list[int] | None]:
    """The tiktoken encoder of `bpe`, and the id of each rank it returns (None where ranks are the ids)."""
    merged = list(dict.fromkeys(a + b for a, b in bpe.merges))
    ids = [bpe.vocab[token] for token in merged]
    if all(i < j for i, j in zip(ids, ids[1:])):
        ranks, id_of_rank = bpe.vocab, None
    else:
        tokens = [bytes([b]) for b in range(256)] + merged
        ranks, id_of_rank = {token: rank for rank, token in enumerate(tokens)}, [bpe.vocab[token] for token in tokens]
    # tiktoken is slow without any special token; this one is never allowed
    never = {"<|bos|>": max(ranks.values()) + 1}
    return tiktoken.Encoding("nanolab", pat_str=bpe.pattern, mergeable_ranks=ranks, special_tokens=never), id_of_rank


def check_reachable(bpe: BPE, path: Path | str) -> None:
    """Each token's own bytes must be merged back to that token (see the head of this file for what follows from it)."""
    vocab = {to_chars(token): i for token, i in bpe.vocab.items()}
    model = tokenizers.models.BPE(vocab=vocab, merges=[(to_chars(a), to_chars(b)) for a, b in bpe.merges])
    lost = [s for s, i in vocab.items() if [t.id for t in model.tokenize(s)] != [i]]
    if lost:
        raise _refuse(
            path,
            f"has {len(lost)} tokens that its own merges do not reach (first {lost[0]!r}), so two encoders could"
            " differ",
        )


def _check_pattern(pattern: str, path: Path) -> None:
    """tiktoken and `tokenizers` use different regex engines: a pattern that the tests do not know must cut all probes
    alike in both.
    """
    if pattern in (PATTERN, GPT2_PATTERN):  # compared on every code point in the tests
        return
    try:
        tiktoken.Encoding(
            "pattern", pat_str=pattern, mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={}
        )
    except ValueError as error:
        raise _refuse(path, f"cuts text by a pattern that tiktoken does not know ({error})") from None
    try:
        theirs = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    except Exception as error:  # tokenizers has no class of its own for it
        raise _refuse(path, f"cuts text by a pattern that `tokenizers` does not know ({error})") from None
    cut = lambda text: [piece.encode() for piece, _ in theirs.pre_tokenize_str(text)]  # noqa: E731
    texts = probe_texts()
    parts = (texts[i : i + 500] for i in range(0, len(texts), 500))  # the runs, first, tell most patterns apart
    differences = (first_difference(pattern, [cut(text) for text in part]) for part in parts)
    if (at := next((found for found in differences if found is not None), None)) is not None:
        seen = b"|".join(at).decode(errors="replace")
        why = (
            " (X{1,3}+ repeats X{1,3} in `tokenizers` and is possessive in tiktoken, whose cl100k_base has it)"
            if re.search(r"\{\d*,?\d*\}\+", pattern)
            else ""
        )
        raise _refuse(
            path,
            f"cuts text by a pattern that loses text or is read differently by tiktoken, near {seen!r} as `tokenizers`"
            f" cuts it{why}",
            "pattern-differs",
            pattern=pattern,
        )


def _note_other_ids(bpe: BPE, raw: dict[str, Any], path: Path) -> None:
    """Say it where `tokenizers` gives special tokens of this file other ids than the file does: the file's are used."""
    vocab = raw["model"]["vocab"] if isinstance(raw.get("model"), dict) else raw
    if all(vocab.get(s) == i for s, i in bpe.specials.items()):
        return
    try:
        theirs = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers has no class of its own for it
        raise _refuse(path, f"cannot be read by `tokenizers` ({error})") from None
    if other := [s for s, i in bpe.specials.items() if theirs.token_to_id(s) != i]:
        from nanolab.runtime import print0

        s = other[0]
        print0(
            f"note: {len(other)} special tokens of {path} have other ids in `tokenizers` (first {s!r}:"
            f" {bpe.specials[s]} in the file, {theirs.token_to_id(s)} there); the file's are used"
        )

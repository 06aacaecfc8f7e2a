"""Whether a tokenizer's pattern cuts text as its file says, and whether each of its tokens can come about."""

import unicodedata
from itertools import groupby

import tiktoken


def first_difference(pattern: str, cut: list[list[bytes]]) -> list[bytes] | None:
    """Of texts cut by `tokenizers`, the first pieces that tiktoken cuts otherwise; None: there are none.

    tiktoken tells its cuts by its tokens alone: a piece that is a token becomes that token, any other is merged from
    bytes. Without a token of two bytes nothing is merged, so each longer token found is a piece. If every part of the
    text between those is a token too, what tiktoken cuts there has at most two bytes; and given that, a second
    vocabulary, with all pairs, tells single bytes from pairs."""
    long = {piece for pieces in cut for piece in pieces if len(piece) > 2}
    between = {
        b"".join(run) for pieces in cut for is_long, run in groupby(pieces, lambda piece: len(piece) > 2) if not is_long
    }
    parts = {run[i:j] for run in between for i in range(len(run)) for j in range(i + 3, len(run) + 1)}
    pairs = {run[i : i + 2] for run in between for i in range(len(run) - 1)}
    bytewise = [
        [part for piece in pieces for part in ([piece] if len(piece) > 2 else [bytes([b]) for b in piece])]
        for pieces in cut
    ]
    texts = [b"".join(pieces).decode() for pieces in cut]
    for tokens, expected in ((long | parts, bytewise), (long | pairs, cut)):
        vocab = [*(bytes([b]) for b in range(256)), *(tokens - {b""})]
        ours = tiktoken.Encoding(
            "cuts",
            pat_str=pattern,
            mergeable_ranks={token: i for i, token in enumerate(vocab)},
            special_tokens={"<|bos|>": len(vocab)},
        )
        for text, pieces in zip(texts, expected):
            found = [vocab[i] for i in ours.encode_ordinary(text)]
            if found != pieces:
                at = next((i for i, (a, b) in enumerate(zip(found, pieces)) if a != b), min(len(found), len(pieces)))
                return pieces[max(0, at - 1) : at + 8]
    return None


def probe_texts(every: int = 16) -> list[str]:
    """Text with characters of every category in contexts that patterns look at; one in `every` of the many letters; and
    runs.
    """
    chars = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Co", "Cs", "Lo")]
    chars += [c for c in map(chr, range(0, 0x110000, every)) if unicodedata.category(c) == "Lo"]
    block = 16  # short texts, for the number of their parts
    blocks = [chars[i : i + block] for i in range(0, len(chars), block)]
    contexts = ("a{0}b{0}{0}1", "12{0}345 {0} ", "'{0}s I'LL{0}", "!{0}?\n{0}\r\n\n", "  {0}\t \n  {0}   x")
    runs = [
        (unit * 30)[:n]
        for unit in ("1234567890", "\u0663\u0664", "\u00bd", "aB", "\u00e9", "!", " ", "\n", "\t ")
        for n in range(1, 31)
    ]
    return [
        *runs,
        *(f"in {run} a{run}b" for run in runs),
        *("".join(context.format(c) for c in part) for part in blocks for context in contexts),
    ]

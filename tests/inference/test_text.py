"""TextStream against decoding all ids at once."""

import random

import pytest

from nanolab.data.tokenizer import Tokenizer
from nanolab.inference.text import TextStream

SAMPLE = "naïve café: 漢字かな 🙂🙃 — done\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    # so that é, 漢 and 🙂 are spread over tokens
    return Tokenizer.train(["plain words and plain words only " * 20], 275)


def test_pieces_join_to_the_text_and_no_piece_holds_half_a_character(tokenizer):
    ids = tokenizer.encode(SAMPLE)
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == SAMPLE and stream.flush() == ""
    assert "" in pieces  # some token did not complete a character
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_appears_with_its_last_byte_not_later(tokenizer):
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in tokenizer.encode("🙂")] == ["", "", "", "🙂"]


def test_any_bytes_give_what_decoding_at_once_gives(tokenizer):
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(256) for _ in range(12)]
        stream = TextStream(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_special_tokens_print_as_nothing(tokenizer):
    ids = tokenizer.encode("plain é words")
    noisy = [tokenizer.bos] + [x for i in ids for x in (i, tokenizer.special("<|assistant_end|>"))]
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, noisy)) == "plain é words"


def test_a_text_cut_inside_a_character_says_so_at_the_end(tokenizer):
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, tokenizer.encode("ab🙂")[:-1])) == "ab"
    assert stream.flush() == "\ufffd"


def until(text: str, stop: list[str]) -> str:
    """By definition: read on character by character; the first stop string that is complete cuts the text before
    itself.
    """
    for end in range(len(text) + 1):
        found = [len(s) for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(found)]
    return text


def test_the_text_ends_before_the_first_stop_string_and_shows_no_part_of_it(tokenizer):
    rng = random.Random(2)
    for _ in range(300):
        text = "".join(rng.choice("ab é") for _ in range(14))
        stop = ["".join(rng.choice("ab é") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        stream, shown, expected = TextStream(tokenizer, stop), "", until(text, stop)
        for i in tokenizer.encode(text):
            shown += stream.push(i)
            assert expected.startswith(shown)
        assert shown + stream.flush() == expected
        assert stream.stopped == (expected != text)


def test_only_what_may_become_a_stop_string_is_held_back(tokenizer):
    stream = TextStream(tokenizer, ["abc", "\n\n"])
    assert [stream.push(i) for i in tokenizer.encode("xab")] == ["x", "", ""]
    assert [stream.push(i) for i in tokenizer.encode("ab\nd")] == ["ab", "", "ab", "\nd"]
    assert not any(stream.push(i) for i in tokenizer.encode("\n\nmore")) and stream.stopped and stream.flush() == ""

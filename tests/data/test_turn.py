"""TurnParser token by token against decoding all ids at once, and against the definition of a stop string."""

import random

import pytest

from nanolab.data.tokenizer import Tokenizer
from nanolab.data.turn import TurnParser


class Text(TurnParser):
    """Text without marks; `push` and `end` give what is new of it."""

    def __init__(self, tokenizer: Tokenizer, stop=()):
        super().__init__(tokenizer, stop, marks=False)

    def push(self, token: int) -> str:
        return "".join(event.text for event in super().push(token))

    def flush(self) -> str:
        return "".join(event.text for event in self.end())


SAMPLE = "naïve café: 漢字かな 🙂🙃 — done\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    # so that é, 漢 and 🙂 are spread over tokens
    return Tokenizer.train(["plain words and plain words only " * 20], 275)


def test_pieces_join_to_the_text_and_no_piece_holds_half_a_character(tokenizer):
    ids = tokenizer.encode(SAMPLE)
    stream = Text(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == SAMPLE and stream.flush() == ""
    assert "" in pieces  # some token did not complete a character
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_appears_with_its_last_byte_not_later(tokenizer):
    stream = Text(tokenizer)
    assert [stream.push(i) for i in tokenizer.encode("🙂")] == ["", "", "", "🙂"]


def test_any_bytes_give_what_decoding_at_once_gives(tokenizer):
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(256) for _ in range(12)]
        stream = Text(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_special_tokens_print_as_nothing(tokenizer):
    ids = tokenizer.encode("plain é words")
    noisy = [tokenizer.bos] + [x for i in ids for x in (i, tokenizer.special("<|assistant_end|>"))]
    stream = Text(tokenizer)
    assert "".join(map(stream.push, noisy)) == "plain é words"


def test_a_text_cut_inside_a_character_says_so_at_the_end(tokenizer):
    stream = Text(tokenizer)
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
        stream, shown, expected = Text(tokenizer, stop), "", until(text, stop)
        for i in tokenizer.encode(text):
            shown += stream.push(i)
            assert expected.startswith(shown)
        assert shown + stream.flush() == expected
        assert stream.stopped == (expected != text)


def test_only_what_may_become_a_stop_string_is_held_back(tokenizer):
    stream = Text(tokenizer, ["abc", "\n\n"])
    assert [stream.push(i) for i in tokenizer.encode("xab")] == ["x", "", ""]
    assert [stream.push(i) for i in tokenizer.encode("ab\nd")] == ["ab", "", "ab", "\nd"]
    assert not any(stream.push(i) for i in tokenizer.encode("\n\nmore")) and stream.stopped and stream.flush() == ""


def test_the_last_event_of_a_part_has_all_of_it(tokenizer):
    special = lambda name: tokenizer.special(f"<|{name}|>")  # noqa: E731
    start, end, output, over = map(special, ("python_start", "python_end", "output_start", "output_end"))
    ids = [*tokenizer.encode("é "), start, *tokenizer.encode("1+1"), end, output, *tokenizer.encode("2"), over]
    parser = TurnParser(tokenizer)
    events = [event for i in (*ids, *tokenizer.encode("so 🙂")[:-1]) for event in parser.push(i)]
    events += parser.end(whole=False)
    ended = [(event.kind, event.part, event.cut) for event in events if event.part is not None]
    assert ended == [
        ("text", "é ", False),
        ("python", "1+1", False),
        ("text", "", False),  # between a call and its output
        ("python_output", "2", False),
        ("text", "so ", True),  # the character that was not whole is cut too
    ]
    shown: dict[int, str] = {}
    part = 0
    for event in events:
        shown[part] = shown.get(part, "") + event.text
        part += event.part is not None
    assert list(shown.values()) == [part for _, part, _ in ended]
    assert [event for event in events if event.kind == "python"][0] == ("python", "", None, False)  # it begins


def test_stop_strings_are_looked_for_in_the_text_alone(tokenizer):
    start, end = (tokenizer.special(f"<|python_{name}|>") for name in ("start", "end"))
    parser = TurnParser(tokenizer, ["ab"])
    for i in (*tokenizer.encode("a"), start, *tokenizer.encode("ab"), end, *tokenizer.encode("b")):
        parser.push(i)
    assert not parser.stopped and (parser.kind, parser.text) == ("text", "b")
    for i in tokenizer.encode("ab"):
        parser.push(i)
    assert parser.stopped and parser.end()[0].part == "b"


def test_a_token_knows_where_in_the_text_it_begins(tokenizer):
    start, end = (tokenizer.special(f"<|python_{name}|>") for name in ("start", "end"))
    ids = [*tokenizer.encode("é"), start, *tokenizer.encode("1"), end, *tokenizer.encode("ab"), tokenizer.bos]
    offsets = {}
    for marks in (True, False):
        parser = TurnParser(tokenizer, ["bc"], marks)
        offsets[marks] = [(parser.push(i), parser.offset)[1] for i in ids]
    assert offsets[True] == [0, 0, -1, -1, -1, 1, 2, -1]
    assert offsets[False] == [0, 0, 1, 1, 2, 2, 3, 4]  # of text that is only continued every token is a part

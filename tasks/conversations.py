"""Conversations from a JSONL file: jsonl=FILE. Arrays of messages, ShareGPT's and OpenAI's formats are recognised.

The split test holds one conversation for every TWENTY lines of the file, MOST at most, and at least one where two
differ; train holds the others; all is both. Lines that are added at the end move nothing out of test, so what was held
out once is never trained on. The rule:

    The lines are read in order. At the first line that differs from the one before, and from then on at each line whose
    number is a multiple of TWENTY, test takes from the lines so far the conversation that comes first
      - of an opening (the first message of a user) that test has already, where it is not shared by more than test may
      hold by then;
      - else by the hash of its opening, or of the whole conversation where more than test may hold by then share the
      opening.

Equal conversations are one: test takes them where all of them fit, and those that are added later and do not fit are in
no split. So an opening is on both sides only where many share it, or while its last conversations wait for their place.
No rule without the order of the lines could do the same: with one held out of any two, and nothing moved back, all
conversations but one would end in test. In a file of more than TWENTY * MOST lines test comes from the first of them:
one whose lines are sorted has to be shuffled."""

from collections import Counter
from collections.abc import Sequence

from nanolab.cli import UserError
from nanolab.data.chat import Message, parts_of
from nanolab.data.chat_files import read_conversations
from tasks.common import Example, Task, share

TWENTY, MOST = 20, 200
FORMER_SHARE = 0.05  # of openings, in version 1


class ConversationFile(Task):
    version = 2
    former = (1,)
    splits = ("train", "test", "all")
    argument_is = "FILE.jsonl"

    def open(self) -> Sequence[Example]:
        unread: Counter[str] = Counter()
        chats = read_conversations(self.argument, unread)
        test, copies = hold_out_chats(chats) if self.version > 1 else (former_hold_out(chats), set())
        if self.split != "all":
            keep = test if self.split == "test" else {*range(len(chats))} - test - copies
            if not keep or not test:
                seen = (
                    f"{self.argument} holds a single {'conversation' if self.version > 1 else 'opening question'}, so"
                    f" that {self.split} is empty"
                )
                raise UserError(
                    f"{seen}; expected at least 2 that differ; add conversations or use the split all",
                    "too-few-conversations",
                    file=self.argument,
                    split=self.split,
                )
            self.notes = [f"jsonl={self.argument}: {said_of(len(test), len(copies), len(chats))}"]
            if self.version == 1:
                self.notes[0] += ", by the rule of the version that began the run"
            chats = [chats[i] for i in sorted(keep)]
        if unread:
            self.notes += [
                f"jsonl={self.argument}: fields beside the messages that are not read:"
                f" {', '.join(f'{name} ({n:,})' for name, n in unread.items())}"
            ]
        return self.shuffled(len(chats), lambda i: Example(chats[i]))


def said_of(held_out: int, copies: int, n: int) -> str:
    late = f", all among the first {TWENTY * MOST:,}" if n > TWENTY * MOST else ""
    return f"{held_out:,} of {n:,} conversations held out{late}" + (
        f"; {copies:,} copies of them left out" if copies else ""
    )


def most(n: int) -> int:
    """Conversations that test may hold of n lines."""
    return max(1, min(n // TWENTY, MOST))


def hold_out_chats(chats: Sequence[list[Message]]) -> tuple[set[int], set[int]]:
    """(lines of the split test, lines in no split): the rule above."""
    texts = [said_in_all(chat) for chat in chats]
    opening_of = {text: opening(chat) for text, chat in zip(texts, chats[: TWENTY * MOST])}
    hashes = {text: share("jsonl", text) for text in {*opening_of, *opening_of.values()}}
    copies: Counter[str] = Counter()  # of each text in the lines so far, of those that are not in test
    sharing: Counter[str] = Counter()  # lines so far with each opening
    held: Counter[str] = Counter()  # copies of each text in test
    asked: set[str] = set()  # openings of what is in test
    for n, text in enumerate(texts[: TWENTY * MOST], 1):
        (held if text in held else copies)[text] += 1
        sharing[opening_of[text]] += 1
        if n % TWENTY if held else len(copies) < 2:
            continue
        bound = most(n)

        def order(text: str) -> tuple[bool, float, float]:
            first = opening_of[text]
            together = sharing[first] <= bound
            return not (together and first in asked), hashes[first if together else text], hashes[text]

        while (room := bound - held.total()) > 0 and (
            fitting := [text for text, n in copies.items() if n <= room] or ([] if held else [*copies])
        ):
            found = min(fitting, key=order)
            held[found] = copies.pop(found)
            asked.add(opening_of[found])
    lines = {text: i for i, text in reversed([*enumerate(texts)]) if text in held}
    test = set(lines.values())
    more = [i for i, text in enumerate(texts) if text in held and i not in test]
    fitting = most(len(chats)) - len(test)
    return test | set(more[:fitting]), set(more[fitting:])


def former_hold_out(chats: Sequence[list[Message]]) -> set[int]:
    """The split test of version 1: of the openings those whose hash is small, however many share them."""
    hashes = [share("jsonl", opening(chat)) for chat in chats]
    bound = max(FORMER_SHARE, min(hashes))  # at least one for the test
    return {i for i, h in enumerate(hashes) if h <= bound}


def opening(messages: list[Message]) -> str:
    """The first thing that the user says, in lower case and without blanks at its ends."""
    return next(m["content"] for m in messages if m["role"] == "user").strip().lower()


def said_in_all(messages: list[Message]) -> str:
    """All that is said, by which conversations are equal."""
    return repr(
        [
            (m["role"], [(part["type"], part["text"].strip().lower()) for part in parts_of(m["content"])])
            for m in messages
        ]
    )

"""Conversations from a JSONL file: jsonl=FILE. Arrays of messages, ShareGPT's and OpenAI's formats are recognised.

A conversation belongs to the split test if the hash of its first user message says so (one in twenty): the same question is
never in both splits, and a file that grows keeps its split. The split all is both.
"""

from typing import Sequence

from nanolab.config import UserError
from nanolab.data.chat import Message, read_conversations
from tasks.common import Example, Task, share

TEST_SHARE = 0.05


class Conversations(Task):
    splits = ("train", "test", "all")
    argument_is = "FILE.jsonl"

    def open(self) -> Sequence[Example]:
        chats = read_conversations(self.argument)
        if self.split != "all":
            hashes = [share("jsonl", opening(chat)) for chat in chats]
            bound = max(TEST_SHARE, min(hashes))  # at least one for the test
            chats = [chat for chat, h in zip(chats, hashes) if (h <= bound) == (self.split == "test")]
        if not chats:
            seen = f"{self.argument} holds a single opening question, which is in the split test, so that {self.split} is empty"
            raise UserError(f"{seen}; expected at least 2 that differ; add conversations or use the split all")
        return self.shuffled(len(chats), lambda i: Example(chats[i]))


def opening(messages: list[Message]) -> str:
    """The first thing that the user says, in lower case and without blanks at its ends."""
    return next(m["content"] for m in messages if m["role"] == "user").strip().lower()

"""SmolTalk, the selection for small models: everyday chat, some of it with a system message.
https://arxiv.org/abs/2502.02737
"""

from collections.abc import Sequence

from nanolab.data.chat_files import read_conversations
from tasks.common import Dataset, Example, RowReader, Task, hub_rows, local_path

SOURCE = Dataset(
    {"train": "smoltalk/train.jsonl", "test": "smoltalk/test.jsonl"},
    "HuggingFaceTB/smol-smoltalk",
    "",
    "",
    {"train": "train", "test": "test"},
)


class SmolTalk(Task):
    def open(self) -> Sequence[Example]:
        if self.data:
            chats = read_conversations(local_path(self, SOURCE))
            return self.shuffled(len(chats), lambda i: Example(chats[i]))
        table = hub_rows(self, SOURCE)
        return self.shuffled(
            len(table), lambda i: self.read(RowReader(table[i], f"{SOURCE.repo} {self.split} row {i}"))
        )

    def read(self, row: RowReader) -> Example:
        return Example([{"role": m["role"], "content": m["content"]} for m in row.get("messages", list)])

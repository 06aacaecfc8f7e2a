"""Lines that JSON allows and Python does not read, too long ones, in every reader: the error names file and line.
Oracle: where the line was put.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nanolab.cli import UserError, read_toml
from nanolab.data import chat_files
from nanolab.data.chat_files import read_conversations, read_jsonl
from nanolab.data.formats import index_file
from nanolab.data.synthesis import Collection, Spec
from nanolab.data.tokenizer import Tokenizer
from nanolab.evals.bundle import read_rows

UNREADABLE = {
    "digits": "1" * 5000,
    "lists": "[" * 100_000 + "]" * 100_000,
    "objects": '{"a": ' * 100_000 + "1" + "}" * 100_000,
}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
READERS: dict[str, tuple[dict, Callable]] = {  # a good line; the reader
    "corpus": ({"text": "some words"}, index_file),
    "conversations": ({"messages": CHAT}, read_conversations),
    "rows of a dataset": ({"question": "?"}, lambda path: list(read_jsonl(path))),
    "bundle": ({"query": "?"}, read_rows),
}


@pytest.mark.fault("outer D8")
@pytest.mark.parametrize("what", list(UNREADABLE))
@pytest.mark.parametrize("reader", list(READERS))
def test_a_line_that_python_cannot_read_is_named(tmp_path, reader, what):
    good, read = READERS[reader]
    line = json.dumps(good)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([line, "", f'{line[:-1]}, "n": {UNREADABLE[what]}}}', line]) + "\n")
    with pytest.raises(UserError) as error:
        read(path)
    assert (error.value.code, error.value.values["file"], error.value.values["line"]) == ("not-json", str(path), 3)
    assert f"{path}:3" in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.fault("outer D8")
@pytest.mark.parametrize("what", list(UNREADABLE))
def test_other_files_that_python_cannot_read_are_named(tmp_path, what):
    (tmp_path / "tokenizer").mkdir()
    for path, text, read in (
        (tmp_path / "tokenizer" / "tokenizer.json", f'{{"n": {UNREADABLE[what]}}}', Tokenizer.load),
        (
            tmp_path / "stages.toml",
            f"n = {UNREADABLE[what]}" if what != "objects" else "n = " + "{a = " * 5000 + "1" + "}" * 5000,
            read_toml,
        ),
        (
            tmp_path / "chats.jsonl",
            f'{{"index": {UNREADABLE[what]}}}\n',
            lambda path: Collection(path, Spec({}, "", ""), 1),
        ),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=path.name):
            read(path)


@pytest.mark.fault("outer D21")
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_line_is_bounded_as_it_is_unpacked(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(chat_files, "MAX_LINE", 1000, raising=False)
    path: Path = tmp_path / f"a{suffix}"
    pack = gzip.compress if suffix.endswith(".gz") else bytes

    def text(n: int) -> bytes:
        return (json.dumps("x" * (n - 3)) + "\n").encode()

    path.write_bytes(pack(text(1000) * 3))
    assert len(list(read_jsonl(path))) == 3
    path.write_bytes(pack(text(1000) + text(1001)))
    with pytest.raises(UserError) as error:
        list(read_jsonl(path))
    assert (error.value.code, error.value.values["line"]) == ("line-too-long", 2)

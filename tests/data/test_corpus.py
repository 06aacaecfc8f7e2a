"""Local corpora: formats, random access, shuffling, mixtures, pinned validation, bad input."""

import hashlib
import json
import os
import random
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanolab.cli import UserError
from nanolab.data import corpus
from nanolab.data.chat_files import read_conversations
from nanolab.data.config import DataConfig
from nanolab.data.corpus import Documents, corpora_of, open_data


def words(n, seed=0, length=40):
    rng = random.Random(seed)
    return [
        f"Document {seed}.{i}: " + " ".join(rng.choice("ab cd éf gh ij 漢字 kl".split()) for _ in range(length))
        for i in range(n)
    ]


def write_parquet(path, texts, rows=100, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, **columns}), path, row_group_size=rows)
    return path


def write_jsonl(path, texts):
    path.write_text(
        "".join(json.dumps({"id": i, "text": t}, ensure_ascii=i % 2 == 0) + "\n" for i, t in enumerate(texts)), "utf-8"
    )
    return path


def write_txt(path, texts):
    path.write_text("\n<|endoftext|>\n".join(texts) + "\n", "utf-8")
    return path


def take(documents, n, start=0):
    return [documents.get(i) for i in range(start, start + n)]


@pytest.mark.parametrize("write, suffix", [(write_parquet, "parquet"), (write_jsonl, "jsonl"), (write_txt, "txt")])
def test_every_format_gives_the_texts_that_were_written(tmp_path, monkeypatch, write, suffix):
    monkeypatch.setattr("nanolab.data.blocks.BLOCK_BYTES", 9000)  # several blocks
    texts = words(457)
    documents = Documents("x", [write(tmp_path / f"a.{suffix}", texts)])
    assert documents.n_documents == 457 and len(documents.blocks) > 3
    assert list(documents.iterate()) == texts
    assert sorted(take(documents, 457)) == sorted(texts)


def test_paragraphs_of_a_plain_text_become_documents_that_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("nanolab.data.blocks.BLOCK_BYTES", 20000)
    paragraphs = [w + "\r\nsecond line\r\r with lone returns" for w in words(400)]
    path = tmp_path / "book.txt"
    path.write_bytes("\n\n".join(paragraphs).encode())
    documents = Documents("book", [path])
    found = list(documents.iterate())
    assert "\n\n".join(found) == "\n\n".join(paragraphs)
    assert all(4000 <= len(t.encode()) + 2 < 5000 for t in found[:-1])
    assert sorted(take(documents, documents.n_documents)) == sorted(found)
    path.write_text("\n".join(words(400)))  # no blank line anywhere: cut at line ends
    found = list(Documents("book", [path]).iterate())
    assert "\n".join(found) == path.read_text() and max(len(t.encode()) for t in found) < 9000


def test_mixed_folder_is_read_recursively_in_path_order(tmp_path):
    (tmp_path / "d" / "sub").mkdir(parents=True)
    write_txt(tmp_path / "d" / "b.txt", ["two", "three"])
    write_jsonl(tmp_path / "d" / "a.jsonl", ["one"])
    write_parquet(tmp_path / "d" / "sub" / "c.parquet", ["four", "", None, "five", "six " * 99])
    (tmp_path / "d" / "readme.html").write_text("no")
    (tmp_path / "d" / ".hidden.txt").write_text("no")
    val = write_txt(tmp_path / "val.txt", ["unseen"])
    data = open_data(DataConfig(data_dir=str(tmp_path / "d"), val_data=str(val)))
    assert list(data.train[0][0].iterate()) == ["one", "two", "three", "four", "five", "six " * 99]
    assert list(data.val.iterate()) == ["unseen"]
    assert take(data.train[0][0], 8).count(None) == 2  # the blank ones


def test_order_is_a_permutation_that_depends_on_seed_and_epoch(tmp_path):
    texts = words(300)
    path = write_parquet(tmp_path / "a.parquet", texts, rows=32)
    a, b, c = (Documents("x", [path], seed=s) for s in (1, 1, 2))
    first, second = take(a, 300), take(a, 300, 300)
    assert sorted(first) == sorted(second) == sorted(texts)
    assert first != second and first != texts and take(c, 300) != first
    # any order, any process
    assert [b.get(i) for i in (599, 0, np.int64(301), 17)] == [second[299], first[0], second[1], first[17]]
    blocks = [[texts.index(t) // 32 for t in pass_] for pass_ in (first, second)]
    assert sum(x != y for x, y in zip(blocks[0], blocks[0][1:])) == len(a.blocks) - 1  # one decode per block
    assert list(dict.fromkeys(blocks[0])) != list(dict.fromkeys(blocks[1]))  # new order of blocks in each epoch
    # and inside them
    assert [t for t, b in zip(first, blocks[0]) if b == 0] != [t for t, b in zip(second, blocks[1]) if b == 0]
    order = hashlib.sha256("".join(first).encode()).hexdigest()
    assert order.startswith("7b145f7f24d19ae2"), (
        "pinned: the document order changed, so runs that are resumed would see other text"
    )


def test_decoded_text_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "CACHE_CHARS", 20000)
    documents = Documents("x", [write_parquet(tmp_path / "a.parquet", words(600), rows=50)])
    take(documents, 1300)
    assert sum(len(t) for texts, _ in documents._decoded.values() for t in texts) == documents._cached_chars <= 20000
    assert len(documents._decoded) >= 2


def test_index_is_cached_and_follows_the_file(tmp_path, base_dir):
    path = write_jsonl(tmp_path / "a.jsonl", words(5))
    before = Documents("x", [path])
    (entry,) = (base_dir / "index").iterdir()
    entry.write_text(entry.read_text().replace(before.hashes[0], "0" * 64))
    assert Documents("x", [path]).hashes == ["0" * 64]  # came from the cache
    write_jsonl(path, words(6))
    os.utime(path, ns=(1, 1))
    after = Documents("x", [path])
    assert after.n_documents == 6 and after.hashes == [hashlib.sha256(path.read_bytes()).hexdigest()]


# validation


def test_split_is_small_disjoint_and_never_changes(tmp_path, base_dir):
    folder = tmp_path / "my"
    texts = words(2000)
    write_parquet(folder / "a.parquet", texts + texts[:500])  # duplicates stay on one side
    data = open_data(DataConfig(data_dir=str(folder)))
    val, train = list(data.val.iterate()), list(data.train[0][0].iterate())
    assert 0.02 * 2000 < len(val) < 0.09 * 2000 and len(set(val)) == len(val)
    assert not set(val) & set(train) and set(val) | set(train) == set(texts)
    assert not set(val) & set(take(data.train[0][0], 5000))
    # files that come later, before or after in name, with copies of validation text
    write_jsonl(folder / "0.jsonl", words(50, seed=1) + val[:20])
    write_txt(folder / "z.txt", [val[0], "something new"])
    again = open_data(DataConfig(data_dir=str(folder)))
    assert list(again.val.iterate()) == val and again.val_fingerprint == data.val_fingerprint
    assert again.fingerprint != data.fingerprint
    assert not set(val) & set(again.train[0][0].iterate())
    (folder / "a.parquet").rename(folder / "b.parquet")
    with pytest.raises(UserError, match="none of the files are left.*rm -r"):
        (folder / "0.jsonl").unlink(), (folder / "z.txt").unlink()
        open_data(DataConfig(data_dir=str(folder)))


def test_split_of_a_folder_of_many_files_takes_whole_files(tmp_path):
    for i in range(120):
        write_txt(tmp_path / f"{i}.txt", words(5, seed=i))
    data = open_data(DataConfig(data_dir=str(tmp_path)))
    val = list(data.val.iterate())
    books = {t.split(":")[0].split(".")[0] for t in val}
    assert 4 <= len(books) <= 6 and len(val) == 5 * len(books)
    later = next(str(i) for i in range(120) if f"Document {i}" not in books)
    (tmp_path / f"{later}.txt").write_text("changed")  # a training file may change
    assert list(open_data(DataConfig(data_dir=str(tmp_path))).val.iterate()) == val
    (tmp_path / f"{min(books).split()[-1]}.txt").write_text("changed")
    with pytest.raises(UserError, match="has changed since the validation text"):
        open_data(DataConfig(data_dir=str(tmp_path)))


def test_damaged_validation_text_is_refused(tmp_path, base_dir):
    path = write_jsonl(tmp_path / "a.jsonl", words(100))
    open_data(DataConfig(data_dir=str(path)))
    (val,) = base_dir.glob("corpora/*/val.parquet")
    write_parquet(val, ["other text"])
    with pytest.raises(UserError, match="not the file that its manifest names.*rm -r"):
        open_data(DataConfig(data_dir=str(path)))


def test_declared_validation_inside_the_folder_is_not_trained_on(tmp_path):
    texts = words(90)
    for i in range(3):
        write_parquet(tmp_path / f"shard_{i}.parquet", texts[30 * i : 30 * i + 30])
    write_jsonl(tmp_path / "copy.jsonl", texts[65:70] + ["new"])
    data = open_data(DataConfig(data_dir=str(tmp_path), val_data=str(tmp_path / "shard_2.parquet")))
    assert list(data.val.iterate()) == texts[60:]
    assert sorted(data.train[0][0].iterate()) == sorted(texts[:60] + ["new"])


def test_tiny_corpora_hold_out_one_document_or_say_why_not(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["first", "second", "first"])
    data = open_data(DataConfig(data_dir=str(path)))
    assert len(list(data.val.iterate())) == 1 and len(set(data.train[0][0].iterate())) == 1
    alone = write_jsonl(tmp_path / "b.jsonl", ["only", "only"])
    with pytest.raises(UserError, match="holds 1 document.*--val-data"):
        open_data(DataConfig(data_dir=str(alone)))
    with pytest.raises(UserError, match="every file of .* is in --val-data"):
        open_data(DataConfig(data_dir=str(alone), val_data=str(alone)))
    copy = write_jsonl(tmp_path / "c.jsonl", ["only"] * 3)
    data = open_data(DataConfig(data_dir=str(alone), val_data=str(copy)))
    with pytest.raises(UserError, match="every document of b.jsonl is blank or in the validation"):
        take(data.train[0][0], 5000)  # says so rather than spin for ever


# mixtures


def test_mixture_parses_weights_and_keeps_sources_apart(tmp_path):
    assert corpora_of("pydocs") == [("pydocs", 1.0)]
    assert corpora_of("pydocs:3, tinystories:1") == [("pydocs", 0.75), ("tinystories", 0.25)]
    a, b = (
        write_jsonl(tmp_path / "a.jsonl", words(200)),
        write_jsonl(tmp_path / "b.jsonl", words(100, seed=1) + words(200)),
    )
    data = open_data(DataConfig(data=f"{a}:0.7,{b}:0.3"))
    assert [(d.name, w) for d, w in data.train] == [("a.jsonl", 0.7), ("b.jsonl", 0.3)]
    val = set(data.val.iterate())
    for documents, _ in data.train:  # b's training text holds copies of a's validation text
        assert not val & set(documents.iterate())
    other = open_data(DataConfig(data=f"{a}:0.6,{b}:0.4"))
    assert other.fingerprint != data.fingerprint and other.val_fingerprint == data.val_fingerprint


@pytest.mark.parametrize(
    "mixture, message",
    [
        ("pydoc", "corpus 'pydoc' is unknown; .*did you mean --data pydocs"),
        ("pydocs:0.5,climbmx:0.5", "did you mean --data climbmix"),
        ("pydocs:x", "weight 'x'"),
        ("pydocs:-1", "weight '-1'"),
        ("pydocs:nan", "weight 'nan'"),
        ("pydocs:1,pydocs:2", "appears twice"),
        ("", "corpus '' is unknown"),
    ],
)
def test_bad_mixtures(mixture, message):
    with pytest.raises(UserError, match=message):
        corpora_of(mixture)


@pytest.mark.fault("F20")
def test_a_colon_of_a_path_stays_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("te:xt", "week:2", "plain")):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "a.jsonl", words(100, seed=i))
    assert corpora_of("./te:xt") == [("./te:xt", 1.0)] and corpora_of("./week:2") == [("./week:2", 1.0)]
    assert corpora_of("./te:xt:0.5,./plain:0.5") == [("./te:xt", 0.5), ("./plain", 0.5)]
    assert [(d.name, w) for d, w in open_data(DataConfig(data="./te:xt:0.5,./week:2:0.5")).train] == [
        ("te:xt", 0.5),
        ("week:2", 0.5),
    ]
    with pytest.raises(UserError) as bad:
        corpora_of("./plain:x")
    assert (bad.value.code, bad.value.values) == ("bad-weight", {"name": "./plain", "weight": "x"})
    with pytest.raises(UserError) as unknown:
        corpora_of("te:xt")
    assert unknown.value.code == "unknown-corpus" and "--data ./te:xt" in unknown.value.values["try_"]


# bad input


ENCODINGS = ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]


@pytest.mark.fault("F11")
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("mark", ["\ufeff", ""])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_other_encodings_are_refused_by_name_and_iconv_makes_them_readable(tmp_path, encoding, mark, suffix):
    texts = [
        "The first text, na\u00efve.",
        "\u0412\u0442\u043e\u0440\u043e\u0439 \u0442\u0435\u043a\u0441\u0442.",
        "The third one.",
    ]
    lines = (
        [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        if suffix == "jsonl"
        else "\n<|endoftext|>\n".join(texts).split("\n")
    )
    path, out = tmp_path / f"IN.{suffix}", tmp_path / "out" / f"OUT.{suffix}"
    path.write_bytes((mark + "\n".join(lines) + "\n").encode(encoding))
    with pytest.raises(UserError) as seen:
        Documents("x", [path])
    assert getattr(seen.value, "code", "") == "not-utf-8" and seen.value.values["path"] == str(path)
    name = seen.value.values["encoding"]
    assert f"iconv -f {name} -t utf-8 IN > OUT" in str(seen.value)
    out.parent.mkdir()
    with open(out, "wb") as file:
        subprocess.run(["iconv", "-f", name, "-t", "utf-8", path], stdout=file, check=True)
    assert list(Documents("x", [out]).iterate()) == texts


@pytest.mark.fault("F11")
def test_chats_in_other_encodings_are_refused_by_name(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]\n'.encode("utf-16"))
    with pytest.raises(UserError) as seen:
        read_conversations(path)
    assert getattr(seen.value, "code", "") == "not-utf-8" and seen.value.values["encoding"] == "utf-16"


@pytest.mark.fault("F11")
def test_nulls_in_text_are_counted_and_binary_files_refused(tmp_path, capsys):
    few, many = tmp_path / "few.txt", tmp_path / "many.txt"
    few.write_text("plain words \0 and\0 more plain words, " * 20)
    many.write_bytes(bytes([0, 0, 0, 7, 0, 65, 66, 0, 0, 1]) * 500)
    assert next(Documents("few", [few]).iterate()).count("\0") == 40
    assert "few.txt has 40 NULs" in capsys.readouterr().out
    with pytest.raises(UserError) as seen:
        Documents("many", [many])
    assert (seen.value.code, seen.value.values["encoding"]) == ("not-utf-8", "")


def bad_files(tmp_path):
    whole = write_parquet(tmp_path / "whole.parquet", words(500)).read_bytes()
    return {
        "empty.txt": (b"", "is empty \\(0 bytes\\)"),
        "empty.parquet": (b"", "is empty"),
        "blank.jsonl": (b"\n\n", "holds no documents"),
        "short.parquet": (whole[: len(whole) // 2], "not a whole parquet file"),
        "foreign.parquet": (b"PK\x03\x04 this is something else", "not a whole parquet file"),
        "latin.txt": ("caf\xe9".encode("latin1"), "not UTF-8 at byte 3 \\(0xe9\\)"),
        "latin.jsonl": (b'{"text": "fine"}\n{"text": "caf\xe9"}\n', "not UTF-8 at byte 30"),
        "broken.jsonl": (b'{"text": "fine"}\n{"text": "cut', "line at byte 17 is not JSON"),
        "fields.jsonl": (b'{"content": "x", "id": 3}\n', "fields content, id; expected .*field text"),
        "list.jsonl": (b"[1]\n", "has a list"),
        "number.jsonl": (b'{"text": 3}\n', "string field text"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "empty.txt",
        "empty.parquet",
        "blank.jsonl",
        "short.parquet",
        "foreign.parquet",
        "latin.txt",
        "latin.jsonl",
        "broken.jsonl",
        "fields.jsonl",
        "list.jsonl",
        "number.jsonl",
    ],
)
def test_bad_files_are_named(tmp_path, name):
    content, message = bad_files(tmp_path)[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_data(DataConfig(data_dir=str(path)))
    assert str(path) in str(error.value)


def test_parquet_without_a_text_column_names_the_columns_it_has(tmp_path):
    pq.write_table(pa.table({"content": ["x"], "url": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column text .it has: content, url"):
        Documents("x", [tmp_path / "a.parquet"])
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="type int64; expected string"):
        Documents("x", [tmp_path / "b.parquet"])


def test_damage_inside_a_parquet_file_is_named_when_it_is_read(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", words(500), rows=100)
    raw = bytearray(path.read_bytes())
    documents = Documents("x", [path])
    raw[len(raw) // 3 : len(raw) // 3 + 400] = bytes(400)
    path.write_bytes(raw)
    with pytest.raises(UserError, match="row group . of .*a.parquet is (damaged|not UTF-8)"):
        list(documents.iterate())


def test_no_data(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_data(DataConfig(data_dir=str(tmp_path / "nope")))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "picture.png").write_bytes(b"x")
    with pytest.raises(UserError, match="saw picture.png; expected .parquet"):
        open_data(DataConfig(data_dir=str(tmp_path / "d")))
    with pytest.raises(UserError, match="--num-shards is 0") as error:
        open_data(DataConfig(num_shards=0))
    assert error.value.code == "flag-out-of-bounds"


def test_half_a_surrogate_pair_and_byte_order_marks_are_harmless(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "half \\ud83d pair"}\n{"text": "\\u00e9"}\n')
    assert list(Documents("x", [tmp_path / "a.jsonl"]).iterate()) == ["half ? pair", "é"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello\n")
    assert list(Documents("x", [tmp_path / "a.txt"]).iterate()) == ["hello"]


@pytest.mark.slow
def test_a_large_file_does_not_have_to_fit_into_memory(tmp_path):
    """Peak memory of opening and reading 400 MB of jsonl stays far below its size (a child process, so that it is its
    own).
    """
    import subprocess
    import sys

    path = tmp_path / "big.jsonl"
    line = json.dumps({"text": " ".join(words(1, length=700))}) + "\n"
    with open(path, "w") as file:
        for i in range(400_000_000 // len(line)):
            file.write(line.replace("0.0", str(i)))
    code = f"""
# not ru_maxrss, which begins with the parent's
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
from nanolab.data.config import DataConfig
from nanolab.data.corpus import open_data
before = peak()
data = open_data(DataConfig(data_dir={str(path)!r}))
documents = data.train[0][0]
for n in range(0, documents.n_documents, 7): documents.get(n)
print((peak() - before) / 1024)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # MiB: the cache of decoded text, of two bytes a character here, and the validation set
    assert float(out.stdout.split()[-1]) < 500

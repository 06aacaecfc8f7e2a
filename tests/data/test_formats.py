"""What is read of a folder and of a file: links, suffixes, marks, long lines, large row groups, packed files. Oracles:
the texts, other libraries.
"""

import bz2
import functools
import gzip
import hashlib
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanolab.cli import UserError
from nanolab.data.chat_files import read_conversations
from nanolab.data.config import DataBuildConfig, DataConfig, TokTrainConfig
from nanolab.data.corpus import Documents, open_data
from nanolab.data.packing import PackedBatches
from nanolab.data.tokenizer import Tokenizer
from nanolab.data.tokenizer_training import Sample, train_tokenizer
from nanolab.stages.config import BaseTrainConfig

MARK = "<|endoftext|>"


def texts(n: int, start: int = 0) -> list[str]:
    return [f"Document number {i} speaks of {i * i} and of {i % 7} other things." for i in range(start, start + n)]


def write_lines(path: Path, found: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    return path


def code(error: pytest.ExceptionInfo[UserError]) -> str | None:
    return getattr(error.value, "code", None)


def zstd(raw: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


# ---- folders ----


@pytest.mark.fault("F2")
@pytest.mark.fault("L6")
def test_every_file_is_read_or_counted(tmp_path, capsys):
    from scripts.data import run

    folder = tmp_path / "mixed"
    write_lines(folder / "a.jsonl", texts(30))
    (folder / "B.TXT").write_text("read me")
    (folder / "sub").mkdir()
    for name in ("c.jsonl.gz", "sub/d.jsonl.gz", "e.jsonl.zst", "f.arrow", "README", ".hidden.txt"):
        (folder / name).write_bytes(b"x")
    run(DataBuildConfig(data_dir=str(folder), json=True))
    out = capsys.readouterr().out
    assert "mixed: 6 files not read: 2 .gz, 1 .zst, 1 .arrow, 1 without a suffix, 1 hidden" in sorted_kinds(out)
    source, val = json.loads(out.splitlines()[-1])["sources"]
    assert source["files"] == 2 and source["documents"] + val["documents"] == 31
    assert "a.jsonl" in out and "B.TXT" in out


def sorted_kinds(out: str) -> str:
    """`out` with the kinds in the order of the test: those of equal number come as the folder is sorted."""
    line = next((line for line in out.splitlines() if "files not read" in line), "")
    head, _, kinds = line.partition("not read: ")
    order = [".gz", ".zst", ".arrow", "without a suffix", "hidden"]
    return f"{head}not read: " + ", ".join(
        sorted(kinds.split(", "), key=lambda k: order.index(k.split(" ", 1)[1]) if k else 0)
    )


@pytest.mark.fault("F2")
def test_linked_folders_are_followed_once(tmp_path):
    write_lines(tmp_path / "elsewhere" / "a.jsonl", texts(20))
    write_lines(tmp_path / "folder" / "real" / "b.jsonl", texts(20, start=20))
    (tmp_path / "folder" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder" / "again").symlink_to(tmp_path / "folder" / "real")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "folder")  # a cycle
    data = open_data(DataConfig(data_dir=str(tmp_path / "folder")))
    ((documents, _),) = data.train
    assert [path.relative_to(tmp_path / "folder").as_posix() for path in documents.paths] == [
        "linked/a.jsonl",
        "real/b.jsonl",
    ]
    assert sorted([*documents.iterate(), *data.val.iterate()]) == sorted(texts(40))


@pytest.mark.fault("F2")
def test_a_link_to_nothing_is_an_error(tmp_path):
    write_lines(tmp_path / "d" / "a.jsonl", texts(20))
    (tmp_path / "d" / "b.jsonl").symlink_to("../blobs/0123")
    with pytest.raises(UserError) as error:
        open_data(DataConfig(data_dir=str(tmp_path / "d")))
    assert code(error) == "dangling-link" and error.value.values == {"path": str(tmp_path / "d" / "b.jsonl")}


@pytest.mark.fault("F2")
def test_base_train_says_what_it_trains_on(tmp_path, capsys):
    from scripts.base_train import run

    found = texts(200)
    write_lines(tmp_path / "d" / "LICENSE.jsonl", found[:5])
    write_lines(tmp_path / "d" / "train.jsonl", found[5:])
    held_out = texts(20, start=500)
    write_lines(tmp_path / "val.jsonl", held_out)
    Tokenizer.train([], 265).save(tmp_path / "tok")  # a token per byte
    run(
        BaseTrainConfig(
            run="x",
            data_dir=str(tmp_path / "d"),
            val_data=str(tmp_path / "val.jsonl"),
            tokenizer=str(tmp_path / "tok"),
            depth=1,
            aspect_ratio=32,
            head_dim=32,
            max_seq_len=64,
            device_batch_size=4,
            total_batch_size=256,
            num_iterations=3,
            eval_every=-1,
            sample_every=-1,
            device_type="cpu",
        )
    )
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.split()}
    n_bytes = sum(map(len, found))
    passes = 3 * 256 / (n_bytes + len(found))  # each document has its bos
    assert (
        f"d: 2 files (LICENSE.jsonl, train.jsonl), 200 documents, {n_bytes:,} bytes, about {passes:.3g} passes over it"
        in lines.get("data", "")
    )
    assert f"1 file (val.jsonl), 20 documents, {sum(map(len, held_out)):,} bytes, of --val-data" in lines.get(
        "validation", ""
    )


# ---- marks ----


@pytest.mark.fault("F3")
def test_marks_inside_lines_are_counted_and_stay_text(tmp_path, capsys):
    folder = tmp_path / "joined"
    folder.mkdir()
    (folder / "a.txt").write_text(MARK.join(f"book {i}\nends" for i in range(8)))  # seven inside lines
    (folder / "b.txt").write_text(f"one\n{MARK}\ntwo {MARK} and\n  {MARK}  \nthree\n")
    write_lines(folder / "c.jsonl", [*texts(40), f"x{MARK}y{MARK}z"])
    data = open_data(DataConfig(data_dir=str(folder)))
    assert "joined: 10 marks <|endoftext|> are not alone on a line and stay text" in capsys.readouterr().out
    everything = [*data.train[0][0].iterate(), *data.val.iterate()]
    assert sum(text.count(MARK) for text in everything) == 10 and len(everything) == 1 + 3 + 41
    tok = Tokenizer.train([], 265)
    assert not set(tok.encode(MARK)) & set(tok.specials.values())


@pytest.mark.fault("F3")
def test_marks_in_parquet_are_counted_when_it_is_read(tmp_path, capsys):
    from scripts.data import run

    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"text": [*texts(50), f"a{MARK}b", f"{MARK}c"]}), tmp_path / "d" / "a.parquet")
    write_lines(tmp_path / "val.jsonl", ["held out"])
    run(DataBuildConfig(data_dir=str(tmp_path / "d"), val_data=str(tmp_path / "val.jsonl")))
    assert "d: 2 marks <|endoftext|> are inside texts and stay text" in capsys.readouterr().out


# ---- long lines and documents ----


LONG = {
    "words": " ".join(f"w{i}" for i in range(150_000)),
    "no blanks": "漢字é" * 80_000,
    "both": "short\n\n" + "ab " * 200_000 + "\n\nafter\n" + "x" * 300_000 + "\r\nend",
}


@pytest.mark.fault("F10")
@pytest.mark.parametrize("name", LONG)
def test_a_long_line_becomes_documents_that_lose_nothing(tmp_path, name):
    text = LONG[name]
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    documents = Documents("a", [path])
    found = list(documents.iterate())
    assert len(found) >= len(text.encode()) // 16_000 and max(len(t.encode()) for t in found) < 16_000
    strip = lambda t: t.replace("\r", "").replace("\n", "")  # noqa: E731
    assert "".join(map(strip, found)) == strip(text)
    # from the middle of the file too
    assert sorted(documents.get(i) for i in range(documents.n_documents)) == sorted(found)
    if name == "words":  # cut before blanks, so that the tokens are those of the whole
        assert all(t.startswith(" w") for t in found[1:])


@pytest.mark.fault("F10")
def test_long_lines_between_marks_are_cut_and_the_marks_still_divide(tmp_path):
    lines = ["first", "ab " * 100_000, "last"]
    path = tmp_path / "a.txt"
    path.write_text(f"\n{MARK}\n".join(lines))
    found = list(Documents("a", [path]).iterate())
    assert found[0] == "first" and found[-1] == "last" and "".join(found[1:-1]) == lines[1] and len(found) > 30


@pytest.mark.fault("F10")
def test_files_whose_division_changed_are_other_data(tmp_path):
    """A run that was trained on the whole line is not resumed on its parts: the fingerprint is no longer that of the
    bytes alone.
    """

    def of_bytes(path):
        return hashlib.sha256(hashlib.sha256(path.read_bytes()).hexdigest().encode()).hexdigest()

    long, short = tmp_path / "a.txt", tmp_path / "b.txt"
    long.write_text("word " * 100_000)
    short.write_text("word " * 50_000)
    assert Documents("b", [short]).fingerprint == of_bytes(short) and Documents("b", [short]).n_documents == 1
    assert Documents("a", [long]).fingerprint != of_bytes(long)


def test_ordinary_files_give_the_batches_that_they_always_gave(tmp_path):
    """Pinned: the numbers were printed by the commit before long lines were cut; runs that are resumed depend on
    them.
    """
    found = [" ".join(f"{i}w{j}" for j in range(i * 37 % 400)) + f"\nend {i}\n\n" for i in range(900)]
    pq.write_table(pa.table({"text": found[:300]}), tmp_path / "a.parquet", row_group_size=64)
    write_lines(tmp_path / "b.jsonl", found[300:500])
    (tmp_path / "c.txt").write_text(f"\n{MARK}\n".join(found[500:600]))
    (tmp_path / "d.txt").write_text("".join(found[600:]))
    (tmp_path / "e.txt").write_text("a line below the bound " * 11_000)
    data = open_data(DataConfig(data_dir=str(tmp_path)))
    batches = PackedBatches(data.train, Tokenizer.train([], 265), seq_len=128, device_batch_size=8, rows_per_step=32)
    digest = hashlib.sha256()
    for _ in range(300):
        digest.update(batches.next().inputs.numpy().tobytes())
    assert digest.hexdigest()[:12] == "76d0b593364e"


@pytest.mark.fault("F10")
@pytest.mark.parametrize(
    ("name", "write", "values"),
    [
        ("a.jsonl", lambda path, found: write_lines(path, found), {"line": 3}),
        (
            "a.parquet",
            lambda path, found: pq.write_table(pa.table({"text": found}), path, row_group_size=2, use_dictionary=False),
            {"row": 2},
        ),
        (
            "a.txt",
            lambda path, found: path.write_text(f"\n{MARK}\n".join(text.replace(" ", "\n") for text in found)),
            {"byte": 32},
        ),
    ],
)
def test_documents_that_are_too_long_are_named(tmp_path, monkeypatch, name, write, values):
    monkeypatch.setattr("nanolab.data.blocks.MAX_DOCUMENT", 9_000, raising=False)
    path = tmp_path / name
    write(path, ["é", None if name == "a.parquet" else "", "word " * 2_000, "é"])
    with pytest.raises(UserError) as error:
        Documents("a", [path])
    assert code(error) == "document-too-long" and error.value.values == {"path": str(path), **values}


@pytest.mark.fault("F10")
def test_the_tokenizer_sees_an_even_sample_of_a_long_document():
    class Source:
        def iterate(self):
            return iter(["".join(chr(0x4E00 + i // 100) for i in range(100_000)), "short"])

    sample = Sample([(Source(), 1.0)], max_chars=10**9, doc_cap=10_000)
    read = "".join(sample)
    assert len(read) == sample.chars == 10_005 and sample.documents == 2
    tenths = [sum((ord(c) - 0x4E00) // 100 == t for c in read[:10_000]) for t in range(10)]
    assert all(900 <= n <= 1100 for n in tenths), tenths
    assert (read[0], read[9_999]) == (chr(0x4E00), chr(0x4E00 + 999))  # from its beginning to its end


@pytest.mark.fault("F10")
def test_tok_train_blames_the_cap_where_it_is_the_cause(tmp_path, capsys):
    write_lines(
        tmp_path / "a.jsonl",
        [" ".join(f"{a}{i * j % 997}" for j in range(4_000)) for i, a in enumerate(["ab", "cd", "ef"])],
    )
    flags = dict(data_dir=str(tmp_path / "a.jsonl"), tokenizer=str(tmp_path / "tok"), doc_cap=200)
    with pytest.raises(UserError) as error:
        train_tokenizer(TokTrainConfig(**flags, vocab_size=2_000))
    assert (
        code(error) == "too-few-merges"
        and error.value.values["doc_cap"] == 200
        and "train on more text" not in str(error.value)
    )
    train_tokenizer(TokTrainConfig(**flags, vocab_size=error.value.values["possible"]))
    assert "2 of 2 documents are longer than 200 characters" in capsys.readouterr().out


def peak_mib(script: str) -> float:
    """Peak resident memory of a Python process that runs `script`. VmHWM, since getrusage begins with what this process
    held when it forked.
    """
    read = "; print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    done = subprocess.run(
        [sys.executable, "-c", script.rstrip("; ") + read], stdout=subprocess.PIPE, text=True, check=True
    )
    return int(done.stdout.split("VmHWM:")[1].split()[0]) / 1024


IMPORTS = (
    "from nanolab.data.config import DataConfig; from nanolab.data.corpus import open_data; from nanolab.data.packing"
    " import PackedBatches; from nanolab.data.tokenizer import Tokenizer; "
)
LOADER = (
    IMPORTS + "b = PackedBatches(open_data(DataConfig(data_dir={0!r}, val_data={1!r})).train, Tokenizer.train([], 265),"
    " seq_len=256, device_batch_size=8, rows_per_step=32); [b.next() for _ in range(40)]"
)


@functools.cache
def bare_mib() -> float:
    return peak_mib(IMPORTS)


@pytest.mark.fault("F10")
def test_a_document_that_all_streams_read_is_tokenised_once(tmp_path, monkeypatch):
    tokenizer, lengths = Tokenizer.train([], 265), []
    encode = tokenizer.encode_arrays
    monkeypatch.setattr(
        tokenizer, "encode_arrays", lambda texts, *rest: lengths.extend(map(len, texts)) or encode(texts, *rest)
    )
    monkeypatch.setattr("nanolab.data.packing.AHEAD_CHARS", 10_000)
    text = "word " * 20_000
    batches = PackedBatches(
        [(Documents("a", [write_lines(tmp_path / "a.jsonl", [text])]), 1.0)],
        tokenizer,
        seq_len=64,
        device_batch_size=16,
        rows_per_step=16,
    )
    batches.next()
    assert sum(lengths) == len(text)


@pytest.mark.slow
@pytest.mark.fault("F10")
def test_a_line_of_megabytes_needs_little_memory(tmp_path, base_dir):
    path, val = tmp_path / "a.txt", write_lines(tmp_path / "v.jsonl", ["held out"])
    path.write_text(" ".join(f"w{i}" for i in range(3_000_000)))
    above = peak_mib(LOADER.format(str(path), str(val))) - bare_mib()
    assert path.stat().st_size > 22e6 and above < 200, above  # 3,263 MiB where each stream tokenised the whole


@pytest.mark.slow
@pytest.mark.fault("L7")
def test_a_large_row_group_needs_little_memory(tmp_path, base_dir):
    path, val = tmp_path / "a.parquet", write_lines(tmp_path / "v.jsonl", ["held out"])
    text = "".join(f" #w{j}" for j in range(300))
    found = [text.replace("#", str(i)) for i in range(40_000)]
    pq.write_table(pa.table({"text": found}), path, row_group_size=10**6)
    reading = peak_mib(
        f"from scripts.data import *; run(DataBuildConfig(data_dir={str(path)!r}, val_data={str(val)!r}))"
    )
    loading, bare = peak_mib(LOADER.format(str(path), str(val))), bare_mib()
    assert sum(map(len, found)) > 95e6 and reading - bare < 150 and loading - bare < 200, (bare, reading, loading)


# ---- parquet ----


NEW_KINDS = [pa.string_view(), pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.uint32(), pa.large_string())]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    "kind", [pa.large_string(), *(pytest.param(kind, marks=pytest.mark.fault("L6")) for kind in NEW_KINDS)], ids=str
)
def test_columns_of_every_kind_of_string_are_read(tmp_path, monkeypatch, kind, large):
    if large:
        monkeypatch.setattr("nanolab.data.parquet.LARGE_ROW_GROUP", 100, raising=False)
    found = [f"text {i % 60} é" for i in range(200)] + [None, ""]
    column = pa.array(found, pa.string())
    pq.write_table(
        pa.table(
            {"text": column.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else column.cast(kind)}
        ),
        tmp_path / "a.parquet",
        row_group_size=70,
    )
    documents = Documents("a", [tmp_path / "a.parquet"])
    assert list(documents.iterate()) == found[:200] and documents.n_documents == 202
    assert sorted(t or "" for t in map(documents.get, range(202))) == sorted(t or "" for t in found)


def test_large_row_groups_give_the_same_documents_in_the_same_order(tmp_path, monkeypatch):
    found = [*texts(500), None, "", "é" * 50, " \n"]
    pq.write_table(pa.table({"text": found}), tmp_path / "a.parquet", row_group_size=300)
    usual = Documents("a", [tmp_path / "a.parquet"])
    expected = list(usual.iterate()), [usual.get(n) for n in range(1200)]
    monkeypatch.setattr("nanolab.data.parquet.LARGE_ROW_GROUP", 100)
    monkeypatch.setattr("nanolab.data.parquet.PART_BYTES", 1000)
    large = Documents("a", [tmp_path / "a.parquet"])
    assert (list(large.iterate()), [large.get(n) for n in range(1200)]) == expected


# ---- files that are not what their name says ----


PACKED = {"gzip": gzip.compress, "zstd": zstd, "bzip2": bz2.compress, "xz": lzma.compress}


@pytest.mark.fault("F12")
@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".parquet"])
@pytest.mark.parametrize("kind", PACKED)
def test_packed_files_are_named_for_what_they_are(tmp_path, kind, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACKED[kind](write_lines(tmp_path / "plain", texts(30)).read_bytes()))
    with pytest.raises(UserError) as error:
        Documents("a", [path])
    assert code(error) == "file-kind" and (error.value.values["kind"], error.value.values["path"]) == (kind, str(path))


@pytest.mark.fault("F12")
@pytest.mark.parametrize("name", ["plain.jsonl", "named.gz.jsonl"])
def test_the_command_that_is_named_makes_the_file_readable(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(write_lines(tmp_path / "plain", texts(30)).read_bytes()))
    with pytest.raises(UserError) as error:
        Documents("a", [path])
    assert code(error) == "file-kind"
    subprocess.run(error.value.values["command"], shell=True, check=True)
    assert list(Documents("a", [path]).iterate()) == texts(30)


@pytest.mark.fault("F12")
def test_a_wrong_suffix_is_named(tmp_path):
    lines, table = tmp_path / "a.parquet", tmp_path / "b.jsonl"
    write_lines(lines, texts(3))
    pq.write_table(pa.table({"text": texts(3)}), table)
    for path, kind in ((lines, "JSON lines"), (table, "parquet")):
        with pytest.raises(UserError) as error:
            Documents("a", [path])
        assert code(error) == "file-kind" and error.value.values["kind"] == kind
        subprocess.run(error.value.values["command"], shell=True, check=True)
    for path in (tmp_path / "a.jsonl", tmp_path / "b.parquet"):
        assert list(Documents("a", [path]).iterate()) == texts(3)


@pytest.mark.fault("F12")
def test_a_null_text_is_blank_in_lines_as_in_parquet(tmp_path):
    found = ["one", None, "two"]
    pq.write_table(pa.table({"text": found}), tmp_path / "a.parquet")
    for path in (write_lines(tmp_path / "a.jsonl", found), tmp_path / "a.parquet"):
        try:
            documents = Documents("a", [path])
        except UserError as error:
            pytest.fail(str(error))
        assert list(documents.iterate()) == ["one", "two"] and documents.n_documents == 3
        assert [documents.get(i) for i in range(3)].count(None) == 1


@pytest.mark.fault("F12")
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_named_in_a_corpus(tmp_path, indent):
    for items, query in (([{"text": t} for t in texts(3)], "jq -c '.[]' "), (texts(3), "jq -c '.[] | {text: .}' ")):
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps(items, indent=indent))
        with pytest.raises(UserError) as error:
            Documents("a", [path])
        assert code(error) == "json-array" and error.value.values == {"path": str(path)}
        assert indent or query in str(error.value)


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARED = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


@pytest.mark.fault("F12")
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("chat", [CHAT, SHARED, {"messages": CHAT}], ids=["messages", "conversations", "object"])
def test_a_json_array_is_named_in_a_file_of_conversations(tmp_path, chat, indent):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps([chat] * 3, indent=indent))
    with pytest.raises(UserError) as error:
        read_conversations(path)
    assert code(error) == "json-array" and error.value.values == {"path": str(path)}


@pytest.mark.fault("F12")
@pytest.mark.parametrize("kind", [*PACKED, "parquet"])
def test_packed_conversations_are_named_for_what_they_are(tmp_path, kind):
    path = tmp_path / "a.jsonl"
    if kind == "parquet":
        pq.write_table(pa.table({"messages": [CHAT] * 3}), path)
    else:
        path.write_bytes(PACKED[kind](json.dumps(CHAT).encode() + b"\n"))
    with pytest.raises(UserError) as error:
        read_conversations(path)
    assert code(error) == "file-kind" and error.value.values["kind"] == kind
    if kind == "parquet":  # the command writes lines that are read
        subprocess.run(
            error.value.values["command"],
            shell=True,
            check=True,
            cwd=tmp_path,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )
        assert read_conversations(tmp_path / "OUT.jsonl") == [CHAT] * 3

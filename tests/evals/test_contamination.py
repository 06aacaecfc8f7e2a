"""Contamination against a search with sets of tuples, on random text and with overlaps planted at every kind of
border.
"""

import json
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanolab.cli import UserError
from nanolab.data import blocks
from nanolab.data.corpus import Documents
from nanolab.evals import ngrams
from nanolab.evals.config import ContaminationConfig
from nanolab.evals.contamination import EvalSet, Search, item_texts, read_sets
from nanolab.evals.ngrams import split
from nanolab.evals.score import wilson
from scripts.contamination import run

MIXED = ngrams.mixed
SENTENCE = "the quick brown fox jumps over the lazy dog while seven wizards watch from afar in silence"  # 17 words


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Several blocks, batches and lots to compare, so that every border is crossed."""
    monkeypatch.setattr(ngrams, "BATCH_CHARS", 30)
    monkeypatch.setattr(ngrams, "COMPARED", 8)
    monkeypatch.setattr(blocks, "BLOCK_DOCUMENTS", 3)


def slow_words(text: str) -> list[str]:
    words = [""]
    for c in unicodedata.normalize("NFKC", text).lower():
        if c.isalnum() or unicodedata.category(c).startswith("M"):
            words[-1] += c
        else:
            words.append("")
    return [word for word in words if word]


def slow_search(items: list[list[str]], documents: list[str], n: int) -> list[tuple[int, int]]:
    """(words of the longest overlap, document) of each item; (0, 0) of none."""
    best = [(0, 0)] * len(items)
    for d, document in enumerate(map(slow_words, documents)):
        seen = {tuple(document[i : i + n]) for i in range(len(document) - n + 1)}
        for item, texts in enumerate(items):
            for words in map(slow_words, texts):
                length = 0
                for i in range(len(words) - n + 1):
                    length = length + 1 if tuple(words[i : i + n]) in seen else 0
                    if length and length + n - 1 > best[item][0]:
                        best[item] = (length + n - 1, d)
    return best


def corpus(folder: Path, texts: list[str], name: str = "docs") -> Documents:
    path = Path(folder) / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Documents(name, [path])


def found(items: list[list[str]], documents: Documents, n: int) -> list[tuple[int, int]]:
    best = Search([EvalSet("set", Path("set.jsonl"), list(range(len(items))), items)], n).scan(documents, "docs")
    before = np.cumsum([0, *(block.n for block in documents.blocks)])
    return [(int(w), int(before[b] + d) if w else 0) for w, b, d in zip(best.words, best.block, best.document)]


TEXTS = st.lists(st.sampled_from(["a", "b", "B", "ab", "ba", "é", "e\u0301", "!", ",", "3", "\n"]), max_size=14).map(
    " ".join
)


@pytest.mark.slow
@pytest.mark.parametrize("weak", [False, True])
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(TEXTS, min_size=1, max_size=3), min_size=1, max_size=5),
    st.lists(TEXTS, min_size=1, max_size=8),
    st.integers(2, 4),
)
def test_it_is_the_search_with_sets_of_tuples(weak, items, documents, n):
    """Also where nearly all hashes collide."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        if weak:
            patch.setattr(ngrams, "mixed", lambda h: MIXED(h) & np.uint64(3))
        assert found(items, corpus(folder, documents), n) == slow_search(items, documents, n)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=4))
def test_words_are_those_of_one_character_after_the_other(texts):
    words = split(texts)
    assert [words.text(a, b - a).split(" ") if b > a else [] for a, b in zip(words.firsts, words.firsts[1:])] == [
        slow_words(text) for text in texts
    ]


def test_words_ignore_case_punctuation_and_form():
    words = split(["“Don’t”, HE_said—ﬁne: 3½ Ａ", "don't he said fine 3 1 2 a", "Straße हिन्दी", ""])
    a, b, c, d = (words.text(x, y - x) for x, y in zip(words.firsts, words.firsts[1:]))
    assert a.split() == ["don", "t", "he", "said", "fine", "31", "2", "a"] and b.split()[:4] == a.split()[:4]
    assert c.split() == ["straße", "हिन्दी"] and d == ""


def test_the_same_letters_in_other_words_are_not_equal():
    words, at = split(["ab a", "a ba", "AB a", "ab b"]), np.array([2, 4, 6])
    assert ngrams.equal(words, at * 0, words, at, 2).tolist() == [False, True, False]


def test_overlaps_at_the_borders_of_documents_and_blocks(tmp_path):
    words = SENTENCE.split()
    first, last = " ".join(words[:13]), " ".join(words[-13:])
    documents = [
        "other words",
        f"{first} other words",
        f"other words {last}",  # at both ends of a document, the last of a block
        " ".join(words[:8]),
        " ".join(words[8:]),  # across two documents
        " ".join(words[:12]),
        f"{SENTENCE.upper()}!",
        SENTENCE,
    ]
    items = [
        [first],
        [last],
        [" ".join(words[:12])],
        [SENTENCE],
        [first, last],
        [" ".join(words[:8]), " ".join(words[8:])],
        [SENTENCE],
    ]
    got = found(items, corpus(tmp_path, documents), 13)
    # the first document with the longest one
    assert got == [(13, 1), (13, 2), (0, 0), (17, 6), (13, 1), (0, 0), (17, 6)]


@pytest.mark.parametrize(
    ("item", "texts"),
    [
        ({"query": "Q", "choices": ["x", "y", "z"], "gold": 1}, ["Q y ", "x", "z"]),
        ({"context": "C", "continuation": "D", "category": "k"}, ["C  D"]),
        ({"context_options": ["one", "two"], "continuation": "end", "gold": 0}, [" one end", "two"]),
        ({"question": "Q", "answer": "A"}, ["Q  A"]),
        ({"question": "Q", "choices": ["x"], "answer": 0}, ["Q", "x"]),
        ({"messages": [{"role": "user", "content": "hi"}], "n": 3}, ["user", "hi"]),
    ],
)
def test_the_right_whole_of_an_item_is_one_text_and_other_options_their_own(item, texts):
    assert item_texts(item) == texts


def bundle(folder: Path, tasks: dict[str, list[dict] | str]) -> Path:
    (folder / "eval_data").mkdir(parents=True)
    kinds = {"choices": "multiple_choice", "continuation": "language_modeling"}
    entries = []
    for label, items in tasks.items():
        text = items if isinstance(items, str) else "".join(json.dumps(item) + "\n" for item in items)
        (folder / "eval_data" / f"{label}.jsonl").write_text(text)
        kind = (
            "language_modeling" if isinstance(items, str) else next(k for name, k in kinds.items() if name in items[0])
        )
        entries.append(f"- {{label: {label}, dataset_uri: {label}.jsonl, num_fewshot: [0], icl_task_type: {kind}}}")
    (folder / "core.yaml").write_text("icl_tasks:\n" + "\n".join(entries[:1]) + "\n")
    (folder / "extra.yaml").write_text(
        "icl_tasks:\n" + "\n".join([*entries[1:], entries[0].replace("label: ", "label: again_")]) + "\n"
    )
    rows = [f"{label},0" for label in (*tasks, "again_" + next(iter(tasks)))]
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + "\n".join(rows) + "\n")
    return folder


def test_the_command_counts_names_and_writes(tmp_path, capsys):
    choice = {
        "query": " ".join(SENTENCE.split()[:10]),
        "choices": ["nothing", " ".join(SENTENCE.split()[10:])],
        "gold": 1,
    }
    good = [
        {**choice, "gold": 0},
        choice,
        {"query": "too short " * 5 + "by", "choices": ["a", "b"], "gold": 0},
        choice,
        {**choice, "query": "zebras in winter are " * 4},
    ]
    folder = bundle(
        tmp_path / "bundle",
        {"mc": good, "lm": [{"context": "w " * 20, "continuation": "w"}], "bad": '{"context": "a"}\nnot json\n'},
    )
    train, val = tmp_path / "train.jsonl", tmp_path / "val.jsonl"
    held_out = "zebras in winter are zebras in winter are zebras in winter are zebras again"
    train.write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ["nothing here", SENTENCE + " and more", held_out])
    )
    val.write_text("".join(json.dumps({"text": t}) + "\n" for t in [held_out, f"so {SENTENCE}"]))
    output = tmp_path / "out"
    cfg = ContaminationConfig(eval_set=str(folder), data_dir=str(train), val_data=str(val), out=str(output), json=True)
    assert run(cfg) == 1  # a task could not be read
    printed = capsys.readouterr().out
    document = json.loads(printed.splitlines()[-1])
    assert document == json.loads((output / "contamination.json").read_text())
    mc, lm = document["sets"]
    assert (mc["set"], mc["items"], mc["long_enough"], mc["longest"]) == ("mc, again_mc", 5, 3, 17)
    # what is held out is not trained on
    assert {k: v["items"] for k, v in mc["overlap"].items()} == {"train": 2, "val": 3, "either": 3}
    assert mc["overlap"]["train"]["share"] == 2 / 3 and mc["overlap"]["train"]["interval"] == list(wilson(2 / 3, 3))
    assert (lm["items"], lm["long_enough"], lm["longest"], lm["overlap"]["either"]["items"]) == (1, 1, 0, 0)
    assert "not JSON" in document["broken"]["bad"] and "not read: bad: " in printed
    rows = [json.loads(line) for line in (output / "contaminated.jsonl").read_text().splitlines()]
    assert [(row["set"], row["index"], row["line"], row["splits"], row["words"]) for row in rows] == [
        ("mc, again_mc", 1, 2, ["train", "val"], 17),
        ("mc, again_mc", 3, 4, ["train", "val"], 17),
        ("mc, again_mc", 4, 5, ["val"], 13),
    ]
    assert (
        rows[0]["text"] == SENTENCE
        and rows[0]["where"] == f"{train} byte 0, document 1"
        and rows[2]["text"] == held_out.removesuffix(" again")
    )
    assert [row["line"] for row in mc["examples"]] == [4, 5]  # one of the two items on one passage


def test_no_item_long_enough_has_no_share(tmp_path, capsys):
    (tmp_path / "short.jsonl").write_text('{"text": "only four words here"}\n\n')
    train = tmp_path / "train.jsonl"
    train.write_text('{"text": "a b"}\n{"text": "c d"}\n')
    assert run(ContaminationConfig(eval_set=str(tmp_path / "short.jsonl"), data_dir=str(train), json=True)) == 0
    (entry,) = json.loads(capsys.readouterr().out.splitlines()[-1])["sets"]
    assert entry["long_enough"] == 0 and entry["overlap"]["either"] == {"items": 0, "share": None, "interval": None}


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"query": "a"}\n[1]\n', "a.jsonl:2 holds a list"),
        ("a.jsonl", '{"query": "a"\n', "a.jsonl:1 is not JSON"),
        ("a.jsonl", '{"n": 3}\n', "a.jsonl:1: the fields n hold no text"),
        ("a.jsonl", '{"query": "a", "choices": ["b"], "gold": 1}\n', "gold is 1 of 1 choices"),
        (
            "a.jsonl",
            (
                '{"query": "a", "choices": [2], "gold": 0, "x": []}\n{"context_options": [1, 2], "continuation": "x",'
                ' "gold": 0}'
            ),
            "a.jsonl:2: the fields",
        ),
        ("a.csv", "a,b\n", "ends in .csv; expected a .jsonl file"),
        ("folder/x.jsonl", "{}\n", "has no core.yaml"),
    ],
)
def test_what_is_not_an_evaluation_set_is_named(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(UserError, match=complaint):
        read_sets(path.parent if "/" in name else path)


def test_other_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_sets(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="type --eval-set PATH"):
        run(ContaminationConfig())
    with pytest.raises(UserError, match="--ngram is 1; expected at least 2 words"):
        Search([EvalSet("a", tmp_path, [1], [["b c"]])], 1)

"""Generated tasks: what is held out is really unseen, references are graded right and wrong replies not, texts are
pinned.

Oracle: questions parsed back by expressions written here, Python's arithmetic and str.count, hashes of the texts.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import tasks
from nanolab.cli import UserError
from nanolab.data.chat import check_messages, render, text_of
from nanolab.data.parquet import write_documents
from nanolab.data.tokenizer import Tokenizer
from nanolab.inference.calculator import calculator
from tasks.common import Published
from tasks.documentation import Entry, entries_of
from tasks.identity import FIELDS, TOPICS, cores, endings, sentence
from tasks.sentences import ENDINGS, EVENTS, EXPRESSIONS, PROBLEM_QUESTIONS, SETTINGS, THINGS, VERB_PHRASES

ROOT = Path(__file__).parents[2]
WORDS = (
    "apple banana letter bottle summer winter paper river mountain yellow purple little kettle needle hammer rabbit"
    " tunnel button cotton coffee butter pepper carrot lemon melon onion potato tomato garden window mirror pillow"
    " carpet basket bucket ladder engine wheel brake signal station ticket market village forest meadow valley island"
    " harbour anchor compass lantern candle feather leather wool silver copper iron marble granite pebble gravel sand"
    " clay brick timber plank nail screw hinge handle key lock door gate fence wall"
).split()


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("\n".join(WORDS))
    return path


def examples(spec: str, split: str, n: int) -> list:
    task = tasks.build(spec, split, limit=n)
    return [task.example(i) for i in range(n)]


def questions(spec: str, split: str, n: int) -> list[str]:
    return [example.messages[0]["content"] for example in examples(spec, split, n)]


def call(code: str, output: str) -> list[dict]:
    return [{"type": "python", "text": code}, {"type": "python_output", "text": output}]


def said(text: str) -> dict:
    return {"type": "text", "text": text}


PINNED = {
    ("arithmetic", "train"): "42b25c22468c",
    ("arithmetic", "test"): "45adaad85691",
    ("arithmetic", "phrasings"): "61f568811c1b",
    ("arithmetic", "problems"): "41d11ff92c2c",
    ("identity", "train"): "46f3f4957d07",
    ("identity", "test"): "a16404790fd1",
    ("identity", "name"): "38ed21420ce3",
    ("spelling", "train"): "2e817c44c92a",
    ("spelling", "seen"): "cea0648117c5",
    ("spelling", "test"): "ded94774d2e3",
    ("spellingbee", "train"): "bc2769959ddb",
    ("spellingbee", "seen"): "1d85c8c551cd",
    ("spellingbee", "test"): "234264c61f8d",
}


@pytest.mark.parametrize(("name", "split"), PINNED)
def test_references_are_pinned_conversations_that_are_graded_right(words, name, split):
    task = tasks.build(f"{name}={words}" if name.startswith("spelling") else name, split)
    first = [task.example(i) for i in range(min(200, len(task)))]
    for example in first:
        reply = example.messages[-1]["content"]
        check_messages(example.messages)
        assert task.correct(example, reply)
        assert not task.correct(example, "I do not know.") and not task.correct(example, "")
        others = [e.messages[-1]["content"] for e in first if e.answer != example.answer][:20]
        # an equal number, or a name beside the version, is no mistake
        assert sum(task.correct(example, other) for other in others) < 15
    assert len({e.messages[0]["content"] for e in first}) > 60
    got = hashlib.sha256(json.dumps([e.messages for e in first]).encode()).hexdigest()[:12]
    assert got == PINNED[name, split], (
        "the same index gives another text: raise the task's version, then pin the new hash"
    )


# --- arithmetic -------------------------------------------------------------------------------------------------------


GENERATED = [name for name, task in tasks.TASKS.items() if task.kind == "generate" and not issubclass(task, Published)]


@pytest.mark.parametrize("name", GENERATED)
def test_every_generated_task_keeps_the_rules_of_the_table(words, name):
    """References are right and an empty reply is not, each part of a reward is in [0, 1], a limit changes no example,
    and what the test asks is not in training.
    """
    spec = f"{name}={words}" if tasks.TASKS[name].argument_is.startswith("FILE or COUNT") else name
    asked = {}
    for split in ("train", "test"):
        task = tasks.build(spec, split)
        first = [task.example(i) for i in range(min(500, len(task)))]
        asked[split] = {example.messages[0]["content"] for example in first}
        assert first[:5] == [tasks.build(spec, split, limit=5).example(i) for i in range(5)]
        for example in first[:100]:
            reply = example.messages[-1]["content"]
            assert task.rewards(example, reply)["correct"] == 1.0, f"the reference {reply!r} is graded as wrong"
            assert not task.correct(example, "")
            values = [value for said in (reply, "", "x" * 500) for value in task.rewards(example, said).values()]
            assert all(0 <= value <= 1 for value in values), values
    assert not asked["train"] & asked["test"], "the test asks what is in training"


def pair(example) -> tuple[int, ...]:
    return tuple(sorted((example.answer.a, example.answer.b)))


def test_held_out_pairs_are_unseen_in_any_operation_and_order():
    seen = {pair(e) for e in examples("arithmetic", "train", 12_000)}
    for split in ("test", "phrasings", "problems"):
        held = {pair(e) for e in examples("arithmetic", split, 1000)}
        assert not held & seen and len(held) > 200
    assert len(seen) > 3000  # of about 0.9 x (90 x 91 / 2 + 8 x 90)


def test_the_numbers_in_the_question_are_the_numbers_of_the_answer():
    for split in ("train", "test", "phrasings", "problems"):
        for example in examples("arithmetic", split, 500):
            question, reply = example.messages[0]["content"], example.messages[1]["content"]
            a, op, b = example.answer
            assert sorted(map(int, re.findall(r"\d+", question))) == sorted((a, b))
            value = {"+": a + b, "-": a - b, "*": a * b}[op]
            assert reply == [*call(f"{a}{op}{b}", str(value)), said(f"It is {value}.")]
            assert value >= 0


def frames(split: str, n: int) -> tuple[set[str], set[str]]:
    """What stands before and after the expression in the questions that are no word problems: in lower case, without
    the last mark.
    """
    expressions = sorted((re.escape(x) for xs in EXPRESSIONS.values() for x in xs), key=len, reverse=True)
    expression = re.sub(r"\\\{[ab]\\\}", r"\\d+", "|".join(expressions))
    asked = [q.rstrip(".?").lower() for q in questions("arithmetic", split, n) if q.count(". ") < 2]
    found = [re.fullmatch(rf"(\D*?) (?:{expression})(\D*)", q) for q in asked]
    assert all(found)
    return {m[1] for m in found}, {m[2] for m in found}


def test_held_out_phrasings_are_unseen():
    before, after = frames("train", 4000)
    new_before, new_after = frames("phrasings", 1000)
    assert not new_before & before and not new_after & after
    assert len(before) == 102 and len(after) == 21 and len(new_before) == 6 and len(new_after) == 3
    assert frames("test", 500)[0] <= before
    assert all(len(set(xs)) == 6 for xs in EXPRESSIONS.values())


def test_held_out_problems_are_unseen():
    train = [q for q in questions("arithmetic", "train", 4000) if q.count(". ") == 2 and q.endswith("?")]
    new = questions("arithmetic", "problems", 1000)
    assert 0.2 < len(train) / 4000 < 0.3

    def sentences(asked: list[str], place: int) -> set[str]:
        nouns = "|".join(THINGS)
        return {re.sub(nouns, "things", re.sub(r"\d+", "#", re.split(r"(?<=\.) ", q)[place])) for q in asked}

    for place, least in ((0, 4), (1, 6)):
        assert not sentences(new, place) & sentences(train, place) and len(sentences(new, place)) == least
    assert sentences(new, 2) == sentences(train, 2)


def test_tables_of_sentences_have_no_doubles():
    for kept, held in (VERB_PHRASES, ENDINGS, *SETTINGS.values(), *EVENTS.values()):
        assert len(set(kept + held)) == len(kept + held)
    assert "" in ENDINGS[0] and "What is?" in VERB_PHRASES[0]
    assert all(text[-1] in ".?" for texts in VERB_PHRASES for text in texts)
    for texts in (*SETTINGS.values(), *EVENTS.values()):
        assert all(("{a}" in t) != ("{b}" in t) for t in texts[0] + texts[1])
    assert all("{things}" in q for qs in PROBLEM_QUESTIONS.values() for q in qs)


def test_arithmetic_rewards():
    task = tasks.build("arithmetic", "test")
    example = task.example(0)
    a, op, b = example.answer
    value = example.answer.value

    def parts(content) -> tuple[float, ...]:
        rewards = task.rewards(example, content)
        assert list(rewards) == ["correct", "format", "tool"]
        return tuple(rewards.values())

    right = [*call(f"{a}{op}{b}", str(value)), said(f"It is {value}.")]
    assert parts(right) == (1, 1, 1)
    assert parts(f"It is {value}.") == (1, 0, 0)
    assert parts(f"It is {value}.00") == (1, 0, 0)
    assert parts([*right[:2], said(f"It is {value + 1}.")]) == (0, 1, 1)
    # an output that the tool did not give
    assert parts([*call("1+1", str(value)), said(f"It is {value}.")]) == (1, 1, 0)
    assert parts([*call("1+", "error"), said("It is -1.")]) == (0, 1, 0)
    assert parts(right[:2]) == (0, 0, 1)
    assert parts([*right[:2], *right]) == (1, 0, 1)
    assert parts("") == (0, 0, 0)


# --- spelling ---------------------------------------------------------------------------------------------------------


def test_words_of_the_test_are_unseen(words):
    words_in = {s: {e.answer for e in examples(f"spelling={words}", s, 500)} for s in ("train", "seen", "test")}
    assert words_in["seen"] == words_in["train"] and not words_in["test"] & words_in["train"]
    assert words_in["test"] | words_in["train"] == set(WORDS) and 2 <= len(words_in["test"]) <= 16
    for s in ("train", "test"):
        assert {e.answer.word for e in examples(f"spellingbee={words}", s, 500)} == words_in[s]
    fewer = words.with_name("fewer.txt")
    fewer.write_text("\n".join(WORDS[::2]))
    # pinned by the word
    assert {e.answer for e in examples(f"spelling={fewer}", "test", 100)} == words_in["test"] & set(WORDS[::2])


def test_every_word_comes_before_one_comes_again(words):
    n = len({e.answer for e in examples(f"spelling={words}", "train", 500)})
    counts = Counter(e.answer for e in examples(f"spelling={words}", "train", 3 * n))
    assert set(counts.values()) == {3}
    first = [e.answer for e in examples(f"spelling={words}", "train", 2 * n)]
    assert first[:n] != first[n:]


@pytest.mark.parametrize(
    ("reply", "correct", "format", "letters"),
    [
        ("tree: t r e e", 1, 1, 1),
        ("t, r, e, e.", 1, 1, 1),
        ("T-R-E-E", 1, 1, 1),
        ("The letters are: t r e e", 1, 1, 1),
        ("tree", 0, 0, 0),
        ("tree: tree", 0, 0, 0),
        ("tree: t r e", 0, 1, 0.75),
        ("tree: t r e e e", 0, 1, 0.8),
        ("tree: t r a e", 0, 1, 0.75),
        ("", 0, 0, 0),
        ("tree:", 0, 0, 0),
        ("tree: t r e 3", 0, 0, 0),
        ("It is t r e e", 0, 0, 0),
    ],
)
def test_spelling_is_compared_letter_by_letter(words, reply, correct, format, letters):
    task = tasks.build(f"spelling={words}", "train")
    example = task.example(0)._replace(answer="tree")
    assert task.rewards(example, reply) == {"correct": correct, "format": format, "letters": letters}


def test_counting(words):
    task = tasks.build(f"spellingbee={words}", "train", limit=500)
    for i in range(500):
        word, letter, n = task.example(i).answer
        question, reply = task.example(i).messages[0]["content"], task.example(i).messages[1]["content"]
        assert n == sum(c == letter for c in word)
        assert re.search(rf"\b{word}\b", question) and re.search(rf"\b{letter}\b", question)
        assert reply == [
            said(f"{word}: {' '.join(word)}\n"),
            *call(f"'{word}'.count('{letter}')", str(n)),
            said(f"It is {n}."),
        ]
    example = task.example(0)
    word, letter, n = example.answer
    right = example.messages[1]["content"]

    def parts(content) -> tuple[float, ...]:
        rewards = task.rewards(example, content)
        assert list(rewards) == ["correct", "format", "spelling", "call"]
        return tuple(rewards.values())

    assert parts(right) == (1, 1, 1, 1)
    assert parts(f"It is {n}") == (1, 0, 0, 0)
    assert parts([said(f"{word}: {word}"), *right[1:]]) == (1, 1, 0, 1)
    assert parts([right[0], *call(f"'{word}'.count('?')", "0"), said(f"It is {n + 1}.")]) == (0, 1, 1, 0)
    assert parts("") == (0, 0, 0, 0)


def test_the_baseline_of_counting_is_that_of_the_commonest_answer(words):
    for split in ("train", "seen", "test"):
        task = tasks.build(f"spellingbee={words}", split, limit=500)
        counts = Counter(task.example(i).answer.n for i in range(500))
        assert task.baseline == max(counts.values()) / 500 and 0.3 < task.baseline < 0.7
        assert set(counts) >= {0, 1, 2}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("tree\nice cream\n", ":2: 'ice cream' is not a word"), ("a1", ":1: 'a1' is not"), ("", "no word of")],
)
def test_word_lists_that_cannot_be(tmp_path, content, complaint):
    path = tmp_path / "w.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=complaint):
        tasks.build(f"spelling={path}", "train")
    with pytest.raises(UserError, match="is not a file.*try spelling=2000"):
        tasks.build("spelling=nowhere.txt", "train")


# --- identity ---------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def test_held_out_questions_are_unseen():
    asked = {
        split: {plain(q) for q in questions("identity", split, n)}
        for split, n in (("train", 8000), ("test", 500), ("name", 150))
    }
    assert not asked["train"] & (asked["test"] | asked["name"])
    assert {plain("Who are you?"), plain("What is your name?")} <= asked["train"]
    held = {plain(core) for topic in TOPICS for group in cores(topic, True, "nanolab") for core in group}
    kept = [plain(core) for topic in TOPICS for group in cores(topic, False, "nanolab") for core in group]
    assert len({*kept, *held}) == len(kept) + len(held), "a question twice"
    told = " / ".join(asked["train"])
    assert not [core for core in held if f" {core} " in f" {told} "], "inside a longer text of training"
    for text in asked["test"] | asked["name"]:
        assert any(f" {core} " in f" {text} " for core in held), text
    assert all(
        len(group) > len(rest)
        for topic in TOPICS
        for group, rest in zip(cores(topic, False, "x"), cores(topic, True, "x"))
    )
    assert all(group for topic in TOPICS for group in cores(topic, True, "x"))


def test_the_split_name_asks_many_different_questions_for_the_name():
    task = tasks.build("identity", "name")
    texts = [plain(task.example(i).messages[0]["content"]) for i in range(len(task))]
    assert len(texts) == len(set(texts)) >= 150 and questions("identity", "name", 5) == [
        task.example(i).messages[0]["content"] for i in range(5)
    ]
    held = [plain(core) for topic in ("name", "other") for group in cores(topic, True, "nanolab") for core in group]
    counts = Counter(max((core for core in held if core in text), key=len) for text in texts)
    assert len(counts) == len(held) >= 40 and set(counts.values()) <= {3, 4}
    assert sum(text in held for text in texts) == len(held), "each core once without opening and ending"
    for example in map(task.example, range(len(task))):
        assert (
            example.answer == ("nanolab",)
            and task.correct(example, example.messages[1]["content"])
            and task.correct(example, "i'm NANOLAB")
        )
        assert (
            not task.correct(example, "I am ChatGPT.")
            and not task.correct(example, "nanolabs")
            and not task.correct(example, "")
        )
        assert not task.correct(example, "I was made by the nanolab project."), "the name of the maker"
    assert task.correct(task.example(0), "I am nanolab, made by the nanolab project.")


def test_a_question_is_a_sentence_whatever_stands_around_it():
    for topic in TOPICS:
        for core in (core for held in (False, True) for group in cores(topic, held, "x") for core in group):
            assert re.fullmatch(r"[A-Z][^{}]*[.?]", core) and "  " not in core, core
    assert sentence("Excuse me,", "I forgot who you are.", " then") == "Excuse me, I forgot who you are then."
    assert sentence("One question:", "Who are you?", ", by the way") == "One question: who are you, by the way?"
    assert (
        sentence("Hi!", "Who are you?", "") == "Hi! Who are you?"
        and sentence("", "Is this Siri?", "") == "Is this Siri?"
    )
    assert (
        endings("Your name, please.") == [""]
        and " please" in endings("Say your name.")
        and " please" not in endings("I forgot who you are.")
    )


def test_nobody_is_asked_whether_it_is_itself(tmp_path):
    path = tmp_path / "me.toml"
    path.write_text((ROOT / "tasks/identity.toml").read_text().replace('name = "nanolab"', 'name = "Siri"'))
    asked = questions(f"identity={path}", "train", 3000)
    assert not [q for q in asked if "siri" in q.lower()] and [q for q in asked if "ChatGPT" in q]


def test_a_model_gets_the_name_of_its_file(tmp_path):
    path = tmp_path / "me.toml"
    path.write_text("\n".join(f'{field} = "{field.upper()} of Mira-7"' for field in FIELDS))
    task = tasks.build(f"identity={path}", "train")
    told = {text_of(task.example(i).messages[1]["content"]) for i in range(500)}
    assert not [reply for reply in told if "nanolab" in reply.lower() or "{" in reply]
    assert {field for field in FIELDS if any(f"{field.upper()} of Mira-7" in reply for reply in told)} == set(FIELDS)
    example = next(task.example(i) for i in range(99) if task.example(i).answer == ("NAME of Mira-7",))
    assert task.correct(example, "my name: name OF mira 7!") and task.rewards(example, "NAME of Mira-7") == {
        "correct": 1.0
    }
    assert not task.correct(example, "I am NAME of Mira-77") and not task.correct(example, "I am nanolab")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("name =", "nmae ="), "has the field 'nmae'.*did you mean name"),
        (('version = "0.1"', ""), "no field version"),
        (('version = "0.1"', "version = 0.1"), "version is 0.1; expected text"),
        (('name = "nanolab"', 'name = ""'), "name is ''"),
        (('name = "nanolab"', "name = nanolab"), "cannot be read as TOML .*line 2"),
    ],
)
def test_identities_that_cannot_be(tmp_path, change, complaint):
    text = (ROOT / "tasks/identity.toml").read_text()
    assert change[0] in text
    path = tmp_path / "me.toml"
    path.write_text(text.replace(*change))
    with pytest.raises(UserError, match=complaint) as error:
        tasks.build(f"identity={path}", "train")
    assert str(error.value).startswith(str(path))


# --- documentation ----------------------------------------------------------------------------------------------------

DOCUMENT = """Paths and what to do with them.

class Path

A path of a file system, e.g. of a disk. It can be joined.

Path.exists(follow)

Whether this path points to
something that exists. Links are followed.

Path._hidden(x)

Does what nobody outside needs to know about it.

short(x)

Too short.

code(x)

Calls ``x`` as often as it takes, which may be never.

join(a, b)
"""


def test_entries_of_a_document():
    assert list(entries_of(DOCUMENT)) == [
        Entry("the class Path", "A path of a file system, e.g. of a disk."),
        Entry("Path.exists", "Whether this path points to something that exists."),
    ]


def test_documentation_comes_from_the_corpus(base_dir):
    """A stand-in for the built corpus, in its own layout."""
    folder = base_dir / "corpora" / "pydocs"
    other = DOCUMENT.replace("Path", "Tree")
    files = {
        name: write_documents(folder / name, texts)
        for name, texts in {"shard_00000.parquet": [DOCUMENT], "val.parquet": [other]}.items()
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    train, test = (tasks.build("documentation", split) for split in ("train", "test"))
    assert len(train) == len(test) == 2
    asked = [train.example(i).messages for i in range(2)]
    assert {m[1]["content"] for m in asked} == {e.sentence for e in entries_of(DOCUMENT)}
    assert all("Path" in m[0]["content"] for m in asked) and "Tree" in test.example(0).messages[0]["content"]
    words = {e.answer for split in ("train", "test") for e in examples("spelling=40", split, 100)}
    assert (
        {"that", "system", "about"} <= words
        and "tree" not in words
        and all(3 <= len(w) <= 12 for w in words)
        and len(words) > 20
    )


# --- all --------------------------------------------------------------------------------------------------------------


def test_nothing_depends_on_the_process():
    code = (
        "import tasks; print([tasks.build(n, s).example(7).messages for n, s in (('arithmetic', 'train'), ('identity',"
        " 'test'))])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert (
        runs[0]
        == runs[1]
        == f"{[tasks.build(n, s).example(7).messages for n, s in (('arithmetic', 'train'), ('identity', 'test'))]}\n"
    )


@pytest.mark.parametrize("name", ["arithmetic", "spellingbee"])
def test_the_calculator_gives_the_outputs_of_the_references(words, name):
    """What a model learns to expect of the tool is what it gets."""
    for example in examples(f"{name}={words}" if name == "spellingbee" else name, "train", 500):
        parts = example.messages[1]["content"]
        calls = [(a["text"], b["text"]) for a, b in zip(parts, parts[1:]) if a["type"] == "python"]
        assert len(calls) == 1 and calculator(calls[0][0]) == calls[0][1]


@pytest.mark.parametrize(
    ("name", "longest"),
    [("arithmetic", 80), ("identity", 65), ("smalltalk", 60), ("spelling", 55), ("spellingbee", 85)],
)
def test_conversations_are_short(words, name, longest):
    """Even in a tokenizer of few merges many of them fit into a row of 256 tokens."""
    tok = Tokenizer.train(
        [
            (ROOT / "tasks" / file).read_text()
            for file in ("identity_sentences.toml", "sentences.py", "smalltalk.toml", "spelling.py")
        ],
        1000,
    )
    spec = f"{name}={words}" if name.startswith("spelling") else name
    lengths = [len(render(tok, example.messages).ids) for example in examples(spec, "train", 300)]
    assert 10 < min(lengths) and max(lengths) <= longest

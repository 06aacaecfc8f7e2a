"""Published datasets: rows of both layouts, grading of the reference and of wrong answers, malformed files, the real
ones.

Oracle: rows written by hand, the datasets' own sizes, Python itself on replies to a small problem, HumanEval's own
solutions."""

import gzip
import json
import re
import subprocess
import sys
import threading
import types
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import tasks
from nanolab.cli import UserError
from nanolab.data.chat import check_messages, text_of
from tasks.humaneval import code_of, program_of

REAL = Path(__file__).parents[2] / "../shared/data/eval"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data/eval")

BUNDLE = "eval_bundle/eval_data"
CHOICE = {"query": "Question: What is wet?", "choices": ["sand", "water", "iron"], "gold": 1}
ADD = {
    "task_id": "x/0",
    "entry_point": "add_twice",
    "prompt": 'import math\n\ndef twice(x):\n    return 2 * x\n\ndef add_twice(a, b):\n    """Both, doubled."""\n',
    "canonical_solution": "    return twice(a) + math.floor(twice(b))\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == twice(3)\n",
}
SUMS = {"question": "2 and 3, doubled?", "answer": "Both are 2+3=<<2+3=5>>5.\nTwice that is $<<5*2=10>>10.\n#### 1,000"}
ROWS = {  # spec -> split, file, rows
    "arc-easy": ("test", f"{BUNDLE}/world_knowledge/arc_easy.jsonl", [CHOICE]),
    "arc-challenge": ("test", f"{BUNDLE}/world_knowledge/arc_challenge.jsonl", [CHOICE]),
    "hellaswag": (
        "test",
        f"{BUNDLE}/language_understanding/hellaswag.jsonl",
        [CHOICE | {"query": "Bath: [header] A man steps in. He"}],
    ),
    "mmlu": (
        "test",
        "mmlu/test.jsonl.gz",
        [{"subject": "high_school_physics", "question": "What is wet?", "choices": ["a", "b", "c", "d"], "answer": 3}],
    ),
    "gsm8k": ("train", "gsm8k/train.jsonl", [SUMS]),
    "humaneval": ("test", "humaneval/HumanEval.jsonl", [ADD]),
    "smoltalk": (
        "test",
        "smoltalk/test.jsonl",
        [[{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]],
    ),
}


def write(folder: Path, name: str, lines: list[str]) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.fixture
def local(tmp_path):
    """A function spec -> task, on a folder with one row of each dataset."""
    for _, name, rows in ROWS.values():
        write(tmp_path, name, [json.dumps(row) for row in rows])
    return lambda spec: tasks.build(spec, ROWS[spec][0], str(tmp_path))


def test_multiple_choice_from_a_local_file(local):
    assert (
        local("arc-easy").example(0).messages[0]["content"]
        == "Choose the right answer to this science question.\n\nWhat is wet?\n- sand (A)\n- water (B)\n- iron"
        " (C)\n\nReply with the letter alone."
    )
    assert "about high school physics." in local("mmlu").example(0).messages[0]["content"]
    assert "Bath: A man steps in. He\n" in local("hellaswag").example(0).messages[0]["content"]
    for name, letter in (("arc-easy", "B"), ("arc-challenge", "B"), ("mmlu", "D"), ("hellaswag", "B")):
        task = local(name)
        example = task.example(0)
        assert (example.answer, len(task)) == (letter, 1) and letter in example.letters
        assert task.correct(example, letter) and task.rewards(example, letter) == {"correct": 1.0}
        assert not task.correct(example, "A") and not task.correct(example, "")


def test_gsm8k_marks_become_tool_calls(local):
    task = local("gsm8k")
    example = task.example(0)
    assert example.messages[0]["content"] == SUMS["question"]
    assert example.messages[1]["content"] == [
        {"type": "text", "text": "Both are 2+3="},
        {"type": "python", "text": "2+3"},
        {"type": "python_output", "text": "5"},
        {"type": "text", "text": "5.\nTwice that is $"},
        {"type": "python", "text": "5*2"},
        {"type": "python_output", "text": "10"},
        {"type": "text", "text": "10.\n#### 1,000"},
    ]
    assert example.answer == Fraction(1000)
    assert task.rewards(example, example.messages[1]["content"]) == {"correct": 1.0, "format": 1.0}
    assert task.rewards(example, "It is $1,000.0") == {"correct": 1.0, "format": 0.0}
    assert task.rewards(example, "#### 999") == {"correct": 0.0, "format": 1.0}
    assert task.rewards(example, "#### 1000\n#### some") == {"correct": 1.0, "format": 0.0}


REPLIES = [  # (reply, defines or continues the function rightly)
    ("```python\nimport math\ndef add_twice(a, b):\n    return 2 * a + 2 * b\n```", True),
    (
        "Here:\n```\ndef add_twice(a, b):\n    return twice(a) + math.floor(twice(b))\n```\nand ```x```",
        True,
    ),  # helper and import of the prompt
    ("def add_twice(a, b):\n    return twice(a + b)", True),
    ("    return twice(a + b)\n", True),  # the rest of the prompt's function
    ("add_twice = lambda a, b: twice(a + b)", True),
    ("```python\ndef add_twice(a, b):\n    return twice(a + b)", True),  # cut off before the end of the block
    ("```python\ndef add_twice(a, b):\n    return a + b\n```", False),
    ("```python\ndef other(a, b):\n    return twice(a + b)\n```", False),
    ("I do not know.", False),
    ("", False),
]


@pytest.mark.parametrize(("reply", "right"), REPLIES)
def test_humaneval_programs(local, reply, right):
    """Without the sandbox: the same program and checks, run by Python itself."""
    problem = local("humaneval").example(0).answer
    done = subprocess.run(
        [sys.executable, "-c", program_of(problem, reply) + problem.checks + "\nprint('done')"],
        capture_output=True,
        text=True,
    )
    assert (done.stdout == "done\n") == right, done.stderr


def test_humaneval_grades_in_the_sandbox(local):
    task = local("humaneval")
    example = task.example(0)
    assert task.rewards(example, example.messages[-1]["content"]) == {"correct": 1.0, "format": 1.0}
    assert task.rewards(example, "    return 0\n") == {"correct": 0.0, "format": 0.0}
    assert task.rewards(example, "def add_twice(a, b):\n    raise SystemExit(0)")["correct"] == 0.0
    cheat = "def twice(x):\n    return 0\n\ndef add_twice(a, b):\n    return 0\n"
    assert task.rewards(example, cheat)["correct"] == 0.0, "the checks must use the prompt's helper, not the reply's"


def test_the_first_block_counts():
    assert code_of("a\n```py\nx = 1\n```\n```\ny\n```") == "x = 1\n"
    assert code_of("  ```python\nx\n  ```") == "x\n"
    assert code_of("x = '```'") == "x = '```'"


def test_smoltalk_keeps_the_system_message(local):
    assert local("smoltalk").example(0).messages == ROWS["smoltalk"][2][0]


HUB = {  # the same examples in the hub's layout
    "arc-easy": (
        "ARC-Easy",
        "test",
        {
            "id": "1",
            "question": "What is wet?",
            "choices": {"text": CHOICE["choices"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
    ),
    "arc-challenge": (
        "ARC-Challenge",
        "test",
        {
            "question": "What is wet?",
            "choices": {"text": CHOICE["choices"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
    ),
    "hellaswag": (
        None,
        "validation",
        {"activity_label": "Bath", "ctx": "A man steps in. He", "endings": CHOICE["choices"], "label": "1"},
    ),
    "mmlu": ("all", "test", ROWS["mmlu"][2][0]),
    "gsm8k": ("main", "train", SUMS),
    "humaneval": (None, "test", ADD),
    "smoltalk": (None, "test", {"messages": ROWS["smoltalk"][2][0], "source": "x"}),
}


@pytest.mark.parametrize("spec", HUB)
def test_the_hub_gives_the_same_examples(local, monkeypatch, spec):
    subset, split, row = HUB[spec]
    asked = {}

    def load_dataset(repo, name, *, split, revision):
        asked.update(repo=repo, name=name, split=split, revision=revision)
        return [row]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # no hub to ask for the newest revision
    task = tasks.build(spec, ROWS[spec][0])
    assert task.example(0) == local(spec).example(0)
    assert (asked["name"], asked["split"]) == (subset, split)
    assert spec == "smoltalk" or re.fullmatch("[0-9a-f]{40}", asked["revision"])


@pytest.mark.fault("outer D21")
def test_the_newest_revision_is_asked_for_once_kept_and_said(monkeypatch, base_dir):
    """Of a dataset without one in the code; the hub is a server of this machine's."""
    asked, commits = [], iter(["a" * 40, "b" * 40])

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"id": "HuggingFaceTB/smol-smoltalk", "sha": next(commits)}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Says nothing."""

    row = HUB["smoltalk"][2]
    monkeypatch.setitem(
        sys.modules,
        "datasets",
        types.SimpleNamespace(load_dataset=lambda repo, name, *, split, revision: asked.append(revision) or [row]),
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        built = [tasks.build("smoltalk", "train") for _ in range(2)]
        server.shutdown()
    assert asked == ["a" * 40] * 2 and json.loads((base_dir / "revisions.json").read_text()) == {
        "HuggingFaceTB/smol-smoltalk": "a" * 40
    }
    assert all(any("a" * 40 in note for note in task.notes) for task in built)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match="openai/gsm8k could not be read from the hub \\(no route\\).*--data"):
        tasks.build("gsm8k", "test")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="bash runs/setup.sh tasks"):
        tasks.build("gsm8k", "test")


@pytest.mark.parametrize(
    ("spec", "line", "complaint"),
    [
        ("gsm8k", "{", "not JSON"),
        ("gsm8k", "[1]", "a list; expected an object"),
        ("gsm8k", '{"question": "q"}', "no field answer \\(there are: question\\)"),
        ("gsm8k", '{"question": "q", "answer": "no mark 7"}', "ends in 'no mark 7'"),
        ("gsm8k", '{"question": "q", "answer": "#### seven"}', "expected '#### ' and a number"),
        ("arc-easy", '{"query": "q", "choices": ["a", "b"], "gold": 2}', "gold is 2; expected the number"),
        (
            "arc-easy",
            '{"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"}',
            "'C' is not among the labels",
        ),
        ("arc-easy", '{"question": "q", "choices": {"text": ["a", "b"]}, "answerKey": "C"}', "no field label"),
        ("hellaswag", '{"activity_label": "x", "ctx": "y", "endings": ["a", "b"], "label": ""}', "the label ''"),
        (
            "mmlu",
            '{"subject": "s", "question": "q", "choices": "abcd", "answer": 1}',
            "field choices is a str; expected a list",
        ),
        ("mmlu", '{"subject": "s", "question": "q", "choices": ["a", "b"], "answer": true}', "field answer is a bool"),
        ("humaneval", '{"prompt": "p", "entry_point": 3}', "field entry_point is a int"),
        ("smoltalk", '[{"role": "user", "content": "q"}]', "no assistant turn"),
    ],
)
def test_a_malformed_file_names_file_and_line(tmp_path, spec, line, complaint):
    split, name, rows = ROWS[spec]
    path = write(tmp_path, name, [json.dumps(rows[0]), "", line])
    with pytest.raises(UserError, match=complaint) as error:
        tasks.build(spec, split, str(tmp_path))
    assert str(error.value).startswith(f"{path}:3: ")


def test_a_folder_without_the_split(local, tmp_path):
    with pytest.raises(UserError, match="no file for split dev of mmlu.*there are: test"):
        tasks.build("mmlu", "dev", str(tmp_path))
    with pytest.raises(UserError, match="no file for split train of arc-easy.*expected another split"):
        tasks.build("arc-easy", "train", str(tmp_path))


# --- the real data ----------------------------------------------------------------------------------------------------

SIZES = {
    ("gsm8k", "train"): 7473,
    ("gsm8k", "test"): 1319,
    ("humaneval", "test"): 164,
    ("mmlu", "test"): 14042,
    ("mmlu", "dev"): 285,
    ("arc-easy", "test"): 2376,
    ("arc-challenge", "test"): 1172,
    ("hellaswag", "test"): 10042,
}


@real
@pytest.mark.parametrize(("spec", "split"), SIZES)
def test_real_data(spec, split):
    task = tasks.build(spec, split, str(REAL))
    assert len(task) == SIZES[spec, split]
    shown = set()
    for i in range(min(len(task), 300)):
        example = task.example(i)
        check_messages(example.messages)
        reply = example.messages[-1]["content"]
        shown.add(example.messages[0]["content"])
        if spec == "humaneval":
            assert example.answer.name in code_of(reply)
            continue
        assert task.correct(example, reply)
        wrong = "#### 123456.5" if spec == "gsm8k" else next(x for x in example.letters if x != example.answer)
        assert not task.correct(example, wrong)
    assert len(shown) >= 0.99 * min(len(task), 300)
    if task.kind == "letters":
        letters = [task.example(i).answer for i in range(len(task))]
        # no letter is a much better guess
        assert max(letters.count(x) for x in "ABCD") / len(letters) < task.baseline + 0.04


@real
def test_every_gsm8k_answer_is_a_number_and_every_mark_a_call():
    for split in ("train", "test"):
        task = tasks.build("gsm8k", split, str(REAL))
        for i in range(len(task)):
            example = task.example(i)
            reply = example.messages[-1]["content"]
            assert task.rewards(example, reply) == {"correct": 1.0, "format": 1.0}
            assert "<<" not in text_of(reply) and ">>" not in text_of(reply)


@real
@pytest.mark.slow
def test_humaneval_solutions_pass_and_stubs_fail():
    task = tasks.build("humaneval", "test", str(REAL))
    for i in range(len(task)):
        example = task.example(i)
        assert task.correct(example, example.messages[-1]["content"]), example.answer.name
        assert not task.correct(example, f"def {example.answer.name}(*args):\n    return None"), example.answer.name

"""chat_eval on a model that has learned some answers by heart, so that its scores are known."""

import json
from pathlib import Path

import pytest
import torch

from nanolab.cli import UserError, to_json
from nanolab.data.chat import parts_of, render
from nanolab.data.tokenizer import Tokenizer
from nanolab.evals.config import ChatEvalConfig
from nanolab.evals.score import wilson
from nanolab.lab.evaluate_chat import chatcore_of, powers
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.records import checkpoint
from nanolab.runtime import Runtime
from scripts.chat_eval import run
from tasks import TASKS, build

RUNTIME = Runtime(torch.device("cpu"), torch.float32)
SUMS = [
    {"question": f"{a} and {b}?", "answer": f"<<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"}
    for a, b in ((1, 2), (10, 7), (30, 5), (4, 4))
]
SCIENCE = [
    {"query": "Question: hot?", "choices": ["ice", "fire"], "gold": 1},
    {"query": "Question: wet?", "choices": ["rain", "dust", "sun"], "gold": 0},
    {"query": "Question: far?", "choices": ["here", "near", "Mars"], "gold": 2},
]


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> tuple[Path, GPT, Tokenizer]:
    """(data folder, model, tokenizer): the model knows the science answers and the first three sums, and takes the
    fourth for the third.
    """
    data = tmp_path_factory.mktemp("eval")
    for name, rows in {
        "gsm8k/test.jsonl": SUMS,
        "eval_bundle/eval_data/world_knowledge/arc_easy.jsonl": SCIENCE,
    }.items():
        (data / name).parent.mkdir(parents=True)
        (data / name).write_text("\n".join(json.dumps(row) for row in rows))
    tasks = [build(name, "test", str(data)) for name in ("gsm8k", "arc-easy")]
    chats = [task.example(i).messages for task in tasks for i in range(len(task))]
    text = "".join(str(messages) for messages in chats)
    tokenizer = Tokenizer.train([text, text], 400)
    wrong = next(m for m in chats if m[0]["content"] == "4 and 4?")
    wrong[-1] = {"role": "assistant", "content": "35\n#### 35"}
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=128, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=64))
    model.init_weights(0)
    rendered = [render(tokenizer, messages) for messages in chats]
    T = max(len(ids) for ids, _ in rendered)
    assert T <= 128
    x, y = torch.zeros(len(chats), T - 1, dtype=torch.int64), torch.full((len(chats), T - 1), -1)
    for row, (ids, mask) in enumerate(rendered):
        x[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        y[row, : len(ids) - 1] = torch.tensor([i if m else -1 for i, m in zip(ids[1:], mask[1:])])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    return data, model, tokenizer


@pytest.fixture
def world(learned, base_dir, monkeypatch):
    """A function (**flags) -> None that evaluates the finished run "clever"; its `.dir` is the run's."""
    monkeypatch.setenv("NANOLAB_DTYPE", "float32")
    data, model, tokenizer = learned
    run_dir = base_dir / "runs" / "clever"

    def save(step: int, kind: str = "sft") -> None:
        meta = {"model_config": to_json(model.config), "tokenizer_hash": tokenizer.hash, "kind": kind}
        checkpoint.save(
            run_dir / "checkpoints", step, weights=dict(model.state_dict()), optimizer=None, meta=meta, runtime=RUNTIME
        )

    def evaluate(**flags) -> dict:
        assert run(ChatEvalConfig(device_type="cpu", **{"data": str(data), "max_tokens": 24} | flags)) == 0
        return json.loads((run_dir / "eval_chat.json").read_text())

    save(9)
    tokenizer.save(run_dir / "tokenizer")
    (run_dir / "result.json").write_text("{}")
    evaluate.dir, evaluate.save = run_dir, save
    return evaluate


@pytest.mark.slow
def test_accuracies_are_those_of_what_was_learned(world, capsys):
    result = world(tasks="gsm8k,arc-easy", json=True)
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == result and (result["model"], result["step"], result["kind"]) == (
        "clever",
        9,
        "sft",
    )
    sums, science = result["tasks"]["gsm8k"], result["tasks"]["arc-easy"]
    assert (sums["n"], sums["accuracy"], science["n"], science["accuracy"]) == (4, 0.75, 3, 1.0)
    assert (sums["interval"], science["interval"]) == (list(wilson(0.75, 4)), list(wilson(1.0, 3)))
    assert (sums["too_long"], sums["cut"], sums["replies"], science["baseline"]) == (0, 0, 4, 0.25)
    by_question = {e["question"]: e for e in sums["examples"]}
    known, wrong = by_question["10 and 7?"], by_question["4 and 4?"]
    assert known["correct"] and known["reply"] == "[calculator: 10+7 = 17] 17\n#### 17" == known["reference"]
    assert not wrong["correct"] and wrong["reply"] == "35\n#### 35" and "8" in wrong["reference"]
    assert sums["outcomes"] == [
        float(by_question[q]["correct"]) for q in sorted(by_question, key=lambda q: by_question[q]["index"])
    ]
    assert sorted(sums["outcomes"]) == [0, 1, 1, 1] and science["outcomes"] == [1, 1, 1]
    assert (sums["called"], science["called"]) == (0.75, 0.0)
    assert result["chatcore"]["label"] == "ChatCORE-2 of 6" and result["chatcore"]["value"] == pytest.approx(
        (0.75 + 1.0) / 2
    )
    assert result["chatcore"]["lacks"] == ["arc-challenge", "mmlu", "humaneval", "spellingbee"]
    assert "ChatCORE-2 of 6" in out and "without arc-challenge, mmlu, humaneval, spellingbee" in out
    row = next(line for line in out.splitlines() if line.startswith("  gsm8k"))
    assert row.split()[:8] == ["gsm8k", "4", "0.7500", "0.3006", "to", "0.9544", "0.00", "0.7500"]


@pytest.mark.fault("outer D16")
def test_gsm8k_has_both_extracts(world, monkeypatch, capsys):
    """The same replies without their mark: the flexible figure stays, the strict one falls to nothing."""
    from tasks.gsm8k import GSM8K

    found = world(tasks="gsm8k")["tasks"]["gsm8k"]
    assert (found["accuracy"], found["strict"]["accuracy"], found["strict"]["interval"]) == (
        0.75,
        0.75,
        list(wilson(0.75, 4)),
    )
    real = GSM8K.strict
    monkeypatch.setattr(
        GSM8K,
        "strict",
        lambda self, example, content: real(
            self, example, "".join(p["text"] for p in parts_of(content)).replace("####", "")
        ),
    )
    capsys.readouterr()
    found = world(tasks="gsm8k")["tasks"]["gsm8k"]
    assert (found["accuracy"], found["strict"]["accuracy"], found["strict"]["outcomes"]) == (0.75, 0.0, [0.0] * 4)
    lines = [
        line for line in capsys.readouterr().out.splitlines() if "flexible extract" in line or "strict extract" in line
    ]
    assert "flexible" in lines[0] and "0.7500" in lines[0] and "strict" in lines[1] and "0.0000" in lines[1]


def test_without_a_tool_calls_stay_unanswered(world):
    example, *_ = [
        e for e in world(tasks="gsm8k", tool="")["tasks"]["gsm8k"]["examples"] if e["question"] == "10 and 7?"
    ]
    assert example["reply"].startswith("[python: 10+7]") and "= 17" not in example["reply"]


def test_by_default_all_tasks_whose_data_is_there_are_run_and_the_others_named(world, capsys, monkeypatch):
    for name in ("spelling", "spellingbee", "documentation"):  # they would build the corpus
        monkeypatch.delitem(TASKS, name)
    result = world(max_problems=1, max_tokens=4)
    assert {"gsm8k", "arc-easy", "arithmetic", "identity"} <= set(result["tasks"])
    assert set(result["missing"]) == {"arc-challenge", "mmlu", "hellaswag", "humaneval"}
    assert all(row["n"] == 1 for row in result["tasks"].values())
    assert not {"smoltalk", "jsonl"} & (set(result["tasks"]) | set(result["missing"]))  # plain chat has no answers
    out = capsys.readouterr().out
    assert "missing: mmlu: no file for split test of mmlu under" in out and "ChatCORE-2 of 6" in out


def test_a_random_subset_is_the_same_for_every_model_and_another_with_another_seed(world):
    def questions(**flags) -> list[str]:
        return [e["question"] for e in world(tasks="gsm8k", max_problems=2, **flags)["tasks"]["gsm8k"]["examples"]]

    first = questions()
    assert len(first) == 2 and first == questions(temperature=1.0, top_k=0)
    assert any(set(questions(seed=s)) != set(first) for s in range(1, 5))


@pytest.mark.fault("N2")
def test_no_evaluation_is_lost(world):
    """Other tasks, other settings, other steps: all are kept, and what is measured again the same way is there once."""
    sums = world(tasks="gsm8k")["tasks"]["gsm8k"]
    both = world(tasks="arc-easy")
    assert both["tasks"]["gsm8k"] == sums and both["chatcore"]["label"] == "ChatCORE-2 of 6"
    other = world(tasks="arc-easy", seed=1)
    assert (
        set(other["tasks"]) == {"arc-easy", "gsm8k"} and other["tasks"]["gsm8k"] == sums and other["chatcore"] is None
    ), "not a mean over what was asked otherwise"
    assert other["tasks"]["arc-easy"]["settings"]["seed"] == 1 and [
        (row["spec"], row["settings"]["seed"]) for row in other["earlier"]
    ] == [("arc-easy", 42)]
    again = world(tasks="arc-easy", seed=1)
    assert len(again["earlier"]) == 1 and set(again["tasks"]) == set(other["tasks"])
    world.save(10)
    later = world(tasks="gsm8k", max_problems=2)
    assert set(later["tasks"]) == {"gsm8k"} and later["step"] == 10
    assert sorted((row["step"], row["spec"], row["n"]) for row in later["earlier"]) == [
        (9, "arc-easy", 3),
        (9, "arc-easy", 3),
        (9, "gsm8k", 4),
    ]
    back = world(model="clever@9", tasks="arc-easy")
    assert (back["step"], set(back["tasks"])) == (9, {"arc-easy", "gsm8k"}) and [
        (row["step"], row["n"]) for row in back["earlier"]
    ] == [(10, 2), (9, 3)]


@pytest.mark.fault("N2")
def test_what_was_measured_before_an_end_is_kept(world, monkeypatch):
    original = TASKS["arc-easy"].correct
    monkeypatch.setattr(TASKS["arc-easy"], "correct", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world(tasks="gsm8k,arc-easy")
    monkeypatch.setattr(TASKS["arc-easy"], "correct", original)
    path = world.dir / "eval_chat.json"
    assert path.exists() and json.loads(path.read_text())["tasks"]["gsm8k"]["accuracy"] == 0.75


@pytest.mark.fault("N3")
def test_the_table_says_what_a_number_measures_where_it_is_not_the_answer(world, capsys):
    result = world(tasks="smalltalk,gsm8k", max_problems=2, max_tokens=4)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert "no tool called" in lines["smalltalk"] and "no tool called" not in lines["gsm8k"]
    assert "no tool called" in result["tasks"]["smalltalk"]["measures"]


def of_file(folder: Path, n: int) -> Path:
    path = folder / "chats.jsonl"
    path.write_text(
        "".join(
            json.dumps([{"role": "user", "content": f"{i} and {i}?"}, {"role": "assistant", "content": str(2 * i)}])
            + "\n"
            for i in range(n)
        )
    )
    return path


@pytest.mark.fault("N4")
def test_conversations_without_answers_give_a_loss(world, learned, tmp_path, capsys):
    """One of them alone is compared with the model's own loss; tests/training/test_chat_sft.py compares many with what
    fine-tuning measured.
    """
    _, model, tokenizer = learned
    path = of_file(tmp_path, 60)
    (chat,) = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines()[:1]]
    (tmp_path / "one.jsonl").write_text(json.dumps(chat))
    ids, mask = render(tokenizer, chat)
    targets = torch.tensor([i if trained else -1 for i, trained in zip(ids[1:], mask[1:])])
    with torch.no_grad():
        loss = float(
            torch.nn.functional.cross_entropy(model(torch.tensor([ids[:-1]]))[0].float(), targets, ignore_index=-1)
        )
    one = world(tasks=f"jsonl={tmp_path / 'one.jsonl'}:all")["tasks"][f"jsonl={tmp_path / 'one.jsonl'}:all"]
    assert (one["n"], one["tokens"], one["interval"]) == (1, sum(mask), None) and one["loss"] == pytest.approx(
        loss, rel=1e-5
    )
    row = world(tasks=f"jsonl={path}:all,gsm8k")["tasks"][f"jsonl={path}:all"]
    assert row["n"] == 60 and row["interval"][0] < row["loss"] < row["interval"][1] and "accuracy" not in row
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"  jsonl={path}"))
    assert f"{row['loss']:.4f}" in line and f"n = {row['tokens']:,}" in line
    held_out = world(tasks=f"jsonl={path}", max_problems=2)["tasks"][f"jsonl={path}"]
    assert held_out["n"] == 2 and held_out["split"] == "test"


def test_more_samples_give_pass_at_k_and_splits_have_names(world, capsys):
    result = world(tasks="gsm8k,arithmetic@3:phrasings", num_samples=5, temperature=1.5, top_k=0, max_tokens=9)
    sums = result["tasks"]["gsm8k"]
    assert list(sums["pass_at"]) == ["1", "2", "3", "4", "5"] == list(sums["intervals"])
    assert list(sums["pass_at"].values()) == sorted(sums["pass_at"].values()) and (sums["k"], sums["replies"]) == (
        5,
        20,
    )
    assert sums["pass_at"]["1"] == sums["accuracy"]
    assert len(sums["outcomes"]) == 4 and sum(sums["outcomes"]) / 4 == pytest.approx(sums["accuracy"])
    assert {5 * share % 1 for share in sums["outcomes"]} == {0}
    row = result["tasks"]["arithmetic@3:phrasings"]
    assert (row["task"], row["split"], row["n"]) == ("arithmetic", "phrasings", 3)
    out = capsys.readouterr().out
    assert "  pass@2" in out and "  pass@4" in out and "  pass@5" in out and "  pass@3" not in out
    assert result["chatcore"] is None  # one of its tasks is no mean


def test_chatcore_counts_the_test_split_alone():
    row = {"task": "gsm8k", "split": "test", "baseline": 0.0, "accuracy": 0.2, "interval": [0.1, 0.4]}
    other, trained_on = (
        {**row, "task": "mmlu", "baseline": 0.25},
        {**row, "split": "train", "accuracy": 0.9, "interval": [0.8, 1.0]},
    )
    assert chatcore_of({"gsm8k": row, "mmlu": other, "gsm8k:train": trained_on}) == chatcore_of(
        {"gsm8k": row, "mmlu": other}
    )
    assert chatcore_of({"gsm8k:train": trained_on, "mmlu": other}) is None


@pytest.mark.parametrize("k, shown", [(1, []), (2, [2]), (3, [2, 3]), (8, [2, 4, 8]), (9, [2, 4, 8, 9])])
def test_which_pass_at_k_are_printed(k, shown):
    assert powers(k) == shown


def test_a_base_model_is_evaluated_with_a_note(world, capsys):
    world.save(11, "base")
    assert world(tasks="arc-easy")["kind"] == "base"
    assert "note: this is a base model" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(tasks="gsm9k"), "task 'gsm9k' is unknown.*did you mean gsm8k"),
        (dict(tasks="mmlu"), "no file for split test of mmlu"),
        (dict(tasks="gsm8k:phrasings"), "task gsm8k has no split 'phrasings'"),
        (dict(tasks="gsm8k", num_samples=2), "2 replies to a problem at temperature 0"),
        (dict(tasks="gsm8k", max_problems=0), "no problem to evaluate"),
        (dict(tasks="gsm8k", tool="abacus"), "tool 'abacus' is unknown"),
        (dict(tasks="gsm8k", temperature=-1.0), "temperature is -1"),
    ],
)
def test_what_cannot_be_done_is_refused(world, flags, said):
    with pytest.raises(UserError, match=said):
        world(**flags)
    assert not (world.dir / "eval_chat.json").exists()


@pytest.mark.fault("F20")
def test_a_split_follows_a_file_with_a_colon_in_its_name(tmp_path):
    """Of the tasks that come from a file only identity and jsonl had one then; neither is graded, but both open."""
    path = tmp_path / "a:b.jsonl"
    path.write_text(
        "".join(f'[{{"role":"user","content":"q{i}"}},{{"role":"assistant","content":"a"}}]\n' for i in range(9))
    )
    from nanolab.lab.evaluate_chat import open_tasks

    tasks, _ = open_tasks(ChatEvalConfig(tasks=f"jsonl={path}:all,arithmetic@9:train,arithmetic"))
    assert [(task.name, task.split, len(task)) for task in list(tasks.values())[:2]] == [
        ("jsonl", "all", 9),
        ("arithmetic", "train", 9),
    ]
    assert list(tasks.values())[2].split == "test"

"""scripts.chat_sft from end to end on a tiny model: what it writes and says, stages, mistakes, kill -9 and --resume.

Run as a script this file forks a fine-tuning, kills it at some steps, lets it go on, and compares it with one left
alone."""

import hashlib
import importlib.util
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import warm

from nanolab.cli import UserError
from nanolab.data.chat import parse_reply, render_prompt, text_of
from nanolab.data.conversations import held_out_rows
from nanolab.data.survey import Reader
from nanolab.evals.config import ChatEvalConfig
from nanolab.model import gpt
from nanolab.records import checkpoint
from nanolab.records.models import find_model, load_model, read_json, read_metrics, runs_dir
from nanolab.runtime import Runtime, base_dir
from nanolab.stages.config import SFTConfig
from nanolab.stages.sft import sft
from nanolab.stages.sft_plan import SFTPlan
from scripts import chat_eval, chat_sft
from tasks import build

spec = importlib.util.spec_from_file_location("nanolab_tests_pretrained", Path(__file__).with_name("pretrained.py"))
pretrained = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrained)

ALONE = Runtime(torch.device("cpu"), torch.float32)
QUESTIONS = [
    "who is it",
    "what is grapes",
    "plus four",
    "three times",
    "is it sour",
    "said the fox",
    "a crow",
    "cheese",
    "at all",
    "that was hers",
]
ANSWERS = [
    "the fox",
    "sweet and sour",
    "four and four",
    "it is three",
    "not at all",
    "a crow",
    "and cheese",
    "took it",
    "all of it",
    "it was not hers",
]


def write_chats(path: Path, n: int = 10, answer=lambda i: ANSWERS[i % 10], question=lambda i: QUESTIONS[i % 10]) -> str:
    chats = [[{"role": "user", "content": question(i)}, {"role": "assistant", "content": answer(i)}] for i in range(n)]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return f"jsonl={path}"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A base directory with the base model b and files of conversations."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("sft")
        prepare(folder, patch.setenv)
        yield folder


def prepare(folder: Path, setenv=os.environ.__setitem__) -> None:
    setenv("NANOLAB_BASE_DIR", str(folder))
    setenv("NANOLAB_DTYPE", "float32")
    torch.set_num_threads(1)
    pretrained.pretrain("b", pretrained.write_text(folder / "text"), ALONE, resid_dropout=0.1)
    write_chats(folder / "ten.jsonl")
    rng = random.Random(1)
    draw = lambda *lengths: " ".join(rng.choices(pretrained.WORDS, k=rng.choice(lengths)))  # noqa: E731
    write_chats(folder / "many.jsonl", 80, lambda i: draw(2, 8, 30), lambda i: f"{draw(2)} {i}")


@pytest.fixture(autouse=True)
def base_dir_of_the_file(prepared, monkeypatch):
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(prepared))
    monkeypatch.setenv("NANOLAB_DTYPE", "float32")


def tune(run: str, **flags) -> dict:
    """Fine-tune b; its result.json."""
    cfg = {
        "model": "b",
        "run": run,
        "tasks": f"jsonl={base_dir() / 'many.jsonl'}",
        "device_type": "cpu",
        "eval_every": -1,
        "log_every": -1,
    } | flags
    assert chat_sft.run(SFTConfig(**cfg)) == 0
    path = runs_dir() / run / "result.json"
    return read_json(path) if path.exists() else {}


def words_of(text: str, pattern: str) -> list[str]:
    found = re.search(pattern, text)
    assert found, text
    return [group.replace(",", "") for group in found.groups()]


# --- one run ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_plan_comes_first_and_is_kept(capsys):
    result = tune("one", replay=0.2, eval_every=5, eval_tokens=500, log_every=1, max_seq_len=48, epochs=2)
    said = capsys.readouterr().out
    plan, _, after = said.partition("step 00000")
    kept, tokens, cropped, dropped = words_of(
        plan,
        r"([\d,]+) conversations of jsonl=.*: ([\d,]+) tokens, .*; ([\d,]+) cropped after a whole turn, ([\d,]+)"
        r" left out",
    )
    assert int(kept) + int(dropped) == len(build(f"jsonl={base_dir() / 'many.jsonl'}", "train")) < 80
    assert int(dropped) > 0 == int(cropped), "of a single turn nothing is left when it is cropped"
    rows, padding, steps, epochs = words_of(
        plan,
        r"an epoch is ([\d,]+) rows of 48 tokens \(([\d.]+)% padding\), 20% of all rows are text; (\d+) steps are"
        r" ([\d.]+) epochs",
    )
    assert float(padding) == pytest.approx(100 * (1 - int(tokens) / (int(rows) * 49)), abs=0.06)
    assert int(steps) == pytest.approx(2 * int(rows) / 0.8 / (576 / 48), abs=1.5), (
        "two epochs and the rows of text; 512 is rounded to three times 4 rows of 48"
    )
    assert float(epochs) == 2.0 and result["step"] == int(steps) and f"/{int(steps):05d} " in after
    assert said.count("cropped after a whole turn") == 2 and said.rstrip().endswith("epochs"), (
        "and at the end once more"
    )
    assert {"val/loss", "val/bpb"} <= result.keys() and result["kind"] == "sft"
    evaluated = [row["step"] for row in read_metrics(runs_dir() / "one") if "val/loss" in row]
    assert evaluated == sorted({*range(0, int(steps), 5), int(steps)})


def test_activation_checkpointing_changes_no_bit_and_no_count_of_flops(monkeypatch):
    """Of fine-tuning with dropout, and of the run resumed without it; the model's config does not hold it."""
    again = Mock(wraps=gpt.checkpoint)
    monkeypatch.setattr(gpt, "checkpoint", again)
    plain = tune("remembered", num_iterations=2)
    assert not again.called
    recomputed = tune("recomputed", num_iterations=2, activation_checkpointing=True)
    assert again.call_count % 2 == 0 < again.call_count, "each of the two layers"
    same = "step", "tokens", "train/loss", "total_training_flops"
    assert [plain[key] for key in same] == [recomputed[key] for key in same]
    one, two = (find_model(name).checkpoint for name in ("remembered", "recomputed"))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert (one / "optim_rank0.safetensors").read_bytes() == (two / "optim_rank0.safetensors").read_bytes()
    assert checkpoint.load_meta(one)["model_config"] == checkpoint.load_meta(two)["model_config"]
    (runs_dir() / "recomputed" / "result.json").unlink()
    tune("recomputed", num_iterations=2, resume=True)


@pytest.mark.slow
def test_the_model_is_the_one_it_started_from_but_for_its_weights(capsys):
    tune("kept", max_seq_len=48, num_iterations=3)
    before, after = find_model("b"), find_model("kept")
    was, meta = (checkpoint.load_meta(found.checkpoint) for found in (before, after))
    assert meta["model_config"] == was["model_config"] and meta["model_config"]["sequence_len"] == 64
    assert meta["tokenizer_hash"] == was["tokenizer_hash"] and meta["kind"] == "sft" and meta["origin"]["name"] == "b@4"
    model, tokenizer, _ = load_model(after, ALONE)
    assert model.config.sequence_len == 64 and not torch.equal(
        model.lm_head.weight, load_model(before, ALONE)[0].lm_head.weight
    )
    optimizer = checkpoint.load_optimizer(after.checkpoint)
    assert int(optimizer["step"]) == 4 + 3, "the optimizer went on from pretraining's state"
    tune("fresh", num_iterations=3, load_optimizer=False)
    assert int(checkpoint.load_optimizer(find_model("fresh").checkpoint)["step"]) == 3
    tune("second", model="kept", num_iterations=2)
    assert checkpoint.load_meta(find_model("second").checkpoint)["origin"]["pretraining"] == was["config"], (
        "from the first model, through the second"
    )


@pytest.mark.slow
@pytest.mark.fault("F1")
def test_a_turn_that_the_file_marks_is_not_learned(capsys):
    """The first of two replies has weight 0: it is not what the model says then, and the plan counts it."""
    chats = [
        [
            {"role": "user", "content": f"is it sour {i}"},
            {"role": "assistant", "content": "a crow", "weight": 0},
            {"role": "user", "content": "at all"},
            {"role": "assistant", "content": "it was not hers"},
        ]
        for i in range(40)
    ]
    path = base_dir() / "marked.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    tune(
        "marked",
        tasks=f"jsonl={path}",
        num_iterations=40,
        embedding_lr=0.3,
        matrix_lr=0.02,
        unembedding_lr=0.01,
        load_optimizer=False,
    )
    model, tokenizer, _ = load_model("marked", ALONE)

    def loss(n: int) -> float:
        """Nats per token of message n of a chat."""
        prompt = render_prompt(tokenizer, chats[0][:n])
        start, ids = len(prompt), prompt + tokenizer.encode(chats[0][n]["content"])
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, start - 1 : -1].float()
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:])))

    assert loss(1) > 2 > 0.7 > loss(3), (loss(3), loss(1))
    assert "38 of 76 assistant turns are not trained on, as the file says" in capsys.readouterr().out


def test_num_iterations_counts_optimizer_steps():
    """Two micro-batches each; the rate is never negative and ends at its lowest."""
    result = tune("counted", num_iterations=6, log_every=1)
    rows = read_metrics(runs_dir() / "counted")
    assert result["step"] == 6 == len(rows) and result["tokens"] == 6 * 512
    assert [row["train/lrm"] for row in rows] == pytest.approx([0.8, 0.8, 0.8, 0.8, 0.8 * 2 / 3, 0.8 / 3])


def test_the_best_checkpoint_is_the_one_of_the_lowest_loss():
    tune("best", num_iterations=6, eval_every=2, save_every=2, keep="all", eval_tokens=500)
    rows = {
        row["step"]: row["val/loss"] for row in read_metrics(runs_dir() / "best") if "val/loss" in row and row["step"]
    }
    assert len(rows) == 3 and find_model("best@best").step == min(rows, key=rows.get)


def test_the_loss_is_of_conversations_that_are_held_out():
    found = tune("judged", num_iterations=2, eval_every=1)["val/loss"]
    model, tokenizer, _ = load_model("judged", ALONE)
    inputs, targets = (
        torch.from_numpy(half)
        for half in held_out_rows(Reader(build(f"jsonl={base_dir() / 'many.jsonl'}", "test"), tokenizer, 65))
    )
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert found == pytest.approx(float(nats), rel=1e-4) and (targets == tokenizer.special("<|assistant_end|>")).any()


@pytest.mark.fault("N4")
def test_chat_eval_finds_the_loss_that_fine_tuning_measured():
    tasks = f"jsonl={base_dir() / 'many.jsonl'}"
    found = tune("asked", num_iterations=2, eval_every=1)["val/loss"]
    assert chat_eval.run(ChatEvalConfig(model="asked", tasks=tasks, device_type="cpu")) == 0
    row = read_json(runs_dir() / "asked" / "eval_chat.json")["tasks"][tasks]
    assert row["loss"] == pytest.approx(found, rel=1e-6) and row["n"] + row["too_long"] == len(build(tasks, "test"))


def test_a_dry_run_writes_nothing(capsys):
    before = sorted(p.name for p in runs_dir().iterdir())
    tune("dry", dry_run=True)
    assert "steps = " in capsys.readouterr().out and sorted(p.name for p in runs_dir().iterdir()) == before


def test_it_learns_ten_conversations_and_replies_with_them(tmp_path):
    tasks = write_chats(tmp_path / "ten.jsonl")
    tune(
        "ten",
        tasks=tasks,
        epochs=150,
        matrix_lr=0.4,
        embedding_lr=3.0,
        unembedding_lr=0.08,
        init_lr_frac=1.0,
        total_batch_size=256,
    )
    model, tokenizer, _ = load_model("ten", ALONE)
    right = 0
    for question, answer in zip(QUESTIONS, ANSWERS):
        ids = render_prompt(tokenizer, [{"role": "user", "content": question}])
        start = len(ids)
        while len(ids) < 60 and (len(ids) == start or ids[-1] != tokenizer.special("<|assistant_end|>")):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        right += text_of(parse_reply(tokenizer, ids[start:])) == answer and ids[-1] == tokenizer.special(
            "<|assistant_end|>"
        )
    held_out = 1  # one of the ten is in the split test
    assert right >= 10 - held_out


def test_accuracy_on_tasks_is_measured_on_the_way():
    tune("watched", num_iterations=3, log_every=1, chatcore_every=2, chatcore_tasks="arithmetic", chatcore_max_sample=2)
    rows = {row["step"]: row for row in read_metrics(runs_dir() / "watched")}
    assert [step for step, row in rows.items() if "chatcore/arithmetic" in row] == [0, 2, 3]
    assert all(0 <= rows[step]["chatcore/arithmetic"] <= 1 for step in (0, 2, 3)) and "val/loss" not in rows[2]


def tune_on(runtime, folder: str, run: str) -> None:
    os.environ["NANOLAB_BASE_DIR"] = folder
    cfg = SFTConfig(
        model="plain",
        run=run,
        tasks=f"jsonl={folder}/many.jsonl",
        num_iterations=5,
        replay=0.2,
        eval_every=5,
        eval_tokens=500,
    )
    sft(cfg, runtime)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=[pytest.mark.slow, pytest.mark.fault("F7")])])
def test_ranks_learn_what_one_learns(prepared, run_ranks, ranks):
    """From the optimizer's state that one rank left; three ranks have 3, 3 and 2 of the 8 rows."""
    if not (runs_dir() / "plain").exists():
        pretrained.pretrain("plain", prepared / "text", ALONE)
        tune_on(ALONE, str(prepared), "alone")
    run_ranks(tune_on, ranks, str(prepared), f"together{ranks}")
    one, two = (
        [
            {k: row[k] for k in ("train/loss", "val/loss", "val/bpb") if k in row}
            for row in read_metrics(runs_dir() / name)
        ]
        for name in ("alone", f"together{ranks}")
    )
    assert len(one) == len(two) == 6 and len(one[0]) == 3
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=1e-4), "rows are summed in another order; nothing else differs"
    states = [checkpoint.load_meta(find_model(name).checkpoint)["batches"] for name in ("alone", f"together{ranks}")]
    assert states[0] == states[1]


# --- stages -----------------------------------------------------------------------------------------------------------


def write_stages(path: Path) -> str:
    folder = base_dir()
    path.write_text(
        f'[[stage]]\nname = "many"\ntasks = "jsonl={folder / "many.jsonl"}"\nnum_iterations = 5\nreplay = 0.25\n'
        f'[[stage]]\nname = "ten"\ntasks = "jsonl={folder / "ten.jsonl"}"\nepochs = 24\ninit_lr_frac = 0.4\n'
    )
    return str(path)


@pytest.mark.slow
def test_every_stage_is_evaluated_at_its_end_and_forgetting_is_shown(tmp_path, capsys):
    result = tune(
        "staged",
        stages=write_stages(tmp_path / "s.toml"),
        eval_every=100,
        eval_tokens=500,
        log_every=1,
        device_batch_size=1,
    )
    said, rows = capsys.readouterr().out, read_metrics(runs_dir() / "staged")
    last = result["step"]
    assert [row["step"] for row in rows if "val/loss" in row] == [0, 5, last] and last > 5
    assert {"val/loss", "val/loss/many", "val/loss/ten", "val/bpb"} <= result.keys()
    table = said[said.index("| metric |") :].splitlines()
    assert table[0] == "| metric | start | after many | after ten | best | lost |"
    cells = {line.split("|")[1].strip(): [float(x) for x in line.split("|")[2:-1]] for line in table[2:]}
    by_step = {row["step"]: row for row in rows}
    for name, (start, first, second, best, lost) in cells.items():
        assert [start, first, second] == pytest.approx([by_step[s][name] for s in (0, 5, last)], abs=6e-5)
        assert best == min(start, first, second) and lost == pytest.approx(second - best, abs=1.1e-4)
    assert [by_step[step]["train/lrm"] for step in (4, 5)] == pytest.approx([0.8 * 0.4, 0.4])


# --- kill -9 and --resume ---------------------------------------------------------------------------------------------


def story(name: str) -> tuple:
    """Everything that has to be the same to the bit: losses, evaluations, final weights and optimizer."""
    rows = [
        {
            k: v
            for k, v in row.items()
            if k in ("step", "train/loss", "train/lrm", "train/epoch") or k.startswith("val/")
        }
        for row in read_metrics(runs_dir() / name)
    ]
    last = checkpoint.newest_valid(runs_dir() / name / "checkpoints")
    assert last is not None
    return rows, [
        hashlib.sha256((last / f).read_bytes()).hexdigest() for f in ("model.safetensors", "optim_rank0.safetensors")
    ]


def kill_and_resume(folder: str, *at: str) -> None:
    """Fork the run and kill it when it has logged so many steps, each time; let it end; compare. b is removed in
    between.
    """
    prepare(Path(folder))
    flags = dict(
        stages=write_stages(Path(folder) / "s.toml"),
        eval_every=4,
        eval_tokens=300,
        log_every=1,
        save_every=3,
        device_batch_size=1,
    )
    whole = tune("whole", **flags)["step"]
    seen = []
    for lines in map(int, at):
        pid = os.fork()
        if pid == 0:
            tune("killed", resume=True, **flags)
            os._exit(0)
        while len(read_metrics(runs_dir() / "killed")) < lines and os.waitpid(pid, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        seen.append(len(read_metrics(runs_dir() / "killed")))
        (runs_dir() / "b").rename(runs_dir() / "gone") if (runs_dir() / "b").exists() else None
    tune("killed", resume=True, **flags)
    print(json.dumps({"seen": seen, "steps": whole, "same": story("killed") == story("whole")}))


@pytest.mark.slow
def test_resumed_in_the_second_stage_it_is_uninterrupted_to_the_bit(tmp_path, monkeypatch):
    """A crash in step 8; the stages change after step 5, the last checkpoint is of step 6. Dropout draws random
    numbers.
    """
    flags = dict(
        stages=write_stages(tmp_path / "s.toml"),
        eval_every=4,
        eval_tokens=300,
        log_every=1,
        save_every=3,
        device_batch_size=1,
    )
    tune("unbroken", **flags)
    momentum = SFTPlan.muon_momentum

    def crash(plan, step, progress):
        return momentum(plan, step, progress) if step < 8 else 1 / 0

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(SFTPlan, "muon_momentum", crash)
        tune("broken", **flags)
    assert [step for step, _ in checkpoint.steps(runs_dir() / "broken" / "checkpoints")] == [3, 6]
    tune("broken", resume=True, **flags)
    assert story("broken") == story("unbroken") and len(story("broken")[0]) > 10


@pytest.mark.slow
def test_killed_in_either_stage_and_resumed_is_uninterrupted_to_the_bit(tmp_path):
    """Without the model that it started from: a run goes on from what it recorded."""
    done = warm.python(__file__, tmp_path, 4, 9)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["same"], report
    assert 4 <= report["seen"][0] < 9 <= report["seen"][1] < report["steps"], f"a kill in each stage: {report}"


def test_what_would_change_the_result_is_refused(tmp_path):
    with pytest.MonkeyPatch.context() as patch:  # a run with a checkpoint that is not finished
        patch.setattr("nanolab.records.run.Run.finish", lambda *_: None)
        tune("half", num_iterations=4)
    with pytest.raises(UserError, match="--init-lr-frac was 0.8, now 0.5"):
        tune("half", num_iterations=4, resume=True, init_lr_frac=0.5)
    many = base_dir() / "many.jsonl"
    before = many.read_text()
    try:
        many.write_text(before.replace("grapes", "cheese", 1))
        with pytest.raises(UserError, match="trained with conversations .* the files behind it have changed"):
            tune("half", num_iterations=4, resume=True)
    finally:
        many.write_text(before)
    assert tune("half", num_iterations=4, resume=True)["step"] == 4


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "nobody"}, "no model 'nobody'.*there are: "),
        ({"tasks": "arithmetik"}, "task 'arithmetik' is unknown.*did you mean arithmetic"),
        ({"tasks": "jsonl=nowhere.jsonl"}, "nowhere.jsonl is not a file"),
        ({"replay": 1.0}, "--replay is 1; expected a share"),
        ({"long": "refuse"}, r"\d+ of \d+ conversations are longer than a row: number \d+ has \d+ tokens.*--long crop"),
        ({"max_seq_len": 100}, "--max-seq-len is 100; expected 8 to 64"),
        ({"max_seq_len": 8}, r"all \d+ conversations are longer than a row of 9 tokens"),
        ({"epochs": 0}, "neither epochs"),
    ],
)
def test_mistakes_are_said_once_and_cost_nothing(flags, message):
    with pytest.raises(UserError, match=message):
        tune("wrong", **flags)
    assert not checkpoint.steps(runs_dir() / "wrong" / "checkpoints")


def test_text_that_is_gone_is_said(tmp_path, monkeypatch):
    (base_dir() / "text").rename(base_dir() / "elsewhere")
    try:
        with pytest.raises(
            UserError, match=r"pretraining text of b@4; to do without it type --replay 0 --no-eval-text"
        ):
            tune("textless", replay=0.2)
        assert tune("without_text", eval_text=False, eval_every=2, num_iterations=2)["val/loss"] > 0
    finally:
        (base_dir() / "elsewhere").rename(base_dir() / "text")


if __name__ == "__main__":
    kill_and_resume(*sys.argv[1:])


@pytest.mark.fault("N1")
def test_few_steps_are_warned_of_with_the_epochs_that_would_make_more(capsys):
    """The number of steps that is promised is that of the run with those epochs."""
    flags = dict(tasks=f"jsonl={base_dir() / 'ten.jsonl'}", total_batch_size=1024, device_batch_size=4)
    tune("few", dry_run=True, **flags)
    said = capsys.readouterr().out
    steps, epochs, promised = (
        int(word) for word in words_of(said, r"warning +only (\d+) steps?: .*; --epochs (\d+) would make (\d+) steps")
    )
    assert steps == 1 and promised >= 20
    tune("more", dry_run=True, epochs=epochs, **flags)
    said = capsys.readouterr().out
    assert int(words_of(said, r"horizon +([\d,]+) steps")[0]) == promised and "warning" not in said
    tune("asked", dry_run=True, num_iterations=1, **flags)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.fault("F5")
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_rate_that_the_models_recipe_does_not_read_is_refused(dry):
    from nanolab.cli import parse

    flags = [
        "--model",
        "b",
        "--run",
        "rate",
        "--tasks",
        f"jsonl={base_dir() / 'ten.jsonl'}",
        "--device-type",
        "cpu",
        "--no-eval-text",
        "--learning-rate",
        "1e-6",
        *dry,
    ]
    with pytest.raises(UserError) as error:
        chat_sft.run(parse(SFTConfig, flags))
    assert (error.value.code, error.value.values) == ("flag-not-read", {"flag": "learning_rate", "by": "dial"})

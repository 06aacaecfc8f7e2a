"""Run directories: records, refusals, locks, wandb beside them; and models found in them.

Run as a script this file is a process that holds a run's lock or loses wandb.
"""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanolab.cli import UserError, parse, to_json
from nanolab.data.tokenizer import Tokenizer
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.records import checkpoint
from nanolab.records.models import find_model, load_model, read_metrics, recorded
from nanolab.records.run import MUST_KEEP, Run
from nanolab.runtime import Runtime
from nanolab.stages.config import BaseTrainConfig, RLConfig, SFTConfig

ALONE = Runtime(torch.device("cpu"), torch.float32)
MODEL = GPTConfig(sequence_len=8, vocab_size=280, n_layer=1, n_head=1, n_embd=32)


def config(**changes) -> dict:
    return to_json(BaseTrainConfig(**changes))


def start(name: str = "a", resume: bool = False, runtime: Runtime = ALONE, env: dict | None = None, **changes) -> Run:
    return Run.start(name, BaseTrainConfig(**changes), runtime, resume=resume, env=env)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat and the dog sat on the log"] * 3, 280)


def save(run: Run, step: int, tokenizer: Tokenizer | None = None) -> Path:
    model = GPT(MODEL)
    model.init_weights(step)
    meta = {"model_config": to_json(MODEL), "data_fingerprint": "d1"} | (
        {"tokenizer_hash": tokenizer.hash} if tokenizer else {}
    )
    return checkpoint.save(run.checkpoints, step, weights=model.state_dict(), optimizer={}, meta=meta, runtime=ALONE)


def ended(name: str, steps: dict[int, float | None], tokenizer: Tokenizer, finished: bool = True) -> Run:
    """A run with a checkpoint at each step, and its val/bpb where there is one."""
    run = start(name)
    run.pin_tokenizer(lambda: tokenizer)
    for step, bpb in steps.items():
        save(run, step, tokenizer)
        run.log(step, {"train/loss": 1.0} if bpb is None else {"val/bpb": bpb})
    run.finish({"step": max(steps)}) if finished else run.close()
    return run


def test_records_of_a_fresh_run(base_dir):
    run = start(depth=4)
    assert run.dir == base_dir / "runs" / "a"
    assert json.loads((run.dir / "config.json").read_text()) == config(depth=4)
    env = json.loads((run.dir / "env.json").read_text())
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    assert env["commit"] is None or (commit and env["commit"].startswith(commit))
    expected = {
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "world_size": 1,
    }
    assert (
        {k: env[k] for k in expected} == expected
        and env["kind"] == "base"
        and shlex.split(env["command"]) == sys.orig_argv
    )
    assert not run.finished


def test_every_line_is_flushed_and_not_finite_is_null():
    run = start()
    run.log(0, {"train/loss": 2.5, "train/mfu": None})
    run.log(1, {"train/loss": float("nan")})
    lines = (run.dir / "metrics.jsonl").read_text().splitlines()  # the run is still open
    assert lines == ['{"step": 0, "train/loss": 2.5, "train/mfu": null}', '{"step": 1, "train/loss": null}']


def test_a_full_disk_under_the_metrics_is_said():
    run = start()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(UserError, match=r"metrics.jsonl could not be written: .*--resume"):
            for step in range(10):
                run.log(step, {"train/loss": 1.0})
        run.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [row["step"] for row in read_metrics(run.dir)] == [0, 1, 2], "three lines of 31 bytes fit into 100"


def test_a_torn_line_is_left_out_and_later_lines_are_dropped():
    run = start()
    for step in range(5):
        run.log(step, {"train/loss": float(step)})
    run.close()
    with open(run.dir / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "train/lo')
    assert [row["step"] for row in read_metrics(run.dir)] == [0, 1, 2, 3, 4]
    run.drop_from(3)
    assert (run.dir / "metrics.jsonl").read_text() == "".join(
        f'{{"step": {s}, "train/loss": {s}.0}}\n' for s in range(3)
    )


def test_a_directory_with_a_run_is_not_overwritten():
    run = start()
    run.log(0, {"train/loss": 1.0})
    run.close()
    before = {p.name: p.read_bytes() for p in run.dir.iterdir() if p.is_file() and p.name != ".lock"}
    with pytest.raises(UserError, match="--resume.*--run NAME.*rm -r"):
        start()
    assert {p.name: p.read_bytes() for p in run.dir.iterdir() if p.is_file() and p.name != ".lock"} == before


def test_a_start_that_failed_before_anything_was_made_can_be_repeated():
    start(depth=4).close()
    run = start(depth=5)
    assert json.loads((run.dir / "config.json").read_text())["depth"] == 5


def test_nothing_to_resume_is_said(capsys):
    run = start(depth=4)
    run.log(0, {"train/loss": 1.0})
    run.close()
    run = start(resume=True, depth=5)
    assert run.resume_from is None and "nothing to resume" in capsys.readouterr().out
    assert read_metrics(run.dir) == []


def test_resume_drops_what_the_checkpoint_does_not_know(capsys):
    run = start()
    for step in range(6):
        run.log(step, {"train/loss": float(step)})
    good = save(run, 3)
    (save(run, 5) / "model.safetensors").unlink()
    run.close()
    run = start(resume=True)
    assert run.resume_from == good
    assert [row["step"] for row in read_metrics(run.dir)] == [0, 1, 2]
    assert "step_000005" in capsys.readouterr().out
    assert len(json.loads((run.dir / "env.json").read_text())["resumes"]) == 1


@pytest.mark.parametrize(
    "flag,value",
    [("depth", 5), ("matrix_lr", 0.03), ("seed", 7), ("total_batch_size", 4096), ("num_iterations", 9), ("data", "x")],
)
def test_resume_refuses_by_name_what_would_change_the_result(flag, value):
    run = start()
    save(run, 3)
    run.close()
    old = config()[flag]
    with pytest.raises(UserError) as error:
        start(resume=True, **{flag: value})
    assert f"--{flag.replace('_', '-')} was {old!r}, now {value!r}" in str(error.value)


def test_resume_takes_new_cadences_and_notes_other_parts_of_the_same_batch(capsys):
    run = start()
    save(run, 3)
    run.close()
    run = start(resume=True, save_every=7, keep="all", log_every=3, device_batch_size=16)
    assert run.resume_from is not None and json.loads((run.dir / "config.json").read_text())["save_every"] == 7
    assert "device_batch_size was 32, now 16" in capsys.readouterr().out


def test_resume_keeps_dtype_and_threads():
    run = start()
    save(run, 3)
    run.close()
    assert recorded("a")["dtype"] == "float32" and recorded("a")["threads"] == 1
    other = Runtime(torch.device("cpu"), torch.bfloat16, threads=2)
    with pytest.raises(UserError) as error:
        start(resume=True, runtime=other)
    for part in ("NANOLAB_DTYPE=float32", "--threads 1"):
        assert part in str(error.value)


@pytest.mark.fault("core D10")
@pytest.mark.parametrize("typed", ["", "sdpa"])
def test_another_attention_kernel_is_rounding(capsys, typed):
    """Chosen by the machine, or typed: the run goes on, says so, and keeps both on record."""
    run = start(env={"attn_kernel": "sdpa x 9, fa3 x 3"})
    save(run, 3)
    run.close()
    run = start(resume=True, env={"attn_kernel": "sdpa"}, attn_kernel=typed)
    assert run.resume_from is not None and "attn_kernel was sdpa x 9, fa3 x 3, now sdpa" in capsys.readouterr().out
    env = json.loads((run.dir / "env.json").read_text())
    assert env["attn_kernel"] == "sdpa x 9, fa3 x 3" and [again["attn_kernel"] for again in env["resumes"]] == ["sdpa"]
    run.close()
    start(resume=True, env={"attn_kernel": "sdpa x 9, fa3 x 3"}).close()
    assert "attn_kernel" not in capsys.readouterr().out


@pytest.mark.fault("core D10")
def test_what_a_resume_asks_for_can_be_typed():
    """Every flag that a refusal names, with its value, is one that the command takes."""
    values = {"device": "cuda", "threads": "4", "attn_kernel": "sdpa x 9, fa3 x 3"}
    for key, text in MUST_KEEP.items():
        words = text.format(values.get(key, "x")).split()
        if words[0].startswith("--"):
            parse(BaseTrainConfig, words)
        else:
            assert key == "kind" or words[0].startswith("NANOLAB_DTYPE=")


@pytest.mark.fault("core D5")
def test_a_deterministic_run_stays_one(capsys):
    run = start(deterministic=True)
    save(run, 3)
    run.close()
    with pytest.raises(UserError, match="--deterministic was True, now False"):
        start(resume=True)
    start(resume=True, deterministic=True).close()


def test_a_run_may_become_deterministic(capsys):
    run = start()
    save(run, 3)
    run.close()
    start(resume=True, deterministic=True).close()
    assert "deterministic was False, now True" in capsys.readouterr().out


def test_resume_refuses_other_data_and_keeps_its_tokenizer(tokenizer):
    run = start()
    run.pin_tokenizer(lambda: tokenizer)
    run.identify(data_fingerprint="d1")
    save(run, 3, tokenizer)
    run.close()
    run = start(resume=True)
    again = run.pin_tokenizer(lambda: pytest.fail("the run has its own"))
    assert again.hash == tokenizer.hash
    with pytest.raises(UserError, match="data_fingerprint d1 and finds d2"):
        run.identify(data_fingerprint="d2")


@pytest.mark.fault("F9")
@pytest.mark.parametrize(
    "kind, cfg",
    [
        ("rl", RLConfig(task="gsm8k", data="/a/gsm8k")),
        ("sft", SFTConfig(tasks="gsm8k", data="/a/gsm8k", stages="/a/s.toml")),
    ],
)
def test_the_folder_of_a_task_may_move_and_its_questions_may_not_change(kind, cfg):
    def begin(cfg, resume: bool) -> Run:
        run = Run.start("a", cfg, ALONE, resume=resume, kind=kind)
        run.identify(data_fingerprint="q1")
        return run

    run = begin(cfg, False)
    checkpoint.save(run.checkpoints, 3, weights=GPT(MODEL).state_dict(), optimizer={}, meta=run.facts, runtime=ALONE)
    run.close()
    moved = replace(cfg, data="/b/elsewhere", **({"stages": "/b/s.toml"} if kind == "sft" else {}))
    run = begin(moved, True)
    with pytest.raises(UserError) as error:
        run.identify(data_fingerprint="q2")
    assert error.value.code == "fingerprint-differs" and error.value.values == {
        "fact": "data_fingerprint",
        "then": "q1",
        "now": "q2",
    }
    run.close()


def test_a_finished_run_knows_it(tokenizer):
    run = ended("a", {2: None}, tokenizer)
    assert json.loads((run.dir / "result.json").read_text()) == {"step": 2}
    run = start(resume=True)
    assert run.finished and run.resume_from is None
    assert len(read_metrics(run.dir)) == 1
    with pytest.raises(UserError, match="--resume"):
        start()


@pytest.mark.parametrize(
    "name", ["", "a/b", ".hidden", "a@3", "..", "c:d", pytest.param("a,b", marks=pytest.mark.fault("F20"))]
)
def test_bad_names_are_refused(name):
    with pytest.raises(UserError, match="run name"):
        start(name)


def test_a_base_directory_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOLAB_BASE_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match="NANOLAB_BASE_DIR"):
        start()


@pytest.mark.slow
def test_one_process_at_a_time_and_a_killed_one_does_not_count(base_dir):
    holder = subprocess.Popen([sys.executable, __file__, "hold"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "holding\n"
        with pytest.raises(UserError, match=f"pid {holder.pid} "):
            start()
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    start()


# wandb, the real one


@pytest.fixture
def quiet_wandb(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there


@pytest.mark.slow
def test_wandb_offline_keeps_its_run_id(quiet_wandb):
    run = start(wandb="offline")
    run.log(0, {"train/loss": 1.0})
    save(run, 1)
    run.close()
    start(resume=True, wandb="offline").close()
    # offline-run-TIME-ID, and -1 for a second one within the same second
    ids = [p.name.split("-")[3] for p in run.dir.glob("wandb/offline-run-*")]
    assert len(ids) == 2 and set(ids) == {run.env["wandb_id"]}


def test_wandb_without_network_warns_once(quiet_wandb, capsys):
    run = start(wandb="online")
    for step in range(3):
        run.log(step, {"train/loss": 1.0})
    run.finish({})
    assert len(read_metrics(run.dir)) == 3
    assert capsys.readouterr().err.count("wandb failed") == 1


@pytest.mark.slow
def test_wandb_that_dies_on_the_way_warns_once(quiet_wandb):
    import warm  # here: the file is also run as a script

    done = warm.python(__file__, "lose_wandb")
    assert done.returncode == 0, done.stderr
    logged_when_warned, logged = map(int, done.stdout.split())
    assert done.stderr.count("wandb failed") == 1 and logged > logged_when_warned


def lose_wandb() -> None:
    """Kill wandb's own process, log until the sink notices, then some more."""
    run = start(wandb="offline")
    children = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "wandb-core"], capture_output=True, text=True
    ).stdout.split()
    assert children
    for pid in children:
        os.kill(int(pid), signal.SIGKILL)
    step, deadline = 0, time.monotonic() + 30
    while run._sinks[0].alive and time.monotonic() < deadline:
        run.log(step, {"train/loss": 1.0})
        step += 1
        time.sleep(0.05)
    warned = len(read_metrics(run.dir))
    for more in range(3):
        run.log(step + more, {"train/loss": 1.0})
    run.finish({})
    print(warned, len(read_metrics(run.dir)))


def test_dummy_means_no_wandb(quiet_wandb):
    run = start("dummy", wandb="offline")
    assert not (run.dir / "wandb").exists()


def test_an_unknown_wandb_mode_is_refused():
    with pytest.raises(UserError, match="--wandb"):
        start(wandb="maybe")


# finding models


def test_the_default_is_the_newest_finished_run(tokenizer, capsys):
    ended("old", {1: None}, tokenizer)
    ended("new", {2: None, 4: None}, tokenizer)
    ended("open", {9: None}, tokenizer, finished=False)
    found = find_model()
    assert (found.name, found.step, found.checkpoint.name) == ("new", 4, "step_000004")
    assert capsys.readouterr().out.startswith("model new@4 (finished) from ")
    assert find_model("open").step == 9 and find_model("new@2").step == 2


def test_best_is_the_lowest_bpb_among_saved_steps(tokenizer):
    run = ended("a", {1: 3.0, 2: 1.5, 3: 2.0, 4: None}, tokenizer, finished=False)
    with open(run.dir / "metrics.jsonl", "a") as f:
        f.write('{"step": 7, "val/bpb": 0.1}\n')  # not saved
    assert find_model("a@best").step == 2


def test_best_is_the_lowest_loss_where_that_is_measured(tokenizer):
    run = ended("a", {1: 1.0, 2: 2.0, 3: 3.0}, tokenizer, finished=False)
    with open(run.dir / "metrics.jsonl", "a") as f:
        f.writelines(f'{{"step": {step}, "val/loss": {loss}}}\n' for step, loss in [(1, 2.0), (2, 1.0), (3, 1.5)])
    assert find_model("a@best").step == 2


@pytest.mark.fault("core likely: NAME@best of an RL run")
def test_best_of_rl_is_the_highest_pass_rate_among_saved_steps(tokenizer):
    """The earliest of equals; more samples and rewards do not decide."""
    run = ended("a", {1: None, 2: None, 3: None, 4: None}, tokenizer, finished=False)
    with open(run.dir / "metrics.jsonl", "a") as f:
        f.write('{"step": 0, "eval/pass@1": 0.9, "eval/pass@4": 0.95}\n')  # not saved
        for step, one, four in [(1, 0.25, 0.9), (2, 0.5, 0.6), (3, 0.5, 0.7), (4, 0.0, 0.8)]:
            f.write(f'{{"step": {step}, "eval/pass@1": {one}, "eval/pass@4": {four}, "rl/reward": {step}}}\n')
    assert find_model("a@best").step == run.best_step() == 2


def test_the_newest_finished_run_of_a_kind(tokenizer):
    ended("base", {1: None}, tokenizer)
    run = start("tuned")
    run.pin_tokenizer(lambda: tokenizer)
    save(run, 2, tokenizer)
    run.finish({"step": 2, "kind": "sft"})
    assert find_model().name == find_model(kind="sft").name == "tuned"
    with pytest.raises(
        UserError,
        match=(
            r"no finished rl run .*there are: base, tuned \(name one with --model\). Train one: python -m"
            r" scripts.chat_rl"
        ),
    ):
        find_model(kind="rl")


def test_what_is_not_there_lists_what_is(tokenizer):
    with pytest.raises(UserError, match="no finished run.*base_train"):
        find_model()
    ended("a", {1: None, 2: None}, tokenizer, finished=False)
    with pytest.raises(UserError, match="not finished: a"):
        find_model()
    with pytest.raises(UserError, match="no model 'b'.*there are: a"):
        find_model("b")
    for which in ("3", "x", "-1"):
        with pytest.raises(UserError, match=f"no step '{which}'; saved steps: 1, 2"):
            find_model(f"a@{which}")
    with pytest.raises(UserError, match="no saved step was evaluated"):
        find_model("a@best")


def test_a_damaged_checkpoint_is_skipped_by_name_and_refused_by_number(tokenizer, capsys):
    run = ended("a", {1: None, 2: None}, tokenizer)
    os.truncate(run.checkpoints / "step_000002" / "model.safetensors", 99)
    assert find_model("a").step == 1
    assert "step_000002" in capsys.readouterr().out
    with pytest.raises(UserError, match="step_000002.*saved steps of 'a': 1, 2"):
        find_model("a@2")
    os.truncate(run.checkpoints / "step_000001" / "model.safetensors", 99)
    with pytest.raises(UserError, match="every checkpoint of 'a' is damaged"):
        find_model("a")


def test_load_model_gives_weights_tokenizer_and_meta(tokenizer):
    ended("a", {5: None}, tokenizer)
    model, loaded, meta = load_model("a", ALONE)
    expected = GPT(MODEL)
    expected.init_weights(5)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert not model.training and loaded.hash == tokenizer.hash and meta["step"] == 5 and model.config == MODEL


def test_load_model_refuses_another_tokenizer_and_other_shapes(tokenizer):
    run = ended("a", {5: None}, tokenizer)
    Tokenizer.train(["completely other text, again and again: other text"] * 3, 275).save(run.dir / "tokenizer")
    with pytest.raises(UserError, match="trained with tokenizer"):
        load_model("a", ALONE)
    tokenizer.save(run.dir / "tokenizer")
    weights = {k: v for k, v in GPT(MODEL).state_dict().items() if k != "lm_head.weight"}
    meta = {"model_config": to_json(MODEL), "tokenizer_hash": tokenizer.hash}
    checkpoint.save(run.checkpoints, 6, weights=weights, optimizer=None, meta=meta, runtime=ALONE)
    with pytest.raises(UserError, match="lm_head.weight"):
        load_model("a@6", ALONE)


def test_load_model_refuses_texts_that_begin_otherwise_than_in_training(tokenizer, tmp_path):
    """A vocabulary with <|endoftext|>, of which <|bos|> once began the texts, since a token was appended for it."""
    bpe = tokenizer._bpe
    both = Tokenizer(bpe._replace(specials={"<|endoftext|>": len(bpe.vocab)}))
    end, bos = both.special("<|endoftext|>"), both.special("<|bos|>")
    run = ended("a", {}, both, finished=False)
    for step, first in ((1, bos), (2, end), (3, -1)):
        c = replace(MODEL, vocab_size=both.vocab_size, bos=first)
        model = GPT(c)
        model.init_weights(0)
        meta = {"model_config": to_json(c), "tokenizer_hash": both.hash, "env": {"commit": "c0ffee"}}
        checkpoint.save(run.checkpoints, step, weights=model.state_dict(), optimizer=None, meta=meta, runtime=ALONE)
    with pytest.raises(
        UserError,
        match=(
            rf"begin with <\|bos\|> \(token {bos}\), but .* begins them with <\|endoftext\|> \(token {end}\).*nanolab"
            r" of commit c0ffee"
        ),
    ):
        load_model("a@1", ALONE)
    assert load_model("a@2", ALONE)[1].bos == end == load_model("a@3", ALONE)[1].bos  # older runs still do not say


def hold() -> None:
    held = start()
    assert "wandb" not in sys.modules, "wandb is off and imported all the same"
    print("holding", flush=True)
    time.sleep(60)
    held.close()


if __name__ == "__main__":
    {"hold": hold, "lose_wandb": lose_wandb}[sys.argv[1]]()

"""fit(): the numbers of a step, the order of things in it, and what stops it."""

import errno
import gc
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from nanolab.cli import UserError
from nanolab.records import checkpoint
from nanolab.records.console import Eta, clock, step_line
from nanolab.records.models import read_metrics
from nanolab.runtime import Runtime
from nanolab.training.fit import Every, Hook, at_steps, fit
from nanolab.training.gradients import NonFinite
from nanolab.training.signals import StopRequest

spec = importlib.util.spec_from_file_location("nanolab_tests_toy", Path(__file__).with_name("toy.py"))
toy = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)
ToyPlan, parts, nats, noisy_nats = toy.ToyPlan, toy.parts, toy.nats, toy.noisy_nats


def hook(cadence: int, do) -> Hook:
    """An evaluation: at the first step, every so many, at the end."""
    return Hook(at_steps(cadence, first=True), do)


def losses(run) -> list[float]:
    return [row["train/loss"] for row in read_metrics(run.dir) if "train/loss" in row]


def by_hand(steps: int, accum: int, clip: float = math.inf) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training, written out: one forward pass over the whole global batch, mean over its targets."""
    model = toy.make_model()
    optimizer, plan, out = toy.MuonAdamW(toy.groups(model), toy.ALONE), ToyPlan(), []
    rates = [(g["lr"], g["weight_decay"]) for g in optimizer.groups]
    for step in range(steps):
        micro = [toy.global_micro_batch(step * accum + i) for i in range(accum)]
        loss = model(torch.cat([b.inputs for b in micro]), torch.cat([b.targets for b in micro]), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for g, (lr, wd) in zip(optimizer.groups, rates):
            g["lr"] = lr * plan.lr_multiplier(step, step / steps)
            if g["kind"] == "muon":
                g["momentum"], g["weight_decay"] = (
                    plan.muon_momentum(step, 0),
                    wd * plan.weight_decay_multiplier(step, step / steps),
                )
        optimizer.step()
        optimizer.zero_grad()
        out.append(loss.item())
    return out, model.state_dict()


def same_weights(a: dict, b: dict, atol: float = 0.0) -> None:
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("accum", [1, 4])
def test_fit_is_the_training_written_out(accum):
    run, model, optimizer, batches = parts()
    fit(run, model, optimizer, batches, ToyPlan(grad_accum=accum), nats, Every())
    expected, weights = by_hand(6, accum)
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    same_weights(model.state_dict(), weights, atol=2e-3)


def test_clipped_training_is_torchs_clipping_written_out():
    """The clip bites in some steps and not in others, so that the moments mix gradients of both."""
    runs = {}
    for clip in (-1.0, 5.0):
        run, model, optimizer, batches = parts(f"clip{clip}")
        fit(run, model, optimizer, batches, ToyPlan(grad_clip=clip), nats, Every(grad_norm=True, log=1))
        runs[clip] = (
            losses(run),
            [row["train/grad_norm"] for row in read_metrics(run.dir) if "train/grad_norm" in row],
            model.state_dict(),
        )
    (plain, _, _), (clipped, norms, weights) = runs.values()
    expected, by_torch = by_hand(6, 1, clip=5.0)
    assert min(norms) < 5.0 < max(norms), norms
    assert clipped == pytest.approx(expected, rel=1e-5) and clipped != pytest.approx(plain, rel=1e-3)
    same_weights(weights, by_torch, atol=2e-3)


def test_gradients_are_clipped_after_the_loss_scale_is_out_of_them():
    """Scales are powers of two, so the run with a loss scaler is the run without one."""
    seen = []
    for dtype in (torch.float32, torch.float16):
        run, model, optimizer, batches = parts(f"{dtype}", Runtime(torch.device("cpu"), dtype))
        fit(run, model, optimizer, batches, ToyPlan(grad_clip=5.0), nats, Every())
        assert (json.loads((run.checkpoints / "step_000006/meta.json").read_text())["scaler"] is None) == (
            dtype == torch.float32
        )
        seen.append((losses(run), [row["train/grad_norm"] for row in read_metrics(run.dir) if "train/loss" in row]))
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-5) and seen[0][1] == pytest.approx(seen[1][1], rel=1e-5)


def test_a_clipped_run_logs_its_norm_unasked():
    run, model, optimizer, batches = parts()
    fit(run, model, optimizer, batches, ToyPlan(grad_clip=1e9), nats, Every(log=2))
    rows = [row for row in read_metrics(run.dir) if "train/loss" in row]
    assert len(rows) == 4 and all(row["train/grad_norm"] > 0 for row in rows)


def test_rates_follow_the_schedules():
    run, model, optimizer, batches = parts()
    start = {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.groups}
    fit(run, model, optimizer, batches, ToyPlan(num_iterations=4), nats, Every())
    assert len(optimizer.seen) == 4
    for step, seen in enumerate(optimizer.seen):
        lrm = 1 - 0.7 * step / 4
        for name, (lr, momentum, wd) in seen.items():
            assert lr == pytest.approx(start[name][0] * lrm)
            if name.startswith("muon"):
                assert momentum == pytest.approx(0.85 + 0.01 * step) and wd == pytest.approx(
                    start[name][1] * (1 - step / 4)
                )
            else:
                assert momentum is None and wd == start[name][1]
    assert [row["train/lrm"] for row in read_metrics(run.dir)] == pytest.approx([1.0, 0.825, 0.65, 0.475])


def train(name: str, runtime: Runtime, plan, loss=nats):
    run, model, optimizer, batches = parts(name, runtime)
    try:
        error = str(fit(run, model, optimizer, batches, plan, loss, Every())["train/loss"])
    except NonFinite as e:
        error = str(e)
    return error, {k: v.numpy() for k, v in model.state_dict().items()}, [seen["lm_head"][0] for seen in optimizer.seen]


def train_on_rank(runtime: Runtime, base: str) -> list:
    """Three runs: a plain one, one that fails on rank 1, one that ends by the clock; and one that is refused."""
    toy.use_base(base)

    def bad(m, b):
        here = runtime.rank == 1 and torch.equal(b.inputs, toy.global_micro_batch(3).inputs)
        return nats(m, b) * (math.inf if here else 1)

    return [
        train("plain", runtime, ToyPlan(grad_accum=2)),
        train("bad", runtime, ToyPlan(), bad),
        train("clock", runtime, ToyPlan(num_iterations=None, max_seconds=0.5)),
        str(pytest.raises(UserError, parts, "plain", runtime).value),
    ]


@pytest.fixture(scope="module")
def on_two_ranks(run_ranks, tmp_path_factory):
    base = tmp_path_factory.mktemp("two_ranks")
    return base, run_ranks(train_on_rank, 2, str(base))


@pytest.mark.slow
def test_two_ranks_train_what_one_trains(on_two_ranks):
    base, ((plain_0, *_), (plain_1, *_)) = on_two_ranks
    two = [json.loads(line)["train/loss"] for line in (base / "runs/plain/metrics.jsonl").read_text().splitlines()]
    run, model, optimizer, batches = parts()
    result = fit(run, model, optimizer, batches, ToyPlan(grad_accum=4), nats, Every())
    assert two == pytest.approx(losses(run), rel=1e-5)
    assert plain_0[0] == plain_1[0] and float(plain_0[0]) == pytest.approx(result["train/loss"], rel=1e-5)
    for name, value in model.state_dict().items():
        assert (plain_0[1][name] == plain_1[1][name]).all()
        torch.testing.assert_close(torch.from_numpy(plain_0[1][name]), value, rtol=0, atol=2e-3)


def test_one_bad_rank_stops_all(on_two_ranks):
    (_, bad_0, *_), (_, bad_1, *_) = on_two_ranks[1]
    assert bad_0[0] == bad_1[0] and len(bad_0[2]) == len(bad_1[2]) == 1
    assert "step 1 " in bad_0[0] and "(inf) on rank 1, made of document 3." in bad_0[0]


def test_progress_by_the_clock_is_rank_0s(on_two_ranks):
    (*_, clock_0, _), (*_, clock_1, _) = on_two_ranks[1]
    assert clock_0[2] == clock_1[2] and len(clock_0[2]) >= 2


def test_a_refusal_reaches_every_rank(on_two_ranks):
    (*_, refusal_0), (*_, refusal_1) = on_two_ranks[1]
    assert refusal_0 == refusal_1 and "'plain' exists already" in refusal_0


def test_metrics_and_result_have_the_names_that_dashboards_know():
    run, model, optimizer, batches = parts()
    values = iter([3.0, 2.0, 2.5, 2.25])
    evaluate = hook(2, lambda step: {"val/bpb": next(values)})
    result = fit(run, model, optimizer, batches, ToyPlan(), nats, Every(grad_norm=True), [evaluate])
    rows = read_metrics(run.dir)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    names = {
        "train/loss",
        "train/lrm",
        "train/dt",
        "train/tok_per_sec",
        "train/mfu",
        "train/epoch",
        "train/grad_norm",
        "mem/peak_mib",
    }
    totals = {"step", "total_training_time", "total_training_flops"}
    for row in rows[:6]:
        assert set(row) == names | totals | ({"val/bpb"} if row["step"] % 2 == 0 else set())
        assert (
            row["train/tok_per_sec"] == pytest.approx(64 / row["train/dt"])
            and row["total_training_flops"] == row["step"] * 64 * 1000
        )
        assert row["train/mfu"] is None, "the peak of a CPU is unknown, not zero"
    assert rows[6] == {
        "step": 6,
        "val/bpb": 2.25,
        "total_training_time": rows[6]["total_training_time"],
        "total_training_flops": 384000,
    }
    for a, b in zip(rows, rows[1:]):
        assert b["total_training_time"] == pytest.approx(a["total_training_time"] + a["train/dt"])
    assert (
        result["val/bpb"] == 2.25 and result["min_val_bpb"] == 2.0 and result["tokens"] == 384 and result["step"] == 6
    )
    assert json.loads((run.dir / "result.json").read_text()) == result and run.finished
    smooth = 0.0
    for row in rows[:6]:
        smooth = 0.9 * smooth + 0.1 * row["train/loss"]
    assert result["train/loss"] == pytest.approx(smooth / (1 - 0.9**6))


def test_log_cadence_thins_the_lines_but_not_the_training(capsys):
    run, model, optimizer, batches = parts()
    fit(run, model, optimizer, batches, ToyPlan(num_iterations=10), nats, Every(log=4))
    assert [row["step"] for row in read_metrics(run.dir)] == [0, 4, 8, 9]
    every_step, model_2, optimizer, batches = parts("other")
    fit(every_step, model_2, optimizer, batches, ToyPlan(num_iterations=10), nats, Every(log=1))
    assert [losses(every_step)[i] for i in (0, 4, 8, 9)] == losses(run)
    same_weights(model.state_dict(), model_2.state_dict())


def test_evaluations_leave_no_trace():
    plain, model, optimizer, batches = parts("plain")
    fit(plain, model, optimizer, batches, ToyPlan(), noisy_nats, Every())
    run, watched, optimizer, batches = parts("watched")
    modes = []

    def evaluate(step) -> dict[str, float]:
        modes.append((watched.training, torch.is_grad_enabled()))
        torch.rand(7)
        torch.manual_seed(5)
        return {"val/bpb": watched(toy.global_micro_batch(0).inputs).mean().item()}

    fit(
        run,
        watched,
        optimizer,
        batches,
        ToyPlan(),
        noisy_nats,
        Every(),
        [hook(1, evaluate), Hook(at_steps(2), lambda step: torch.manual_seed(6) and None)],
    )
    assert losses(run) == losses(plain) and modes == [(False, False)] * 7 and watched.training
    same_weights(watched.state_dict(), model.state_dict())


@pytest.mark.slow
def test_dropout_is_on_in_training_and_exact_through_a_resume():
    """The model's own dropouts, all four: evaluations see none of them, and a run in two parts is the run in one."""
    config = replace(toy.CONFIG, embed_dropout=0.1, attn_dropout=0.2, resid_dropout=0.1, mlp_dropout=0.2)
    whole, model, optimizer, batches = parts("whole", config=config)
    seen = []

    def evaluate(step) -> dict[str, float]:
        a, b = (model(toy.global_micro_batch(0).inputs) for _ in range(2))
        seen.append(torch.equal(a, b))
        return {"val/bpb": a.mean().item()}

    fit(whole, model, optimizer, batches, ToyPlan(), nats, Every(save=3, keep="all"), [hook(2, evaluate)])
    assert seen == [True] * 4 and model.training
    without, *rest = parts("without")
    fit(without, *rest, ToyPlan(), nats, Every())
    assert losses(whole)[0] != losses(without)[0], "nothing was dropped"

    story = losses(whole)
    (whole.dir / "result.json").unlink()
    shutil.rmtree(whole.checkpoints / "step_000006")
    again, model_2, *rest = parts("whole", resume=True, config=config)
    torch.manual_seed(99)  # where the generator of another process may be
    fit(again, model_2, *rest, ToyPlan(), nats, Every())
    assert again.resume_from.name == "step_000003" and losses(again) == story
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), model_2.state_dict().values()))


def test_cadences_and_the_order_of_a_step(monkeypatch):
    run, model, optimizer, batches = parts()
    seen = []
    save = Mock()  # how often a copy was taken: the files are written beside the next steps
    plain = checkpoint.Writer.save
    monkeypatch.setattr(checkpoint.Writer, "save", lambda *a, **kw: save() and plain(*a, **kw))
    saved = lambda: save.call_count  # noqa: E731
    hooks = [
        hook(2, lambda step: seen.append(("eval", batches.n, saved())) or {}),
        Hook(at_steps(3), lambda step: seen.append(("sample", batches.n, saved()))),
    ]
    fit(run, model, optimizer, batches, ToyPlan(num_iterations=5), nats, Every(save=4, keep="all"), hooks)
    assert seen == [("eval", 0, 0), ("eval", 2, 0), ("sample", 3, 0), ("eval", 4, 1), ("eval", 5, 2), ("sample", 5, 2)]
    assert [s for s, _ in checkpoint.steps(run.checkpoints)] == [4, 5]


@pytest.mark.parametrize("cadence,expected", [(-1, [0, 1, 5]), (2, [0, 1, 2, 4, 5, 6])])
def test_evaluations_at_steps_named_one_by_one(cadence, expected):
    def when(step, last):
        return step in (0, 1, 5) or at_steps(cadence, first=True)(step, last)

    run, model, optimizer, batches = parts()
    fit(run, model, optimizer, batches, ToyPlan(), nats, Every(), [Hook(when, lambda step: {"val/n": batches.n})])
    assert [(r["step"], r["val/n"]) for r in read_metrics(run.dir) if "val/n" in r] == [(n, n) for n in expected]


def test_what_a_step_measures_stands_in_its_line():
    run, model, optimizer, batches = parts()
    seen = iter(range(100))
    fit(
        run,
        model,
        optimizer,
        batches,
        ToyPlan(num_iterations=4),
        nats,
        Every(log=2),
        measure=lambda: {"rl/n": next(seen)},
    )
    assert [(row["step"], row["rl/n"]) for row in read_metrics(run.dir)] == [(0, 0), (2, 2), (3, 3)], (
        "asked at every step"
    )


def test_all_cadences_off_still_saves_the_end():
    run, model, optimizer, batches = parts()
    never = [hook(-1, lambda step: pytest.fail("eval is off"))]
    fit(run, model, optimizer, batches, ToyPlan(), nats, Every(log=-1), never)
    assert [s for s, _ in checkpoint.steps(run.checkpoints)] == [6] and read_metrics(run.dir) == []


def test_a_crash_in_the_last_evaluation_loses_nothing():
    run, model, optimizer, batches = parts()

    def evaluate(step):
        if batches.n == 6:
            raise ZeroDivisionError
        return {}

    with pytest.raises(ZeroDivisionError):
        fit(run, model, optimizer, batches, ToyPlan(), nats, Every(), [hook(3, evaluate)])
    run, again, optimizer, batches = parts(resume=True)
    fit(run, again, optimizer, batches, ToyPlan(), nats, Every(), [hook(3, lambda step: {"val/bpb": 1.0})])
    assert optimizer.seen == [] and run.finished
    same_weights(again.state_dict(), model.state_dict())


def test_a_benchmark_finds_its_step_saved_and_is_left_where_a_signal_came():
    run, model, optimizer, batches = parts()
    seen = []

    def benchmark(step):
        while not (found := checkpoint.steps(run.checkpoints)):  # it is written beside the benchmark
            time.sleep(0.01)
        seen.append((batches.n, [step for step, _ in found], stop.asked()))
        os.kill(os.getpid(), signal.SIGTERM)
        toy.ALONE.check_stop(stop.asked())

    stop, saved = StopRequest(), Hook(at_steps(3), benchmark, saved=True)
    with pytest.raises(SystemExit) as left:
        fit(run, model, optimizer, batches, ToyPlan(), nats, Every(), [saved], stop=stop)
    assert seen == [(3, [3], False)] and left.value.code == 128 + signal.SIGTERM
    run, model, optimizer, batches = parts(resume=True)
    fit(
        run, model, optimizer, batches, ToyPlan(), nats, Every(), [saved._replace(do=lambda step: {"core_metric": 1.0})]
    )
    assert [row["step"] for row in read_metrics(run.dir) if "core_metric" in row] == [3, 6], "measured again"


@pytest.mark.fault("core likely: Checkpoints hold up all GPUs")
def test_steps_go_on_while_a_checkpoint_is_written(monkeypatch):
    """The write of step 2 ends after step 4 began: it holds the state of step 2, and that of step 4 waits for it."""
    run, model, optimizer, batches = parts()
    write, going_on, order, then = checkpoint._save, threading.Event(), [], {}

    def slow(root, step, *rest):
        order.append(("begins", step))
        assert step != 2 or going_on.wait(60)
        write(root, step, *rest)
        order.append(("ends", step))

    def loss(model, batch):
        if batches.n == 3:  # the third step: two updates have been made
            then.update({name: value.clone() for name, value in model.state_dict().items()})
        if batches.n == 4:
            assert order == [("begins", 2)] and not checkpoint.steps(run.checkpoints)
            going_on.set()
        return nats(model, batch)

    monkeypatch.setattr(checkpoint, "_save", slow)
    fit(run, model, optimizer, batches, ToyPlan(), loss, Every(save=2, keep="all"))
    assert order == [(what, step) for step in (2, 4, 6) for what in ("begins", "ends")]
    same_weights(checkpoint.load_weights(run.checkpoints / "step_000002"), then)


@pytest.mark.fault("core likely: Checkpoints hold up all GPUs")
def test_an_error_waits_for_the_write_and_a_failed_write_ends_the_run(monkeypatch, capsys):
    run, model, optimizer, batches = parts()
    write, raised = checkpoint._save, threading.Event()

    def slow(root, step, *rest):
        assert raised.wait(60)
        write(root, step, *rest)

    def loss(model, batch):
        if batches.n == 4:
            raised.set()
            raise KeyError("of the loss")
        return nats(model, batch)

    monkeypatch.setattr(checkpoint, "_save", slow)
    with pytest.raises(KeyError):
        fit(run, model, optimizer, batches, ToyPlan(), loss, Every(save=2))
    checkpoint.verify(run.checkpoints / "step_000002")
    assert run._lock is None, "the directory is free, and nobody writes there any more"

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_save", write)
    monkeypatch.setattr(checkpoint, "_write", full)
    run, model, optimizer, batches = parts(resume=True)
    with pytest.raises(UserError) as error:
        fit(run, model, optimizer, batches, ToyPlan(num_iterations=400), nats, Every(save=4))
    assert error.value.code == "checkpoint-not-written" and error.value.values["step"] == 4 and batches.n <= 8
    assert [step for step, _ in checkpoint.steps(run.checkpoints)] == [2]


def test_retention_keeps_the_best_by_bpb():
    run, model, optimizer, batches = parts()
    bpb = {0: 0.5, 1: 4.0, 2: 1.0, 3: 3.0, 4: 2.0, 5: 2.0, 6: 2.0}
    fit(
        run,
        model,
        optimizer,
        batches,
        ToyPlan(),
        nats,
        Every(save=1, keep=1),
        [hook(1, lambda step: {"val/bpb": bpb[batches.n]})],
    )
    assert [s for s, _ in checkpoint.steps(run.checkpoints)] == [2, 6]


@pytest.mark.parametrize("keep", ["0", "-1", "some", 0])
def test_keep_is_checked_before_training(keep):
    with pytest.raises(UserError, match="--keep"):
        Every(keep=keep)


@pytest.mark.parametrize("where", [1, 3, 5])
def test_resumed_is_uninterrupted_to_the_bit(where):
    whole, model, optimizer, batches = parts("whole")
    hooks = [hook(2, lambda step: {"val/bpb": torch.rand(()).item()})]
    every = Every(save=where, keep="all")
    whole_result = fit(whole, model, optimizer, batches, ToyPlan(), noisy_nats, every, hooks)

    class Crash(Exception):
        pass

    def fails_late(model, batch):
        if batches.n == where + 1:
            raise Crash
        return noisy_nats(model, batch)

    run, _, optimizer, batches = parts("crashed")
    with pytest.raises(Crash):
        fit(run, _, optimizer, batches, ToyPlan(), fails_late, every, hooks)
    run, resumed, optimizer, batches = parts("crashed", resume=True)
    torch.manual_seed(12345)
    result = fit(run, resumed, optimizer, batches, ToyPlan(), noisy_nats, every, hooks)
    assert losses(run) == losses(whole) and len(losses(run)) == 6
    assert [r.get("val/bpb") for r in read_metrics(run.dir)] == [r.get("val/bpb") for r in read_metrics(whole.dir)]
    same_weights(resumed.state_dict(), model.state_dict())
    for key in ("train/loss", "val/bpb", "min_val_bpb", "tokens", "total_training_flops"):
        assert result[key] == whole_result[key]
    assert optimizer.seen[0]["lm_head"] == pytest.approx(
        (optimizer.groups[0]["initial_lr"] * (1 - 0.7 * where / 6), None, 0.01)
    )


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_the_last_checkpoint_carries_on():
    whole, model, optimizer, batches = parts("whole")
    fit(whole, model, optimizer, batches, ToyPlan(), noisy_nats, Every())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    run, _, optimizer, batches = parts()

    def fill_the_disk(step) -> dict[str, float]:
        if batches.n == 3:
            while not checkpoint.steps(run.checkpoints):
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        return {}

    try:
        with pytest.raises(UserError) as error:
            fit(run, _, optimizer, batches, ToyPlan(), noisy_nats, Every(save=2), [hook(1, fill_the_disk)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (error.value.code, error.value.values["step"]) == ("checkpoint-not-written", 4)
    run, resumed, optimizer, batches = parts(resume=True)
    assert run.resume_from.name == "step_000002"
    fit(run, resumed, optimizer, batches, ToyPlan(), noisy_nats, Every())
    assert losses(run) == losses(whole)
    same_weights(resumed.state_dict(), model.state_dict())


def test_meta_says_what_the_checkpoint_is():
    run, model, optimizer, batches = parts()
    run.identify(data_fingerprint="d1", tokenizer_hash="t1")
    fit(run, model, optimizer, batches, ToyPlan(), nats, Every())
    meta = checkpoint.load_meta(checkpoint.newest_valid(run.checkpoints))
    assert (
        meta["step"] == 6
        and meta["tokens"] == 384
        and meta["batches"] == {"n": 6}
        and meta["plan"]["flops_per_token"] == 1000
    )
    assert meta["data_fingerprint"] == "d1" and meta["tokenizer_hash"] == "t1" and meta["model_config"]["n_layer"] == 3
    assert (
        meta["config"]["depth"] == 20 and meta["env"]["torch"] == torch.__version__ and meta["env"]["world_size"] == 1
    )
    assert meta["loop"].keys() == {
        "step",
        "total_training_time",
        "compile_seconds",
        "waits",
        "smooth_loss",
        "min_val_bpb",
    }


# what stops it


def test_a_loss_that_is_not_finite_stops_before_the_update():
    run, model, optimizer, batches = parts()
    before = {}

    def loss(model, batch):
        if batches.n == 6 and torch.equal(
            batch.inputs, toy.global_micro_batch(4).inputs
        ):  # step 2, the second of its two
            before.update({k: v.clone() for k, v in model.state_dict().items()})
            return nats(model, batch) * math.nan
        return nats(model, batch)

    with pytest.raises(
        NonFinite, match=r"step 2 .*micro-batch 1 of 2 \(nan\) on rank 0, made of document 4\. .*not updated"
    ):
        fit(run, model, optimizer, batches, ToyPlan(grad_accum=2), loss, Every())
    assert len(optimizer.seen) == 2 and len(losses(run)) == 2 and not run.finished
    same_weights(model.state_dict(), before)


def test_a_gradient_that_is_not_finite_stops_too():
    run, model, optimizer, batches = parts()

    def loss(model, batch):
        total = nats(model, batch)
        # 0, with an infinite slope
        return total + (0.0 * model.lm_head.weight.sum()).sqrt() if batches.n == 3 else total

    with pytest.raises(NonFinite, match="step 2 .* a gradient on rank 0, made of document 2"):
        fit(run, model, optimizer, batches, ToyPlan(), loss, Every())
    assert len(optimizer.seen) == 2


def test_a_global_batch_without_targets_is_said():
    run, model, optimizer, batches = parts()

    class Empty(toy.ToyBatches):
        def next(self):
            batch = super().next()
            return batch._replace(targets=torch.full_like(batch.targets, -1), n_targets=0)

    with pytest.raises(NonFinite, match="no target at all"):
        fit(run, model, optimizer, Empty(toy.ALONE), ToyPlan(), nats, Every())


@pytest.mark.parametrize(
    "rows,accum,typed",
    [
        (4, 1, "--device-batch-size 2"),
        (5, 2, "--device-batch-size 2"),
        (5, 3, "--device-batch-size 1"),
        (1, 1, "--max-seq-len"),
    ],
)
def test_out_of_memory_names_the_flag_and_a_value_that_divides(rows, accum, typed):
    run, model, optimizer, batches = parts()
    plan = ToyPlan(device_batch_size=rows, grad_accum=accum)
    with pytest.raises(UserError) as error:
        fit(run, model, optimizer, batches, plan, lambda m, b: torch.empty(1 << 50), Every())
    assert f"--device-batch-size {rows}:" in str(error.value) and f"type {typed}" in str(error.value).replace(
        "half the ", ""
    )


def test_other_errors_keep_their_own_words():
    run, model, optimizer, batches = parts()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(run, model, optimizer, batches, ToyPlan(), lambda m, b: torch.ones(2, 3) @ torch.ones(2, 3), Every())


@pytest.mark.parametrize("frozen", [False, True])
def test_garbage_collection_is_quiet_inside_and_restored_outside(frozen):
    """Where something was frozen before, as in conftest.py, it stays so."""
    if not frozen:
        gc.unfreeze()
    run, model, optimizer, batches = parts()
    states = []

    def loss(model, batch):
        states.append((gc.isenabled(), gc.get_freeze_count() > 0))
        return nats(model, batch)

    fit(run, model, optimizer, batches, ToyPlan(num_iterations=3), loss, Every())
    assert states == [(True, frozen), (False, True), (False, True)]
    assert gc.isenabled() and (gc.get_freeze_count() > 0) == frozen
    run, model, optimizer, batches = parts("fails")
    with pytest.raises(ZeroDivisionError):
        fit(run, model, optimizer, batches, ToyPlan(), lambda m, b: nats(m, b) if batches.n < 3 else 1 / 0, Every())
    assert gc.isenabled() and (gc.get_freeze_count() > 0) == frozen
    gc.freeze()


# the clock


@pytest.mark.slow
def test_the_clock_can_be_the_horizon_and_survives_a_resume(monkeypatch):
    clock_now = [0.0]
    monkeypatch.setattr("nanolab.training.fit.time.perf_counter", lambda: clock_now[0])

    def one_second(model, batch):
        clock_now[0] += 1.0
        if crash_at is not None and clock_now[0] > crash_at:
            raise ZeroDivisionError
        return nats(model, batch)

    def slow_evaluation(step) -> dict[str, float]:
        clock_now[0] += 100.0  # not training time
        return {"val/bpb": 1.0}

    plan, crash_at = ToyPlan(num_iterations=None, max_seconds=5.0), None
    every, hooks = Every(save=1), [hook(2, slow_evaluation)]
    crash_at = 302.5
    run, model, optimizer, batches = parts()
    with pytest.raises(ZeroDivisionError):
        fit(run, model, optimizer, batches, plan, one_second, every, hooks)
    crash_at = None
    run, model, optimizer, batches = parts(resume=True)
    result = fit(run, model, optimizer, batches, plan, one_second, every, hooks)
    rows = read_metrics(run.dir)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5] and result["total_training_time"] == 5.0
    assert [row["total_training_time"] for row in rows] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert [row["train/lrm"] for row in rows[:5]] == pytest.approx([1 - 0.7 * s / 5 for s in range(5)])


@pytest.mark.slow
@pytest.mark.fault("core D8")
def test_compiling_is_no_training_time(monkeypatch):
    """The first call takes 90 s, all others 1 s: a run of 5 s makes five steps, and again after a resume, which
    compiles again.
    """
    clock_now, cold, crash_at = [0.0], [True], 3
    monkeypatch.setattr("nanolab.training.fit.time.perf_counter", lambda: clock_now[0])

    def loss(model, batch):
        if batches.n > crash_at:
            raise ZeroDivisionError
        clock_now[0] += 90.0 if cold[0] else 1.0
        cold[0] = False
        return nats(model, batch)

    plan, every = ToyPlan(num_iterations=None, max_seconds=5.0), Every(save=1)
    run, model, optimizer, batches = parts()
    with pytest.raises(ZeroDivisionError):
        fit(run, model, optimizer, batches, plan, loss, every, step_model=model)
    cold, crash_at = [True], 100
    run, model, optimizer, batches = parts(resume=True)
    result = fit(run, model, optimizer, batches, plan, loss, every, step_model=model)
    rows = read_metrics(run.dir)
    assert result["step"] == 5 and result["total_training_time"] == 5.0 and result["tok_per_sec"] == 64
    assert result["compile_seconds"] == rows[-1]["compile_seconds"] == 180.0
    assert [row["train/dt"] for row in rows[:5]] == [1.0] * 5
    assert [row["train/lrm"] for row in rows[:5]] == pytest.approx([1 - 0.7 * s / 5 for s in range(5)])
    assert checkpoint.load_meta(checkpoint.newest_valid(run.checkpoints))["loop"]["compile_seconds"] == 180.0


@pytest.mark.slow
@pytest.mark.fault("core D8")
def test_a_compiled_run_is_the_same_run(capsys):
    """Losses, weights, optimizer, batches and random numbers, to the bit; every shape of the first step is compiled
    before it.
    """
    seen, found = [], {}

    class Uneven(toy.ToyBatches):  # the second micro-batch of each step is smaller
        def next(self):
            batch = super().next()
            return batch if self.n % 2 else batch._replace(inputs=batch.inputs[:1], targets=batch.targets[:1])

    def loss(model, batch):
        seen.append(len(batch.inputs))
        return noisy_nats(model, batch)

    for compiled in (False, True):
        run, model, optimizer, batches = parts(f"compiled-{compiled}")
        batches = Uneven(toy.ALONE)
        result = fit(
            run, model, optimizer, batches, ToyPlan(grad_accum=2), loss, Every(), step_model=model if compiled else None
        )
        assert (
            ("compile_seconds" in result) == compiled == any("compile_seconds" in row for row in read_metrics(run.dir))
        )
        state = {name: value.clone() for name, value in model.state_dict().items()}
        found[compiled] = losses(run), state, optimizer.state_dict(), batches.n, torch.get_rng_state()
    assert seen == [2, 1] * 6 + [2, 1] + [2, 1] * 6, "one pass more for each shape"
    assert "compiled        in" in capsys.readouterr().out
    (plain, weights, moments, n, rng), (losses_2, weights_2, moments_2, n_2, rng_2) = found.values()
    assert plain == losses_2 and n == n_2 and torch.equal(rng, rng_2)
    for a, b in ((weights, weights_2), (moments, moments_2)):
        assert a.keys() == b.keys() and all(
            torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
        )


@pytest.mark.slow
@pytest.mark.fault("core D8")
def test_a_model_in_torchs_compiler_is_the_same_run():
    """Through Dynamo, with dropout, on a backend that computes as the model itself does."""
    config, found = replace(toy.CONFIG, resid_dropout=0.2), []
    for compile_ in (None, "eager"):
        run, model, optimizer, batches = parts(f"by-{compile_}", config=config)
        step_model = torch.compile(model, backend=compile_, dynamic=False) if compile_ else None
        fit(run, model, optimizer, batches, ToyPlan(num_iterations=3, model=config), step_model=step_model)
        found.append((losses(run), model.state_dict()))
    assert found[0][0] == found[1][0]
    same_weights(found[0][1], found[1][1])


def line(**changes) -> str:
    usual = dict(progress=0.5, loss=3.25, lrm=1.0, dt=0.1, tokens=1000, mfu=None, epoch=1.0, elapsed=12.0, left=None)
    return step_line(changes.pop("step", 3), changes.pop("total", 100), **{**usual, **changes})


def test_the_step_line_never_changes_width():
    usual = line()
    assert "mfu unknown" in usual and "0.0%" not in usual.split("mfu")[1]
    for changes in (
        {"step": 99, "progress": 0.99},
        {"loss": 123.4567},
        {"loss": 0.01},
        {"dt": 9999.0},
        {"dt": 0.0001},
        {"tokens": 10**7},
        {"mfu": 45.2},
        {"epoch": 999.9},
        {"elapsed": 359999.0, "left": 12.0},
        {"left": 5e5},
        {"lrm": 0.05, "progress": 1.0},
    ):
        assert len(line(**changes)) == len(usual), changes
    assert len(line(total=10**6, step=1)) == len(line(total=10**6, step=10**6))
    assert line(step=12, total=None).startswith("step 00012  50.0% |")
    assert clock(3661) == "  1:01:01" and clock(59.6) == "  0:01:00" and len(clock(None)) == 9


def test_eta_forgets_the_slow_first_steps():
    eta = Eta()
    assert eta.after(60.0, 100) is None and eta.after(1.0, 99) is None
    assert eta.after(1.0, 98) == 98.0 and eta.after(3.0, 10) == 20.0


# fp16


def test_loss_scaling_by_powers_of_two_changes_nothing():
    plain, model, optimizer, batches = parts("plain")
    fit(plain, model, optimizer, batches, ToyPlan(), nats, Every())
    run, scaled, optimizer, batches = parts("scaled", runtime=replace(toy.ALONE, dtype=torch.float16))
    fit(run, scaled, optimizer, batches, ToyPlan(), nats, Every())
    assert losses(run) == losses(plain)
    same_weights(scaled.state_dict(), model.state_dict())


def test_an_overflow_skips_the_update_and_halves_the_scale():
    run, model, optimizer, batches = parts(runtime=replace(toy.ALONE, dtype=torch.float16))

    def steep(model, batch):
        w = model.lm_head.weight.sum()
        return nats(model, batch) + (1e36 * (w - w.detach()) if batches.n == 2 else 0)

    fit(run, model, optimizer, batches, ToyPlan(num_iterations=3), steep, Every())
    assert len(optimizer.seen) == 2
    meta = checkpoint.load_meta(checkpoint.newest_valid(run.checkpoints))
    assert meta["scaler"] == {"scale": 32768.0, "good_steps": 1}


@pytest.mark.slow
@pytest.mark.fault("N5")
def test_the_expected_time_is_corrected_after_ten_steps(capsys):
    """One line, from measured steps; none in a run that ends by then."""
    for name, steps, lines in (("long", 12, 1), ("short", 10, 0)):
        fit(*parts(name), ToyPlan(num_iterations=steps), nats, Every(log=-1))
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("expected time")]
        assert len(said) == lines and all(re.search(r"about [\d:]+ in all, [\d:]+ left", line) for line in said)

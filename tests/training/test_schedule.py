"""The dial and the schedules against the published numbers of the reference harness."""

import dataclasses
import math

import pytest

from nanolab.cli import UserError
from nanolab.model.accounting import n_params
from nanolab.model.config import Architecture, GPTConfig
from nanolab.stages.config import BaseTrainConfig
from nanolab.training.schedule import Plan, gpt_config, make_plan

# ratio 12, vocabulary 32768, rows of 2048, SSSL. M = 10^6 parameters, B = 10^9 tokens; as published, hence the
# roundings.
# depth  C    H   wte   VE      lm    matrices total  N       tokens batch  steps  LR     decay  FLOPs/token  FLOPs
PUBLISHED = """
  4   256   2   8.4    16.8   8.4     3.1   36.7    11.5   0.14  18    528  0.707  1.890  8.02e7  1.1e16
  6   384   3  12.6    37.7  12.6    10.6   73.5    23.2   0.28  18   1062  0.707  0.940  1.68e8  4.7e16
  8   512   4  16.8    67.1  16.8    25.2  125.8    41.9   0.50  18   1920  0.707  0.520  2.96e8  1.5e17
 10   640   5  21.0   104.9  21.0    49.2  196.0    70.1   0.84  19   1605  1.000  0.440  4.96e8  4.2e17
 12   768   6  25.2   151.0  25.2    84.9  286.3   110.1   1.32  19   2520  1.000  0.280  7.60e8  1.0e18
 16  1024   8  33.6   268.4  33.6   201.3  536.9   234.9   2.82  19   5376  1.000  0.131  1.59e9  4.5e18
 20  1280  10  41.9   419.4  41.9   393.2  896.5   435.2   5.22  20   4980  1.414  0.100  2.89e9  1.5e19
 24  1536  12  50.3   604.0  50.3   679.5 1384.1   729.8   8.76  20   8352  1.414  0.060  4.78e9  4.2e19
 26  1664  13  54.5   708.8  54.5   863.9 1681.8   918.4  11.0   20  10510  1.414  0.048  5.99e9  6.6e19
 32  2048  16  67.1  1073.7  67.1  1610.6 2818.6  1677.7  20.1   21   9600  2.000  0.037  1.08e10 2.2e20
"""
ROWS = [line.split() for line in PUBLISHED.strip().splitlines()]


def rounds_to(value: float, published: str) -> bool:
    """Does `value` round to the published digits? One unit of the last place is granted: some were cut off, not
    rounded.
    """
    digits = published.split("e")[0]
    unit = 10.0 ** -len(digits.partition(".")[2]) * (10.0 ** int(published.split("e")[1]) if "e" in published else 1.0)
    return abs(value - float(published)) < unit


@pytest.mark.parametrize("row", ROWS, ids=[f"depth {r[0]}" for r in ROWS])
def test_published_table(row):
    depth, C, H, wte, ve, head, matrices, total, N, tokens, batch, steps, lr, decay, flops_token, flops = row
    plan = make_plan(BaseTrainConfig(depth=int(depth)), vocab_size=32768, world_size=1)
    p = n_params(plan.model)
    assert (plan.model.n_embd, plan.model.n_head, plan.model.n_kv_head, plan.model.n_layer) == (
        int(C),
        int(H),
        int(H),
        int(depth),
    )
    for key, want in dict(wte=wte, tables=ve, lm_head=head, matrices=matrices, total=total, scaling=N).items():
        assert rounds_to(p[key] / 1e6, want), (key, p[key], want)
    assert (plan.total_batch_size, plan.num_iterations) == (2 ** int(batch), int(steps))
    assert plan.tokens == plan.total_batch_size * plan.num_iterations
    assert rounds_to(plan.tokens / 1e9, tokens)
    assert rounds_to(plan.batch_scale, lr) and rounds_to(plan.weight_decay, decay)
    assert rounds_to(plan.flops_per_token, flops_token) and rounds_to(plan.flops, flops)


def test_speedrun_ratio():
    """Depth 24 at ratio 8: 5.84 B tokens, 5568 steps, decay 0.060 (the ratio cancels), 2.8e19 FLOPs."""
    plan = make_plan(BaseTrainConfig(depth=24, target_param_data_ratio=8), 32768, world_size=8)
    assert (plan.total_batch_size, plan.num_iterations, plan.grad_accum) == (2**20, 5568, 2)
    assert (
        rounds_to(plan.tokens / 1e9, "5.84")
        and rounds_to(plan.weight_decay, "0.060")
        and rounds_to(plan.flops, "2.8e19")
    )


def test_lr_scale_replaces_the_batch_law():
    """T_epoch = B / (lr * decay * D) is the same with and without it: 4 times the rate, a quarter of the decay."""
    law = make_plan(BaseTrainConfig(depth=12, total_batch_size=2**15, device_batch_size=8), 32768, 1)
    own = make_plan(BaseTrainConfig(depth=12, total_batch_size=2**15, device_batch_size=8, lr_scale=1.0), 32768, 1)
    assert (law.batch_scale, own.batch_scale) == (0.25, 1.0)
    assert law.weight_decay == pytest.approx(0.28 * 0.25) and own.weight_decay == pytest.approx(0.28 * 0.25 / 4)
    assert own.num_iterations == law.num_iterations


def test_width_rounds_up_to_whole_heads():
    assert gpt_config(BaseTrainConfig(depth=5), 100).n_embd == 384  # 5 x 64 = 320 -> 3 heads of 128
    assert gpt_config(BaseTrainConfig(depth=3, aspect_ratio=40, head_dim=32), 100).n_embd == 128  # 120 -> 4 heads of 32
    assert gpt_config(BaseTrainConfig(depth=4), 100).n_embd == 256


def test_every_architecture_flag_reaches_the_model():
    """Each field, changed on its own, is what the model's config holds; nothing else moves."""
    other = {
        "attention": "gqa:2",
        "window_pattern": "L",
        "position_pattern": "R,R,N",
        "bias": "qkv,mlp",
        "rope_fraction": 0.5,
        "softmax_n": 3.0,
    }
    for f in dataclasses.fields(Architecture):
        kinds = {bool: not f.default, float: 0.25, int: 3, str: "another"}
        value = other.get(f.name, kinds[type(f.default)])
        model = gpt_config(BaseTrainConfig(depth=4, max_seq_len=96, **{f.name: value}), 1000, bos=991)
        want = GPTConfig(sequence_len=96, vocab_size=1000, n_layer=4, n_head=2, n_embd=256, bos=991)
        assert model == dataclasses.replace(want, **{f.name: value}), f.name


def test_the_reference_point_stays_where_the_rates_were_tuned():
    """A variant's batch follows from its own tokens; the depth-12 model that they are compared with is the default
    one.
    """
    plain = make_plan(BaseTrainConfig(depth=4), 32768, 1)
    lean = make_plan(
        BaseTrainConfig(depth=4, attention="gqa:1", positions="learned", tied_head=True, value_embeds=False), 32768, 1
    )
    assert lean.model.n_kv_head == 1
    ratio = n_params(lean.model)["scaling"] / n_params(plain.model)["scaling"]
    assert ratio < 0.98
    assert lean.weight_decay == pytest.approx(plain.weight_decay / ratio)
    assert make_plan(BaseTrainConfig(depth=5, attention="gqa:3"), 32768, 1).model.n_kv_head == 3, (
        "which does not divide the reference's heads"
    )


HORIZONS = dict(num_iterations=7, target_flops=1e15, target_param_data_ratio=20.0, max_seconds=60.0)


def test_horizon_precedence():
    """num_iterations, then target_flops, then target_param_data_ratio, then max_seconds; with none of them ratio 12."""
    cfg = BaseTrainConfig(depth=4, total_batch_size=2**18, **HORIZONS)
    assert make_plan(cfg, 32768, 1).num_iterations == 7
    cfg = dataclasses.replace(cfg, num_iterations=-1)
    # FLOPs per token: see test_flops_by_hand
    assert make_plan(cfg, 32768, 1).num_iterations == round(1e15 / (80_216_496 * 2**18))
    cfg = dataclasses.replace(cfg, target_flops=-1)
    assert make_plan(cfg, 32768, 1).num_iterations == 20 * 11_534_384 // 2**18
    cfg = dataclasses.replace(cfg, target_param_data_ratio=-1)
    plan = make_plan(cfg, 32768, 1)
    assert (plan.num_iterations, plan.max_seconds, plan.tokens, plan.flops) == (None, 60.0, None, None)
    cfg = dataclasses.replace(cfg, max_seconds=-1)
    assert make_plan(cfg, 32768, 1).num_iterations == 528


def test_flops_by_hand():
    """Depth 4: 4 layers of 12 C^2, gates of 2 layers with 2 heads x 12, head V x C, smear 24; windows 512 x 3 +
    2048.
    """
    matmul = 4 * 12 * 256**2 + 2 * 2 * 12 + 32768 * 256 + 24
    assert (
        make_plan(BaseTrainConfig(depth=4), 32768, 1).flops_per_token
        == 6 * matmul + 12 * 256 * (3 * 512 + 2048)
        == 80_216_496
    )


@pytest.mark.parametrize("horizon", HORIZONS)
def test_accumulation_and_rows(horizon):
    cfg = BaseTrainConfig(
        depth=4, max_seq_len=512, device_batch_size=4, total_batch_size=49152, **{horizon: HORIZONS[horizon]}
    )
    plan = make_plan(cfg, 8192, world_size=2)
    assert (plan.grad_accum, plan.rows_per_step, plan.world_size) == (12, 96, 2)


@pytest.mark.parametrize(
    "changes,world,typed",
    [
        (dict(total_batch_size=500_000), 8, "--total-batch-size 524288"),
        (dict(total_batch_size=100), 1, "--total-batch-size 65536"),
        (dict(total_batch_size=0), 1, "leave --total-batch-size out"),
        (dict(total_batch_size=65536 * 5 // 2), 1, "--total-batch-size 131072"),
        (dict(device_batch_size=0), 1, "--device-batch-size"),
        (dict(depth=0), 1, "--depth"),
        (dict(max_seq_len=-5), 1, "--max-seq-len"),
        (dict(head_dim=3, aspect_ratio=63), 1, "--head-dim"),
        (dict(window_pattern="SXL"), 1, "--window-pattern SSSL"),
        (dict(recipe="adamw_cosin"), 1, "did you mean --recipe adamw_cosine?"),
        (dict(mlp="gelu_tan"), 1, "gelu_tanh"),
    ],
)
def test_errors_say_what_to_type(changes, world, typed):
    with pytest.raises(UserError) as error:
        make_plan(dataclasses.replace(BaseTrainConfig(depth=20), **changes), 32768, world)
    assert typed in str(error.value)
    if typed.startswith("--total-batch-size "):  # what is proposed must work
        cfg = dataclasses.replace(BaseTrainConfig(depth=20), total_batch_size=int(typed.split()[1]))
        assert make_plan(cfg, 32768, world).total_batch_size == cfg.total_batch_size


def plan_of(n: int | None, **changes) -> Plan:
    return dataclasses.replace(make_plan(BaseTrainConfig(depth=4, num_iterations=n or 1000), 32768, 1), **changes)


def test_learning_rate_shape():
    """1000 steps, warm-up 40, warm-down from step 350 to 0.05 at the end."""
    plan = plan_of(1000)
    for step, want in {
        0: 1 / 40,
        19: 0.5,
        39: 1.0,
        200: 1.0,
        350: 1.0,
        675: 0.525,
        999: 0.05 + 0.95 / 650,
        1000: 0.05,
    }.items():
        assert plan.lr_multiplier(step, step / 1000) == pytest.approx(want), step
    flat = plan_of(1000, warmup_steps=0, warmdown_ratio=0.0)
    assert {flat.lr_multiplier(s, s / 1000) for s in range(1001)} == {1.0}
    assert plan_of(1000, final_lr_frac=0.0).lr_multiplier(1000, 1.0) == 0.0


def test_momentum_shape():
    """2000 steps: 0.85 -> 0.97 at step 400, 0.97 until the warm-down at 700, then to 0.90."""
    plan = plan_of(2000)
    for step, want in {0: 0.85, 200: 0.91, 400: 0.97, 550: 0.97, 700: 0.97, 1350: 0.935, 2000: 0.90}.items():
        assert plan.muon_momentum(step, step / 2000) == pytest.approx(want), step


def test_weight_decay_shape():
    plan = plan_of(1000)
    for progress, want in {0.0: 1.0, 1 / 3: 0.75, 0.5: 0.5, 2 / 3: 0.25, 1.0: 0.0}.items():
        assert plan.weight_decay_multiplier(0, progress) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 10, 50, 528, 3000])
def test_shapes_stay_in_range_and_never_jump(n):
    """At every step of short and long runs, and past the end, where a run by the clock may land."""
    plan = plan_of(n)
    shapes = [
        (f(s, s / n))
        for s in range(n + 1)
        for f in (plan.lr_multiplier, plan.muon_momentum, plan.weight_decay_multiplier)
    ]
    lr, momentum, decay = shapes[0::3], shapes[1::3], shapes[2::3]
    assert (
        all(0 < x <= 1 for x in lr)
        and all(0.85 <= x <= 0.97 + 1e-12 for x in momentum)
        and all(0 <= x <= 1 for x in decay)
    )
    for values, span in ((lr, 1.0), (momentum, 0.12), (decay, 1.0)):
        steepest = span * max(1 / 40, math.pi / 2 / n, 1 / (0.65 * n))
        assert all(abs(a - b) <= steepest + 1e-12 for a, b in zip(values, values[1:])), n
    for progress in (1.001, 2.0, 9.0):
        assert plan.lr_multiplier(5000, progress) == pytest.approx(0.05)
        assert plan.muon_momentum(5000, progress) == pytest.approx(0.90)
        assert plan.weight_decay_multiplier(5000, progress) == pytest.approx(0.0, abs=1e-12)

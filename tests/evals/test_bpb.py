"""Bits per byte against the definition, token by token, in float64."""

import math

import numpy as np
import pytest
import torch

from nanolab.cli import UserError
from nanolab.evals.bpb import bits_per_byte
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime

CONFIG = GPTConfig(sequence_len=16, vocab_size=40, n_layer=2, n_head=2, n_embd=32)
RUNTIME = Runtime(torch.device("cpu"), torch.float32)


def make_model() -> GPT:
    torch.manual_seed(3)
    model = GPT(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model


def make_rows(n: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """inputs, targets with ignored places and a whole ignored row, bytes per token; ids 10 to 19 are special."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, CONFIG.vocab_size, (n, 17))
    targets = ids[:, 1:].copy()
    targets[rng.random(targets.shape) < 0.2] = -1
    targets[2] = -1
    lengths = rng.integers(1, 9, CONFIG.vocab_size).astype(np.int32)
    lengths[10:20] = 0
    return ids[:, :-1].astype(np.int32), targets.astype(np.int32), lengths


def by_definition(
    model: GPT, inputs: np.ndarray, targets: np.ndarray, lengths: np.ndarray
) -> tuple[float, float, int, int, float]:
    rows, n_tokens = [], 0  # nats and bytes of each
    for row, wanted in zip(inputs, targets):
        nats, n_bytes = 0.0, 0
        with torch.no_grad():
            logits = model(torch.from_numpy(row).long()[None])[0].double().numpy()
        for t, y in enumerate(wanted):
            if y >= 0 and lengths[y] > 0:
                nats -= logits[t, y] - np.log(np.exp(logits[t]).sum())
                n_bytes, n_tokens = n_bytes + int(lengths[y]), n_tokens + 1
        rows += [(nats, n_bytes)] if n_bytes else []
    nats, n_bytes, n = *map(sum, zip(*rows)), len(rows)
    residuals = [x - nats / n_bytes * b for x, b in rows]
    error = math.sqrt(n / (n - 1) * sum(r * r for r in residuals)) / n_bytes
    return nats / (math.log(2) * n_bytes), nats, n_bytes, n_tokens, error / math.log(2)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_it_is_the_definition_at_any_batch_size(batch_size):
    model, (inputs, targets, lengths) = make_model(), make_rows()
    expected = by_definition(model, inputs, targets, lengths)
    got = bits_per_byte(model, (inputs, targets), lengths, RUNTIME, batch_size)
    assert got == pytest.approx(expected, rel=1e-6)
    assert (got.n_bytes, got.n_tokens) == expected[2:4]


def test_a_uniform_model_needs_log2_v_bits_per_token():
    model, (inputs, targets, lengths) = make_model(), make_rows()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    got = bits_per_byte(model, (inputs, targets), np.where(lengths > 0, 4, 0), RUNTIME)
    assert got.bpb == pytest.approx(math.log2(CONFIG.vocab_size) / 4, rel=1e-6)


def test_special_and_ignored_targets_count_neither_as_nats_nor_as_bytes():
    model, (inputs, targets, lengths) = make_model(), make_rows()
    masked = targets.copy()
    masked[(targets >= 0) & (lengths[targets] == 0)] = -1
    assert (masked != targets).any()
    assert bits_per_byte(model, (inputs, targets), lengths, RUNTIME) == bits_per_byte(
        model, (inputs, masked), lengths, RUNTIME
    )
    without_row = tuple(np.delete(half, 2, axis=0) for half in (inputs, targets))
    got, expected = (bits_per_byte(model, rows, lengths, RUNTIME, 1) for rows in ((inputs, targets), without_row))
    assert got == pytest.approx(expected, rel=1e-12)


def test_the_interval_is_that_of_drawing_rows_again():
    """Against the bootstrap of rows (Efron 1979), on rows of very different lengths."""
    model, (inputs, targets, lengths), rng = make_model(), make_rows(150), np.random.default_rng(1)
    for row, end in zip(targets, rng.integers(1, 17, len(targets))):
        row[end:] = -1
    got = bits_per_byte(model, (inputs, targets), lengths, RUNTIME)
    each = [
        bits_per_byte(model, (inputs[i : i + 1], targets[i : i + 1]), lengths, RUNTIME)
        for i in np.flatnonzero((lengths[targets] * (targets >= 0)).any(1))
    ]
    nats, n_bytes = np.array([(row.nats, row.n_bytes) for row in each]).T
    draws = rng.integers(0, len(each), (4000, len(each)))
    ratios = nats[draws].sum(1) / n_bytes[draws].sum(1) / math.log(2)
    assert got.error == pytest.approx(ratios.std(), rel=0.05)
    assert got.interval == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.25 * got.error)
    assert each[0].error is None and each[0].interval is None  # one row says nothing of others


def test_rows_that_are_alike_leave_no_doubt():
    model, (inputs, targets, lengths) = make_model(), make_rows()
    got = bits_per_byte(model, [np.repeat(half[:1], 5, axis=0) for half in (inputs, targets)], lengths, RUNTIME, 2)
    assert got.error == pytest.approx(0, abs=1e-7 * got.bpb)


def test_the_callers_rows_are_left_alone():
    model, (inputs, targets, lengths) = make_model(), make_rows()
    before = targets.copy()
    bits_per_byte(model, (inputs, targets), lengths, RUNTIME)
    assert (targets == before).all()


def test_nothing_to_count_is_an_error():
    model, (inputs, targets, lengths) = make_model(), make_rows()
    for t, n in ((np.full_like(targets, -1), lengths), (targets, lengths * 0), (targets[:0], lengths)):
        with pytest.raises(UserError, match="no byte to count"):
            bits_per_byte(model, (inputs[: len(t)], t), n, RUNTIME)


def test_two_ranks_give_the_figure_of_one(run_ranks):
    model, (inputs, targets, lengths) = make_model(), make_rows()
    alone = bits_per_byte(model, (inputs, targets), lengths, RUNTIME, 2)
    for got in run_ranks(measure, 2):
        assert got == pytest.approx(tuple(alone), rel=1e-6)
        assert got[2:4] == alone[2:4]


def measure(runtime: Runtime) -> tuple:
    inputs, targets, lengths = make_rows()
    return tuple(bits_per_byte(make_model(), (inputs, targets), lengths, runtime, 2))


@pytest.mark.parametrize("ranks, n", [(3, 7), (5, 7), (7, 3)])
def test_any_number_of_ranks_measures_what_one_measures(ranks, n):
    """Some of seven ranks have no row at all."""
    model, g = (
        GPT(GPTConfig(sequence_len=8, vocab_size=64, n_layer=1, n_head=1, n_embd=32)),
        torch.Generator().manual_seed(0),
    )
    model.init_weights(1)
    inputs, targets = (torch.randint(64, (n, 8), generator=g).numpy() for _ in range(2))
    parts = []

    class Rank(Runtime):
        def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
            parts.append(tensor.clone())
            return sum(parts)

    alone = bits_per_byte(
        model, (inputs, targets), np.ones(64, dtype=np.int32), Runtime(torch.device("cpu"), torch.float32), 2
    )
    for rank in range(ranks):
        last = bits_per_byte(
            model,
            (inputs, targets),
            np.ones(64, dtype=np.int32),
            Rank(torch.device("cpu"), torch.float32, rank=rank, world_size=ranks),
            2,
        )
    assert last.nats == pytest.approx(alone.nats, rel=1e-6) and last[2:4] == alone[2:4]


class OneShape(torch.nn.Module):
    """Stands in for a compiled model: it takes batches of one size alone."""

    def __init__(self, model: GPT, rows: int):
        super().__init__()
        self.model, self.rows, self.calls = model, rows, 0

    def forward(self, x: torch.Tensor, y: torch.Tensor, reduction: str) -> torch.Tensor:
        assert len(x) == len(y) == self.rows
        self.calls += 1
        return self.model(x, y, reduction=reduction)


def test_a_compiled_model_sees_full_batches():
    model, (inputs, targets, lengths) = make_model(), make_rows(7)
    alone, keep = bits_per_byte(model, (inputs, targets), lengths, RUNTIME, 4), []
    step_model = OneShape(model, 4)
    got = bits_per_byte(step_model, (inputs, targets), lengths, RUNTIME, 4, keep=keep, full=True)
    assert got == pytest.approx(tuple(alone), rel=1e-6) and got[2:4] == alone[2:4]
    assert step_model.calls == 2 and len(keep) == 7


def test_shares_give_the_figure_of_one(run_ranks):
    model, (inputs, targets, lengths) = make_model(), make_rows(7)
    alone = bits_per_byte(model, (inputs, targets), lengths, RUNTIME, 2)
    assert bits_per_byte(model, (inputs, targets), lengths, RUNTIME, 2, shared=True) == alone
    for got, n in run_ranks(measure_share, 2):
        assert got == pytest.approx(tuple(alone), rel=1e-6)
        assert got[2:4] == alone[2:4] and n == 8


def measure_share(runtime: Runtime) -> tuple:
    inputs, targets, lengths = make_rows(7)
    share = [half[runtime.rank :: 2] for half in (inputs, targets)]
    if len(share[0]) < 4:  # a row without a target, as `validation_rows` adds it
        share = [np.concatenate((half, np.full_like(half[:1], fill))) for half, fill in zip(share, (0, -1))]
    keep: list = []
    return tuple(bits_per_byte(make_model(), share, lengths, runtime, 3, keep=keep, shared=True)), len(keep)

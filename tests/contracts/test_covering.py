"""The covering array covers, the axes are all there, and what cannot go together is refused."""

import dataclasses
import itertools
import random
import re
import runpy
from pathlib import Path

import axes
import contracts
import pytest
import torch
from covering import covering_rows, every_pair

from nanolab.cli import UserError
from nanolab.model import accounting
from nanolab.model.config import Architecture
from nanolab.model.gpt import GPT
from nanolab.model.kernels import banded
from nanolab.model.variants import tables

TOY = {"a": ["1", "2", "3"], "b": ["1", "2", "3", "4"], "c": ["1", "2"], "d": ["1", "2", "3"], "e": ["1", "2"]}


def not_all_alike(row):
    return not (row.get("a") == "3" and row.get("b") in ("1", "4")) and not (
        row.get("c") == "2" and row.get("d") == "2"
    )


def pairs_in(rows):
    return {frozenset(pair) for row in rows for pair in itertools.combinations(row.items(), 2)}


@pytest.mark.parametrize("allowed", [lambda row: True, not_all_alike], ids=["free", "with refusals"])
def test_a_toy_array_covers_what_is_allowed(allowed):
    """By hand: 12 + 6 + 9 + 6 + 8 + 12 + 8 + 6 + 4 + 6 pairs, of which a3b1, a3b4 and c2d2 are refused."""
    rows, refused = covering_rows(TOY, allowed)
    assert len(every_pair(TOY)) == 77
    assert all(
        list(row) == sorted(TOY) and all(row[axis] in TOY[axis] for axis in TOY) and allowed(row) for row in rows
    )
    assert len(refused) == (0 if allowed({"a": "3", "b": "1"}) else 3)
    assert pairs_in(rows) == set(every_pair(TOY)) - set(refused)
    assert 12 <= len(rows) <= 16, "12 pairs of a and b need a row each; a greedy array takes few more"
    assert (rows, refused) == covering_rows(TOY, allowed), "the same every time"


def test_a_refusal_of_three_values_is_not_hidden():
    """Alone c1 and d1 may go together, in no row they do."""
    with pytest.raises(ValueError, match="depends on more than two values"):
        covering_rows(TOY, lambda row: not (row.get("c") == row.get("d") == "1" and "a" in row))


def test_every_pair_of_values_is_in_a_row_or_refused():
    """Counted by brute force. A refused pair is refused also with everything else at random; a value alone never is."""
    table = {axis: list(values) for axis, values in axes.axes().items()}
    rows, refused = axes.rows()
    assert all(set(row) == set(table) and axes.allowed(row) for row in rows)
    wanted = {
        frozenset([(a, x), (b, y)]) for a, b in itertools.combinations(table, 2) for x in table[a] for y in table[b]
    }
    assert pairs_in(rows) == wanted - set(refused)
    rng = random.Random(0)
    for pair in refused:
        for _ in range(20):
            assert not axes.allowed({axis: rng.choice(values) for axis, values in table.items()} | dict(pair)), pair
    assert all(axes.allowed({axis: value}) for axis, values in table.items() for value in values)


PAIRS = str(Path(__file__).parent / "test_pairs.py")


def collected():
    """id -> settings of the rows that test_pairs.py runs now."""
    module = runpy.run_path(PAIRS)
    (mark,) = [mark for mark in module["test_pairs"].pytestmark if mark.name == "parametrize"]
    return {str(i): axes.settings(row) for i, row in zip(mark.kwargs["ids"], module["ROWS"])}


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """`collected` now; and in these tests the rows are written down, as dev/variants.py does, which an entry being
    added may still lack.
    """
    path = tmp_path_factory.mktemp("rows") / "rows.txt"
    path.write_text("".join(" ".join(row.values()) + "\n" for row in runpy.run_path(PAIRS)["ROWS"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(axes, "ROWS", path, raising=False)
        yield collected()


@pytest.mark.slow
@pytest.mark.fault("V1")
@pytest.mark.parametrize("name", ["zzz", "aaa"])
@pytest.mark.parametrize("flag", tables.AXES)
def test_a_new_entry_only_adds_rows(flag, name, before, monkeypatch):
    """First or last by name and in its table: the old rows stay as they are, under the ids that they had."""
    table = tables.AXES[flag]
    entry = next(iter(table.values()))
    for key, value in [(name, entry), *table.items()] if name == "aaa" else [*table.items(), (name, entry)]:
        monkeypatch.delitem(table, key, raising=False)
        monkeypatch.setitem(table, key, value)
    after = collected()
    assert before.items() <= after.items()
    new = {i: changes for i, changes in after.items() if i not in before}
    assert new and all(changes.get(flag) == name for changes in new.values()), "only the new entry needs rows"
    assert len(new) <= 15, "a row for each of the 11 values of the widest axis, and few more"
    assert not axes.uncovered()


@pytest.mark.slow
@pytest.mark.fault("V1")
def test_a_new_number_a_new_axis_and_a_refusal_only_add_rows(before, monkeypatch):
    monkeypatch.setitem(axes.NUMBERS, "qk_gain", [*axes.NUMBERS["qk_gain"], dict(qk_gain=0.3)])
    monkeypatch.setitem(axes.NUMBERS, "rows", [dict(sequence_len=32), dict(sequence_len=40)])
    after = collected()
    same = {i: {"sequence_len": 32} | changes for i, changes in before.items()}
    assert all(after.get(i) == changes for i, changes in same.items())
    assert pairs_in(axes.rows()[0]) == set(
        every_pair({axis: list(values) for axis, values in axes.axes().items()})
    ) - set(axes.rows()[1])
    both = dict(norm="layernorm", qk_norm="none")
    refusal = ("--norm with --qk-norm", lambda c: both.items() <= vars(c).items(), "for this test")
    monkeypatch.setattr(tables, "REFUSED", [*tables.REFUSED, refusal])
    left = collected()
    assert {i for i, changes in before.items() if not both.items() <= changes.items()} <= set(left)
    assert not [i for i, changes in left.items() if both.items() <= changes.items()]


@pytest.mark.fault("V3")
def test_dash_k_finds_the_rows_of_an_entry(before):
    """`pytest -k X` takes the tests whose id has X in it; in X may be letters, digits and : + - . [ ] / only. With
    /FLAG:ENTRY/ no other entry.
    """
    for flag, table in tables.AXES.items():
        for name in table:
            shown = axes.shown(name)
            having = [i for i, changes in before.items() if getattr(axes.config(changes), flag) == shown]
            if flag == "rope_layout":  # read, and named, where positions turn
                having = [i for i in having if axes.config(before[i]).positions in ("rope", "rnope")]
            assert having and set(having) <= {i for i in before if shown in i}, f"{flag} {shown}"
            assert [i for i in before if f"/{flag}:{shown}/" in i] == having, f"{flag} {shown}"
    assert all(re.fullmatch(r"[\w:+.\-/,]+", i) for i in before)


def flag(name):
    return "--" + name.replace("_", "-")


def test_a_refused_pair_names_both_flags():
    table = axes.axes()
    _, refused = axes.rows()
    assert refused
    for pair in refused:
        with pytest.raises(UserError) as error:
            axes.config(axes.settings(dict(pair)))
        for axis, value in pair:
            names = {flag(name) for name in table[axis][value]} | {flag("no_" + name) for name in table[axis][value]}
            assert any(name in str(error.value) for name in names), (pair, str(error.value))


def test_every_field_and_entry_is_on_an_axis():
    assert not axes.uncovered(), (
        f"no contract test sets {axes.uncovered()} to two values: in tests/contracts/axes.py add a line to NUMBERS, or"
        " to MORE where only one entry of a table reads it"
    )


@pytest.mark.slow
def test_a_new_number_is_missed_and_a_new_entry_is_found(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Later(Architecture):
        new_number: float = 1.0

    assert axes.uncovered(Later) == ["new_number"]
    table = tables.AXES["mlp"]

    class Throwaway(table["relu"]):
        """W2 (-max(0, W1 x)). Of no paper."""

        @staticmethod
        def activation(x):
            return -x.relu()

    monkeypatch.setitem(table, "throwaway", Throwaway)
    new = axes.label({"mlp": "throwaway"})
    assert new in axes.singles() and new in axes.axes()["mlp"] and not axes.uncovered()
    contracts.fast(axes.config({"mlp": "throwaway"}))


def test_an_entry_that_breaks_a_contract_fails(monkeypatch):
    """The contracts are seen failing, each by a variant that breaks just that."""
    table = tables.AXES["mlp"]

    class Peeks(table["relu"]):
        def forward(self, x):
            return super().forward(x + x.flip(1))

    class Draws(table["relu"]):
        def forward(self, x):
            return super().forward(x * (1 + x.new_empty(1).uniform_(-0.1, 0.1)))

    class Adds(table["relu"]):
        def __init__(self, c):
            super().__init__(c)
            self.unused = torch.nn.Parameter(torch.empty(c.n_embd))

        def forward(self, x):
            return super().forward(x) + 0 * self.unused

    class Idles(Adds):
        def init_constants(self):
            self.unused.zero_()

    for broken, check, message in (
        (Peeks, contracts.causal, "changed an earlier logit"),
        (Peeks, contracts.cache_equals_forward, "chunks"),
        (Draws, contracts.drops_only_in_training, "equal"),
        (Adds, contracts.init_fills, "unused"),
        (Idles, contracts.gradients_arrive, "no gradient in 100% of h.0.mlp.unused"),
    ):
        monkeypatch.setitem(table, "broken", broken)
        with pytest.raises(AssertionError, match=message):
            check(axes.config({"mlp": "broken"}))


@pytest.mark.slow
@pytest.mark.fault("V2")
@pytest.mark.parametrize(
    "changes",
    [
        dict(
            positions="learned",
            window_pattern="L",
            softmax="softmax_n",
            gate="head",
            qk_norm="layernorm",
            value_embeds=True,
            residual_scalars=False,
            smear=False,
            mlp="gelu",
            bias="qkv,out,mlp,norm,head",
            softcap=0.0,
            tied_head=True,
            pad_vocab_to=1,
            init="normal02",
        ),
        dict(
            positions="nope",
            window_pattern="SSSL",
            window_size=1,
            softmax="softmax_n",
            softmax_n=3.0,
            qk_norm="none",
            score_softcap=2.0,
            value_embeds=True,
            backout=False,
            embed_norm=False,
            mlp="gelu",
            norm="layernorm",
            norm_gain=True,
            bias="qkv,out,mlp,norm,head",
            init="gpt2",
        ),
        dict(
            attention="mla",
            mla_kv_rank=6,
            mla_rope_dim=0,
            rope_base=10.0,
            rope_scaling="yarn:4",
            window_pattern="SSSL",
            window_size=1,
            gate="head",
            qk_norm="layernorm",
            qk_gain=0.7,
            score_softcap=2.0,
            document_mask=True,
            residual_scalars=False,
            smear=False,
            backout=False,
            embed_norm=False,
            norm="layernorm",
            bias="qkv,out,mlp,norm,head",
            tied_head=True,
            attn_dropout=0.1,
            mlp_dropout=0.1,
            init="gpt2",
        ),
        dict(
            attention="mla",
            mla_kv_rank=6,
            mla_rope_dim=0,
            rope_layout="interleaved",
            softmax="softmax1",
            gate="elementwise",
            qk_norm="none",
            score_softcap=2.0,
            document_mask=True,
            residual_scalars=False,
            backout=False,
            mlp="swiglu",
            norm_gain=True,
            tied_head=True,
            resid_dropout=0.1,
        ),
    ],
    ids=[
        "a small gradient of c_k.bias",
        "a small gradient of norm_1.bias",
        "latents and dropout",
        "a scalar whose gradient cancels",
    ],
)
def test_sound_models_pass(changes, monkeypatch):
    """Models of no fault that failed: a gradient of 7e-9 was taken for none, and rounding of a sum that cancels for a
    wrong kernel.
    """
    monkeypatch.setattr(banded, "BLOCK", 8)  # as test_pairs.py
    contracts.fast(axes.config(changes))


@pytest.mark.fault("V2")
def test_a_single_number_without_effect_is_seen(monkeypatch):
    """One column of a matrix, and one number of a vector, of one layer alone."""
    table, layers = tables.AXES["mlp"], itertools.count()

    class ColumnCut(table["relu2"]):
        def __init__(self, c):
            super().__init__(c)
            self.is_cut = next(layers) % c.n_layer == 2

        def forward(self, x):
            return super().forward(x * (torch.arange(x.size(-1)) != 3) if self.is_cut else x)

    class NumberCut(ColumnCut):
        def __init__(self, c):
            super().__init__(c)
            self.gain = torch.nn.Parameter(torch.empty(c.n_embd))

        def init_constants(self):
            self.gain.fill_(1.0)

        def forward(self, x):
            gain = torch.cat((self.gain[:5], self.gain[5:6].detach(), self.gain[6:])) if self.is_cut else self.gain
            return self.c_proj(self.activation(self.c_fc(x * gain.to(x.dtype))))

    for broken, message in (
        (ColumnCut, "^no gradient in 3% of h.2.mlp.c_fc.weight$"),
        (NumberCut, "^no gradient in 3% of h.2.mlp.gain$"),
    ):
        monkeypatch.setitem(table, "broken", broken)
        with pytest.raises(AssertionError, match=message):
            contracts.fast(axes.config({"mlp": "broken"}))


class GatedByShare(tables.AXES["gate"]["head"]):
    """A gate with a vector beside its matrix."""

    def __init__(self, c):
        super().__init__(c)
        self.share = torch.nn.Parameter(torch.empty(c.n_head))

    def init_constants(self):
        self.share.fill_(0.5)

    def forward(self, y, x):
        return super().forward(y, x) + self.share.to(y.dtype)[:, None] * y


class Scaled(tables.AXES["mlp"]["gelu"]):
    """An MLP with a vector beside its matrices."""

    def __init__(self, c):
        super().__init__(c)
        self.scale = torch.nn.Parameter(torch.empty(4 * c.n_embd))

    def init_constants(self):
        self.scale.fill_(1.0)

    def forward(self, x):
        return self.c_proj(self.activation(self.c_fc(x)) * self.scale.to(x.dtype))


class Powered(tables.AXES["norm"]["rms"]):
    """A norm with a number of its own, whatever --norm-gain says."""

    def __init__(self, width, gain, bias):
        super().__init__(width, gain, bias)
        self.power = torch.nn.Parameter(torch.empty(1))

    def init_constants(self):
        super().init_constants()
        self.power.fill_(1.0)

    def forward(self, x):
        return super().forward(x) * self.power.to(x.dtype)


# flag -> (an entry with a vector of its own, how many values it adds in the base model: 4 layers, 4 heads, width 32)
ADDED = {"gate": (GatedByShare, 4 * 4), "mlp": (Scaled, 4 * 128), "norm": (Powered, 2 * 4 + 2)}


@pytest.mark.slow
@pytest.mark.fault("V4")
@pytest.mark.parametrize("flag", ADDED)
def test_every_table_is_asked_for_its_counts(flag, monkeypatch):
    """Also where an entry of this name had other parameters before."""
    entry, added = ADDED[flag]
    plain = axes.config({flag: {"gate": "head", "mlp": "gelu", "norm": "rms"}[flag]})
    for new, more in ((tables.AXES[flag][getattr(plain, flag)], 0), (entry, added)):
        monkeypatch.setitem(tables.AXES[flag], "added", new)
        c = axes.config({flag: "added"})
        with torch.device("meta"):
            held = sum(p.numel() for p in GPT(c).parameters())
        assert accounting.n_params(c)["total"] == held == accounting.n_params(plain)["total"] + more
    contracts.fast(c)
    contracts.counts(c)

"""Probes against brute force, scipy and float64; and that they leave training as it is."""

import importlib.util
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from nanolab.cli import UserError, parse
from nanolab.data.tokenizer import Tokenizer
from nanolab.evals.bundle import open_bundle, read_items
from nanolab.evals.config import BaseEvalConfig
from nanolab.evals.icl import Score, encode_groups
from nanolab.evals.modes import MODES
from nanolab.evals.probes import PROBES, gold, passkey
from nanolab.evals.probes.common import Given, cut_rows, measure_probes, text_stream
from nanolab.help import texts_of
from nanolab.lab.evaluate_base import evaluate_base
from nanolab.lab.results import number_at
from nanolab.lab.runner import sources_of
from nanolab.model.config import GPTConfig
from nanolab.model.context import AttnContext
from nanolab.model.gpt import GPT
from nanolab.records.checkpoint import load_weights
from nanolab.records.models import read_json, runs_dir
from nanolab.runtime import Runtime
from nanolab.stages.config import BaseTrainConfig
from nanolab.stages.pretrain import pretrain


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(f"nanolab_tests_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pretrained = load("pretrained", Path(__file__).parents[1] / "training" / "pretrained.py")
tiny = load("tiny_bundle", Path(__file__).with_name("tiny_bundle.py"))
CPU = Runtime(torch.device("cpu"), torch.float32)
TINY = dict(sequence_len=8, vocab_size=40, n_layer=2, n_head=2, n_embd=32, bos=0, window_pattern="SL", window_size=5)


class Letters:
    """A tokenizer of 40 tokens: bos is 0, a letter its number from 1 on. Each stands for 1 to 3 bytes."""

    bos = 0

    def encode_arrays(self, texts, threads: int = 1) -> list[np.ndarray]:
        return [np.array([1 + ord(letter) % 39 for letter in text], dtype=np.int32) for text in texts]

    def encode(self, text: str) -> list[int]:
        return self.encode_arrays([text])[0].tolist()

    def token_bytes(self) -> np.ndarray:
        return np.array([0, *(1 + i % 3 for i in range(39))], dtype=np.int32)


class Texts:
    def __init__(self, *texts: str):
        self.texts = texts

    def iterate(self) -> Iterator[str]:
        yield from self.texts


def words(n: int) -> str:
    return "".join(chr(97 + int(i)) for i in np.random.default_rng(n).integers(0, 26, n))


def given_of(model, *texts: str, tokens: int = 1 << 10, batch_size: int = 3, runtime: Runtime = CPU) -> Given:
    return Given(model.eval(), Letters(), runtime, Texts(*texts), tokens, batch_size)


def probed(name: str, given: Given) -> dict:
    return measure_probes([name], given)[name]


def test_every_probe_is_a_mode_of_base_eval_and_has_its_module():
    for name in PROBES:
        assert importlib.util.find_spec(f"nanolab.evals.probes.{name}") is not None and MODES[name].fields == (name,)
    for cls, flag in ((BaseTrainConfig, "probes"), (BaseEvalConfig, "modes")):
        assert [name for name in PROBES if name not in texts_of(cls)[flag]] == []


# Loss by position and length.


def by_brute_force(model, ids: np.ndarray, length: int) -> list[tuple[int, float, int]]:
    """(position, nats, token) of each token of `ids`, cut at multiples of `length`: of each position a forward pass on
    what it sees, and nothing else.
    """
    rows, found = torch.as_tensor(ids).long().reshape(-1, length), []
    for i in range(length):
        seen = torch.cat((torch.zeros_like(rows[:, :1]), rows[:, :i]), dim=1)
        with torch.no_grad():
            logp = model(seen)[:, -1].double().log_softmax(-1)
        found += [(i, -logp[row, token].item(), int(token)) for row, token in enumerate(rows[:, i])]
    return found


def test_the_loss_by_length_and_position_is_that_of_one_forward_pass_per_token(make_gpt):
    model = make_gpt(GPTConfig(**TINY), scale=0.3)
    given = given_of(model, words(50), words(31), words(60))
    ids = text_stream(given)
    assert len(ids) == 143 and (ids == 0).sum() == 2  # documents are joined by bos, which rows bring at their beginning
    ids = ids[:128]  # whole rows of 8 T
    found, sizes = probed("lengths", given), Letters().token_bytes()
    for k in (1, 2, 4, 8):
        each = [(i, nats, token) for i, nats, token in by_brute_force(model, ids.tolist(), 8 * k) if token]
        total = sum(nats for _, nats, _ in each)
        assert found["nats"][f"x{k}"] == pytest.approx(total / len(each), rel=1e-5)
        assert found[f"x{k}"] == pytest.approx(total / math.log(2) / sizes[ids].sum(), rel=1e-5)
    assert (found["tokens"], found["bytes"], found["unread"]) == (len(each), sizes[ids].sum(), {})
    curve = found["by_position"]
    assert (curve["of"], curve["from"]) == (64, [0, 1, 2, 4, 8, 16, 32])
    for i, (low, high) in enumerate(zip(curve["from"], [*curve["from"][1:], 64])):
        part = [nats for at, nats, _ in each if low <= at < high]
        assert (curve["nats"][i], curve["tokens"][i]) == (pytest.approx(np.mean(part), rel=1e-5), len(part))


def test_every_token_is_a_target_once_at_every_length():
    ids = np.arange(100, 148, dtype=np.int32)
    for length in (6, 12, 24, 48):
        inputs, targets = cut_rows(ids, length, bos=7)
        assert targets.ravel().tolist() == ids.tolist() and (inputs[:, 0] == 7).all()
        assert (inputs[:, 1:] == targets[:, :-1]).all()


@pytest.mark.parametrize("tokens,longest", [(64, 8), (63, 4), (16, 2), (15, 1)])
def test_lengths_that_the_text_does_not_reach_are_named(make_gpt, tokens, longest):
    found = probed("lengths", given_of(make_gpt(GPTConfig(**TINY)), words(200), tokens=tokens))
    assert [k for k in (1, 2, 4, 8) if found[f"x{k}"] is not None] == [k for k in (1, 2, 4, 8) if k <= longest]
    assert list(found["unread"]) == [f"x{k}" for k in (2, 4, 8) if k > longest]
    assert found["by_position"]["of"] == 8 * longest


def test_a_model_that_reads_no_further_says_so_and_gives_null(make_gpt, capsys):
    model = make_gpt(GPTConfig(**TINY | {"positions": "learned"}))
    found = probed("lengths", given_of(model, words(200)))
    assert found["x1"] > 0 and (found["x2"], found["x4"], found["x8"]) == (None, None, None)
    assert all("--positions learned" in why for why in found["unread"].values()) and len(found["unread"]) == 3
    assert capsys.readouterr().out.count("--positions learned") == 3
    assert number_at({"probes": {"lengths": found}}, "probes.lengths.x2") is None


def test_text_shorter_than_a_row_is_a_failure_by_name(make_gpt):
    found = measure_probes(["lengths"], given_of(make_gpt(GPTConfig(**TINY)), words(7)))
    assert list(found["lengths"]["failed"]) == ["lengths"]
    with pytest.raises(UserError) as error:
        text_stream(given_of(make_gpt(GPTConfig(**TINY)), words(7)))
    assert (error.value.code, error.value.values) == ("text-too-short", {"tokens": 7, "needed": 8})


# Attention.

SOFTMAXES = [
    {"softmax": "softmax"},
    {"softmax": "softmax1"},
    {"softmax": "softmax_n", "softmax_n": 0.3},
    {"softmax": "sink"},
]
OTHERS = [
    {"attention": "gqa:2", "window_pattern": "SSL"},
    {"positions": "alibi", "gate": "head", "softmax": "softmax1"},
    {"score_softcap": 0.5, "attention": "mqa", "softmax": "sink"},
    {"attention": "mla", "value_embeds": False, "softmax": "softmax1"},
    {"document_mask": True, "qk_norm": "l2", "softmax": "softmax1"},
]


def dense_weights(config: GPTConfig, ids: list[int], q, k, sinks) -> tuple[np.ndarray, np.ndarray]:
    """(p, whether query i sees key j), (B, H, T, T), by loops in float64, from the flags alone. q (B, T, H, D), k (B,
    T, G, D).
    """
    (B, T, H, D), G = q.shape, k.shape[2]
    p, sees = np.zeros((B, H, T, T)), np.zeros((B, H, T, T), dtype=bool)
    for b, h, i in np.ndindex(B, H, T):
        begun = max([j for j in range(i + 1) if ids[b][j] == 0], default=0) if config.document_mask else 0
        scores = {}
        for j in range(max(begun, i - sinks["window"]), i + 1):
            score = float(q[b, i, h] @ k[b, j, h * G // H]) / math.sqrt(D)
            score = config.score_softcap * math.tanh(score / config.score_softcap) if config.score_softcap else score
            scores[j] = score - (2 ** (-8 * (h + 1) / H) * (i - j) if config.positions == "alibi" else 0)
            sees[b, h, i, j] = True
        total = sinks["n"][h] + sum(math.exp(score) for score in scores.values())
        for j, score in scores.items():
            p[b, h, i, j] = math.exp(score) / total
    return p, sees


@pytest.mark.parametrize("changes", [*SOFTMAXES, *OTHERS], ids=lambda c: "-".join(str(v) for v in c.values()))
def test_attention_is_that_of_a_dense_one_in_float64(make_gpt, changes):
    config = GPTConfig(**TINY | {"sequence_len": 12, "n_layer": 3, "n_head": 4} | changes)
    model = make_gpt(config, scale=0.4, compute_dtype=torch.float64).double()
    given, caught = given_of(model, words(30), words(30)), []
    inputs = cut_rows(text_stream(given)[:60], 12, 0)[0]
    kernels = [block.attn.core.kernel for block in model.h]
    for block in model.h:  # queries and keys as the layer gives them to whatever computes attention

        def catch(q, k, v, rules, kernel=block.attn.core.kernel):
            caught.append((q.numpy(), k.numpy()))
            return kernel(q, k, v, rules)

        block.attn.core.kernel = catch
    with torch.no_grad():
        model(torch.from_numpy(inputs).long())
        for block, kernel in zip(model.h, kernels):
            block.attn.core.kernel = kernel
        found = probed("attention", given)
    assert [block.attn.core.kernel for block in model.h] == kernels

    n = {"softmax": 0.0, "softmax1": 1.0, "softmax_n": config.softmax_n}
    first, mass, row_sum = [], [], []
    for (q, k), block, window in zip(caught, model.h, [5, 12, 12] if config.window_pattern == "SL" else [5, 5, 12]):
        of_heads = [n[config.softmax]] * 4 if config.softmax in n else block.attn.core.normaliser.logit.exp().tolist()
        p, sees = dense_weights(config, inputs.tolist(), q, k, {"n": of_heads, "window": window})
        for h in range(4):
            late = sees[:, h, 6:, 0]
            first.append(p[:, h, 6:, 0][late].mean() if late.any() else None)
            mass.append([p[:, h, :, j][sees[:, h, :, j]].mean() for j in range(4)])
            row_sum.append(p[:, h].sum(-1).mean())
    flat = {name: sum(rows, []) for name, rows in found["by_head"].items()}
    assert flat["first"] == [x if x is None else pytest.approx(x, rel=1e-7) for x in first]
    assert flat["mass1"] == pytest.approx([row[0] for row in mass], rel=1e-7)
    assert flat["row_sum"] == pytest.approx(row_sum, rel=1e-7)
    assert found["sinks"] == [np.mean([row[j] > 0.3 for row in mass]) for j in range(4)]
    assert found["first"] == pytest.approx(np.mean([x for x in first if x is not None]), rel=1e-7)
    assert (found["row_sum"], found["row_sum_min"]) == pytest.approx((np.mean(row_sum), min(row_sum)), rel=1e-7)
    assert (found["heads"], found["tokens"]) == (12, 60)
    assert (min(row_sum) < 0.99) == (config.softmax != "softmax")


# Kurtosis and perplexity.


def test_kurtosis_of_weights_and_activations_is_scipys(make_gpt):
    model = make_gpt(GPTConfig(**TINY), scale=0.3)
    with torch.no_grad():
        model.h[1].mlp.c_proj.weight[3, 5] = 20.0  # an outlier
    given = given_of(model, words(100), batch_size=4)
    found = probed("kurtosis", given)
    inputs = cut_rows(text_stream(given)[:96], 8, 0)[0]
    stream_of, attended = [[], []], [[], []]
    with torch.no_grad():
        for row in inputs:  # one row at a time, by the layers' own formula
            ctx = AttnContext(torch.arange(8)[None], model.positions.angles(torch.arange(8)[None], torch.float32))
            idx = torch.from_numpy(row).long()[None]
            x = x0 = model.smear(model.norm_e(model.wte(idx)), idx, ctx)
            for i, block in enumerate(model.h):
                x = model.lambdas(x, x0, i)
                ve = model.value_embeds(None, idx, i, torch.float32)
                attended[i].append(block.attn(block.norm_1(x), ve, ctx).numpy())
                x = x + torch.from_numpy(attended[i][-1])
                x = x + block.mlp(block.norm_2(x))
                stream_of[i].append(x.numpy())
    for name, layers in (("stream", stream_of), ("attention", attended)):
        values = [np.concatenate(layer).astype(np.float64).ravel() for layer in layers]
        expected = [scipy.stats.kurtosis(x) for x in values]
        assert found[name]["by_layer"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert found[name]["largest_by_layer"] == pytest.approx([np.abs(x).max() for x in values], rel=1e-5)
        assert (found[name]["mean"], found[name]["max"]) == pytest.approx((np.mean(expected), max(expected)), rel=1e-4)
    weights = {name: p.detach().double().numpy().ravel() for name, p in model.named_parameters() if p.dim() == 2}
    expected = {name: scipy.stats.kurtosis(x) for name, x in weights.items()}
    assert found["weights"]["by_matrix"] == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert found["weights"]["worst"] == "h.1.mlp.c_proj.weight" and found["weights"]["max"] > 100
    assert found["weights"]["mean"] == pytest.approx(np.mean([*expected.values()]), rel=1e-6)
    projections = [expected[f"h.{i}.mlp.c_proj.weight"] for i in (0, 1)]
    assert found["weights"]["by_kind"]["mlp.c_proj"] == pytest.approx(np.mean(projections), rel=1e-6)


def by_rows_in_numpy(x: np.ndarray) -> np.ndarray:
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.rint(x / scale) * scale


def test_int8_is_every_row_rounded_by_itself_and_the_model_is_as_before(make_gpt):
    model = make_gpt(GPTConfig(**TINY | {"gate": "head"}), scale=0.3)
    given = given_of(model, words(104), words(40))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = probed("perplexity", given)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())

    def loss() -> float:
        """Nats per token of both documents, cut at multiples of 8."""
        nats = []
        for text in given.documents.texts:
            ids = Letters().encode_arrays([text])[0].tolist()
            nats += [nats for _, nats, _ in by_brute_force(model, ids, 8)]
        return float(np.mean(nats))

    assert found["loss"] == pytest.approx(loss(), rel=1e-5) and found["tokens"] == 144
    assert found["ppl"] == pytest.approx(math.e ** loss(), rel=1e-4)
    assert found["ppl_base2"] == pytest.approx(2 ** loss(), rel=1e-4)
    names = [f"h.{i}.{part}.weight" for i in (0, 1) for part in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj")]
    names += [f"h.{i}.mlp.{part}.weight" for i in (0, 1) for part in ("c_fc", "c_proj")] + ["lm_head.weight"]
    assert found["rounded"] == len(names)
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).copy_(torch.from_numpy(by_rows_in_numpy(before[name].numpy())))
    assert found["int8"]["loss"] == pytest.approx(loss(), rel=1e-5)
    assert found["int8"]["rise"] == pytest.approx(math.exp(loss() - found["loss"]) - 1, abs=1e-4)
    assert found["int8"]["loss"] != found["loss"]


def test_activations_are_rounded_by_one_scale_for_each_map_and_the_whole_text(make_gpt):
    """The loss of a model whose maps round their inputs themselves, the scale found by a pass before, one row at a
    time.
    """
    model = make_gpt(GPTConfig(**TINY), scale=0.3)
    given = given_of(model, words(104), words(40))
    found = probed("perplexity", given)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    names = [name for name in names if "gate" not in name]
    largest = dict.fromkeys(names, 0.0)
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name).weight
            weight.copy_(torch.from_numpy(by_rows_in_numpy(weight.numpy())))
    for name in names:

        def keep(module, args, name=name):
            largest[name] = max(largest[name], args[0].abs().max().item())

        model.get_submodule(name).register_forward_pre_hook(keep)
    rows = [row for text in given.documents.texts for row in Letters().encode_arrays([text])[0].reshape(-1, 8)]
    for row in rows:
        by_brute_force(model, row, 8)
    for name in names:
        scale, plain = largest[name] / 127, model.get_submodule(name).forward

        def rounding(x, scale=scale, plain=plain):
            return plain(torch.from_numpy(np.rint(x.numpy() / scale).clip(-127, 127) * scale).float())

        model.get_submodule(name).forward = rounding
    nats = [nats for row in rows for _, nats, _ in by_brute_force(model, row, 8)]
    assert found["int8_activations"]["loss"] == pytest.approx(np.mean(nats), rel=1e-4)
    assert abs(found["int8_activations"]["loss"] - found["int8"]["loss"]) > 1e-3


# Passkeys and gold answers.


def nats_of(model, ids: list[int], start: int) -> float:
    """Of the tokens from `start` on, by one pass over the whole text."""
    with torch.no_grad():
        logp = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    return -sum(logp[i - 1, ids[i]].item() for i in range(start, len(ids)))


def test_a_passkey_lies_at_its_depth_and_its_likelihood_is_that_of_one_pass(make_gpt):
    model, letters = make_gpt(GPTConfig(**TINY | {"sequence_len": 128}), scale=0.2), Letters()
    found = probed("passkey", given_of(model, words(200), tokens=1))
    assert (found["length"], found["n"], found["unread"]) == (128, passkey.LEAST, {})
    draws = random.Random(passkey.SEED)
    pairs = [draws.sample(range(10_000, 100_000), 2) for _ in range(4)]
    needle, question = letters.encode(passkey.NEEDLE.format(12345)), letters.encode(passkey.QUESTION)
    for k in (1, 2, 4):
        cells = {}
        for depth in passkey.DEPTHS:
            room = 128 * k - 1 - len(needle) - len(question) - 6
            hay, at = (letters.encode(passkey.FILLER) * 99)[:room], round(depth * room)
            for right, other in pairs:
                needle = letters.encode(passkey.NEEDLE.format(right))
                head = [0, *hay[:at], *needle, *hay[at:], *question]
                texts = [[*head, *letters.encode(f" {number}")] for number in (right, other)]
                assert {len(ids) for ids in texts} == {128 * k}
                cells.setdefault(str(depth), []).append([nats_of(model, ids, len(head)) for ids in texts])
        each = [pair for of_depth in cells.values() for pair in of_depth]
        cell = found[f"x{k}"]
        assert cell["nats"] == pytest.approx(np.mean(each, 0)[0], rel=1e-5)
        assert cell["gain"] == pytest.approx(np.mean([other - right for right, other in each]), abs=1e-4)
        for depth, of_depth in cells.items():
            assert cell["by_depth"][depth]["nats"] == pytest.approx(np.mean(of_depth, 0)[0], rel=1e-5)
    learned = make_gpt(GPTConfig(**TINY | {"sequence_len": 128, "positions": "learned"}))
    found = probed("passkey", given_of(learned, words(200), tokens=1))
    assert found["x1"]["nats"] > 0 and found["x2"] is found["x4"] is None and list(found["unread"]) == ["x2", "x4"]
    assert list(probed("passkey", given_of(make_gpt(GPTConfig(**TINY)), words(99)))["failed"]) == ["passkey"]


def test_a_number_is_exact_where_every_token_of_it_is_the_likeliest():
    pairs = [(Score(1.0, 2, True, 0), Score(4.0, 2, False, 0)), (Score(2.0, 2, False, 0), Score(1.0, 2, True, 0))]
    assert passkey.of_cell(pairs) == {"exact": 0.5, "nats": 1.5, "gain": 1.0}


def test_gold_answers_by_one_pass_per_text_and_coins_by_scipy(make_gpt, tmp_path):
    tokenizer, folder = tiny.tokenizer(), tiny.write(tmp_path / "bundle")
    model = make_gpt(GPTConfig(**TINY | {"sequence_len": 256, "vocab_size": tokenizer.vocab_size}), scale=0.2)
    given = given_of(model)._replace(tokenizer=tokenizer, bundle=str(folder))
    found = probed("gold", given)
    tasks = open_bundle(folder).tasks
    assert list(found["tasks"]) == list(tasks) and "failed" not in found
    for label, task in tasks.items():
        items, nats, n_bytes = read_items(task, -1), 0.0, 0
        for group in encode_groups(task.kind, items, range(len(items)), task.shots, task.delimiter, tokenizer):
            ids, start = group.texts()[items[group.index].gold]
            nats += nats_of(model, list(ids), start)
            n_bytes += len(tokenizer.decode_bytes(ids[start:]))
        of_task = found["tasks"][label]
        assert (of_task["bpb"], of_task["bytes"]) == (pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5), n_bytes)
        right = round(of_task["accuracy"] * len(items))
        low, high = scipy.stats.binomtest(right, len(items)).proportion_ci(method="wilson")
        assert of_task["interval"] == pytest.approx([low, high], abs=1e-9)
        assert of_task["coin"] == (low - 1e-9 <= task.baseline <= high) == (label in found["coins"])
    assert found["bpb"] == pytest.approx(np.mean([of_task["bpb"] for of_task in found["tasks"].values()]))


def test_without_a_bundle_gold_is_a_failure_by_name(make_gpt, tmp_path):
    given = given_of(make_gpt(GPTConfig(**TINY)))
    for bundle in ("", str(tmp_path / "nothing")):
        with pytest.raises(UserError) as error:
            gold.measure_gold(given._replace(bundle=bundle))
        assert error.value.code == "bundle-missing"
    assert list(probed("gold", given)["failed"]) == ["gold"]


# On two ranks.

SUMMED = ("lengths", "attention", "kurtosis", "perplexity", "passkey")


def found_by_rank(runtime: Runtime) -> dict:
    model = GPT(GPTConfig(**TINY))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return measure_probes(SUMMED, given_of(model, words(150), batch_size=100, runtime=runtime))


def numbers_in(found, where: str = "") -> Iterator[tuple[str, float]]:
    for key, value in enumerate(found) if isinstance(found, list) else found.items():
        if isinstance(value, (dict, list)):
            yield from numbers_in(value, f"{where}.{key}")
        elif isinstance(value, (int, float)) and key != "seconds":
            yield f"{where}.{key}", value


@pytest.mark.slow
def test_two_ranks_find_what_one_does(run_ranks):
    """With so many rows to a batch the second rank gets none of some."""
    expected = dict(numbers_in(found_by_rank(CPU)))
    assert len(expected) > 100
    for found in run_ranks(found_by_rank, 2):
        assert dict(numbers_in(found)) == pytest.approx(expected, rel=1e-5, abs=1e-6)


# In a run and in base_eval.


@pytest.fixture
def flags(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setenv("NANOLAB_DTYPE", "float32")
    text = pretrained.write_text(tmp_path / "text")
    Tokenizer.train((p.read_text() for p in sorted(text.glob("*.txt"))), 300).save(tmp_path / "tok")
    words = f"--data-dir {text} --tokenizer {tmp_path / 'tok'} --depth 1 --aspect-ratio 32 --head-dim 32"
    words += " --max-seq-len 16 --device-batch-size 4 --total-batch-size 64 --num-iterations 3 --warmup-steps 1"
    return [*words.split(), *"--lr-scale 0.1 --eval-every 2 --sample-every -1 --attn-dropout 0.1".split()]


@pytest.mark.slow
def test_probes_land_in_the_result_and_leave_training_as_it_is(flags, capsys):
    pretrain(parse(BaseTrainConfig, [*flags, "--run", "without"]))
    result = pretrain(parse(BaseTrainConfig, [*flags, "--run", "with", "--probes", "lengths"]))
    weights = [load_weights(runs_dir() / name / "checkpoints" / "step_000003") for name in ("without", "with")]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    saved = read_json(runs_dir() / "with" / "result.json")
    assert saved == result and number_at(saved, "probes.lengths.x2") == saved["probes"]["lengths"]["x2"] > 0
    assert "probes" not in read_json(runs_dir() / "without" / "result.json")
    assert "lengths took" in capsys.readouterr().out
    code = evaluate_base(BaseEvalConfig(model="with", modes="lengths", device_type="cpu"))
    again = read_json(runs_dir() / "with" / "eval_base.json")["lengths"]
    assert code == 0 and again["settings"]["tokens"] == 1 << 13
    assert {k: again[k] for k in saved["probes"]["lengths"] if k != "seconds"} == {
        k: v for k, v in saved["probes"]["lengths"].items() if k != "seconds"
    }


def test_a_probe_that_is_not_there_is_refused_before_anything_is_done():
    for cls, name in ((BaseTrainConfig, "probes"), (BaseEvalConfig, "modes")):
        with pytest.raises(UserError) as error:
            cfg = parse(cls, [f"--{name}", "lengths,heights"])
            evaluate_base(cfg)
        assert "lengths" in str(error.value)
    assert error.value
    with pytest.raises(UserError) as error:
        parse(BaseTrainConfig, ["--probe-tokens", "100"])
    assert error.value.code == "flag-not-read"
    with pytest.raises(UserError) as error:
        evaluate_base(BaseEvalConfig(hf="folder", modes="lengths"))
    assert error.value.code == "probe-of-a-run"


def test_the_sources_of_a_run_hold_those_of_its_probes_alone():
    probe = "nanolab.evals.probes.lengths"
    assert probe not in sources_of("nanolab.stages.pretrain")
    assert {probe, "nanolab.terminal"} <= set(sources_of("nanolab.terminal", probe))

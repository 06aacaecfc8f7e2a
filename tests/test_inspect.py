"""scripts/inspect.py: every number of its tables against the published architectures and the accounting, and what a
reader sees.
"""

import json
import re

import pytest

from nanolab.cli import UserError, from_preset, parse
from nanolab.lab.model_table import flag_text, layer_numbers, scaled
from nanolab.model import accounting
from nanolab.model.config import InspectConfig
from nanolab.presets import PRESETS
from nanolab.training.schedule import gpt_config
from scripts.inspect import run


@pytest.fixture(autouse=True)
def in_fp32(monkeypatch):
    """Else the dtype is chosen by a measurement."""
    monkeypatch.setenv("NANOLAB_DTYPE", "float32")


@pytest.fixture
def inspect(capsys):
    """A function (flags) -> (what was printed, the JSON document that is its last line)."""

    def call(*argv: str):
        assert run(parse(InspectConfig, [*argv, "--json", "--device-type", "cpu"])) == 0
        out = capsys.readouterr().out
        return out, json.loads(out.splitlines()[-1])

    return call


def row(out: str, start: str) -> str:
    """The only line that begins with these words, spaces single."""
    (line,) = [" ".join(line.split()) for line in out.splitlines() if line.strip().startswith(start)]
    return line


def test_gpt2_by_its_published_numbers(inspect):
    out, document = inspect("--preset", "gpt2")
    assert "gpt2: 12 layers, width 768, 12 heads of 64, rows of 1,024 tokens, vocabulary 50,257" in out
    assert row(out, "parameters") == "parameters 124,439,808"
    assert row(out, "without the table") == "without the table of positions 123,653,376"
    assert row(out, "token embedding") == "token embedding, which is also the head's matrix 38,597,376 31.0%"
    assert row(out, "attention") == "attention 28,348,416 22.8%"
    assert row(out, "MLP") == "MLP 56,669,184 45.5%"
    assert row(out, "h.*.mlp.c_fc.weight") == "h.*.mlp.c_fc.weight 3,072 x 768 x 12 28,311,552"
    assert row(out, "norm_f.bias") == "norm_f.bias 768 768"
    assert row(out, "0-11").startswith("0-11 the whole row learned 12 12 12 x 64 + 12 x 64 numbers")
    # 2 x 12 layers x 768 x 2 bytes
    assert row(out, "cache in bfloat16") == "cache in bfloat16, per token 36,864 bytes; 37.7 MB for a whole row"
    assert row(out, "cache in float32") == "cache in float32, per token 73,728 bytes; 75.5 MB for a whole row"
    # 6 (124,439,808 - 786,432 - gains and biases 121,344) + 12 x 12 x 768 x 1024, by hand
    assert (
        document["totals"]["train_flops_per_token"]
        == 854_438_400
        == accounting.train_flops_per_token(gpt_config(from_preset(InspectConfig, "gpt2"), 50257))
    )
    assert row(out, "training, per token") == "training, per token 854 M FLOPs, forward and backward"
    assert "--positions learned --window-pattern L --qk-norm none --qk-gain 1 --no-value-embeds" in out


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_adds_up(inspect, preset):
    out, document = inspect("--preset", preset)
    cfg = from_preset(InspectConfig, preset)
    c = gpt_config(cfg, cfg.vocab_size, bos=0)
    total = sum(t["parameters"] for t in document["tensors"])
    assert total == document["totals"]["parameters"] == accounting.n_params(c)["total"]
    assert row(out, "all") == f"all {total:,}"
    assert sorted(i for group in document["layers"] for i in group["layers"]) == list(range(c.n_layer))
    for group in document["layers"]:
        assert all(
            (group["window"] or c.sequence_len) == min(accounting.windows(c)[i], c.sequence_len)
            for i in group["layers"]
        )
    cached = sum(len(g["layers"]) * heads * channels for g in document["layers"] for heads, channels in g["cached"])
    assert 2 * cached == document["totals"]["kv_bytes_per_token"]["bfloat16"]
    shares = [float(s) for s in re.findall(r"([\d.]+)%", out)]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert max(map(len, out.splitlines()[:-1])) <= 140


def test_layers_that_differ_have_rows_of_their_own(inspect):
    out, document = inspect(
        "--depth",
        "8",
        "--positions",
        "rnope",
        "--position-pattern",
        "R,R,R,N",
        "--window-pattern",
        "rope",
        "--attention",
        "gqa:2",
    )
    assert row(out, "0-2, 4-6").startswith("0-2, 4-6 512 tokens back rope, 128 channels 4 2 2 x 128 + 2 x 128 numbers")
    assert row(out, "3, 7").startswith("3, 7 the whole row none 4 2 2 x 128 + 2 x 128 numbers")
    assert row(out, "value_embeds").startswith("value_embeds.*.weight 32,768 x 256 x 4: 1, 3, ..., 7")
    assert (
        "other than by default: --positions rnope --position-pattern R,R,R,N --attention gqa:2 --window-pattern rope"
        in out
    )
    assert [g["layers"] for g in document["layers"]] == [[0, 1, 2, 4, 5, 6], [3, 7]]


def test_the_kernel_that_is_asked_for(inspect):
    out, document = inspect("--attn-kernel", "eager", "--depth", "4")
    assert {g["kernel"] for g in document["layers"]} == {"eager"}
    assert row(out, "0-2").endswith(" eager")


def test_the_context_of_a_decoded_token(inspect):
    out, document = inspect("--depth", "4", "--context", "10")
    assert row(out, "decoding").startswith("decoding, per token after 10 others ")
    c = gpt_config(InspectConfig(depth=4), 32768)
    assert (
        document["totals"]["decode_flops_per_token"]
        == accounting.decode_flops_per_token(c, 10)
        < accounting.decode_flops_per_token(c, 2048)
    )


def test_a_model_that_cannot_work_is_refused():
    with pytest.raises(UserError, match="--attention mla with --value-embeds"):
        run(InspectConfig(attention="mla", device_type="cpu"))
    with pytest.raises(UserError, match="--attn-kernel.*flex"):
        run(InspectConfig(attn_kernel="flex", device_type="cpu"))


def test_words():
    assert layer_numbers([0]) == "0"
    assert layer_numbers([0, 1, 2, 3]) == "0-3"
    assert layer_numbers([0, 1, 2, 4, 5, 6, 8]) == "0-2, 4-6, 8"
    assert layer_numbers([3, 7, 11]) == "3, 7, 11"
    assert layer_numbers([1, 3, 5, 7]) == "1, 3, ..., 7"
    assert [scaled(n) for n in (12, 1234, 36_864, 5.5e6, 4.78e9, 2e12)] == [
        "12 ",
        "1.23 k",
        "36.9 k",
        "5.5 M",
        "4.78 G",
        "2 T",
    ]
    assert [
        flag_text("smear", False),
        flag_text("norm_gain", True),
        flag_text("qk_gain", 1.0),
        flag_text("bias", "qkv"),
    ] == ["--no-smear", "--norm-gain", "--qk-gain 1", "--bias qkv"]

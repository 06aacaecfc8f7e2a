"""A run exported: what is in the folder, that transformers reads it as nanolab does, and what is said when it cannot be
written.
"""

import dataclasses
import json
import resource
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers

import nanolab
from nanolab.cli import UserError, from_json
from nanolab.data.chat import render_prompt
from nanolab.data.tokenizer import Tokenizer
from nanolab.evals.model_card import model_card
from nanolab.interop import export, push
from nanolab.interop.config import ExportConfig
from nanolab.model.config import GPTConfig
from nanolab.model.gpt import GPT
from nanolab.presets import GPT2
from nanolab.records import checkpoint
from nanolab.records.models import find_model
from nanolab.records.run import Run
from nanolab.stages.config import BaseTrainConfig, RLConfig, SFTConfig
from scripts import export_hf

TEXT = "the crow saw the cheese and took it. The fox said: three times four is 12, isn't it?\n\tA\u00e9\U0001f600 " * 3
SQUARE = GPTConfig(
    **{name: value for name, value in GPT2.items() if name in GPTConfig.__dataclass_fields__}
    | dict(sequence_len=32, vocab_size=285, pad_vocab_to=64, n_layer=2, n_head=2, n_embd=16)
)
DEFAULT = GPTConfig(sequence_len=32, vocab_size=285, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 285)


def build(config, seed=0):
    model, g = GPT(config).eval(), torch.Generator().manual_seed(seed)
    model.init_weights(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    return model


def written(folder, config, tokenizer, kind="base", dtype=torch.float32):
    """(the folder without a card, the model)."""
    model = build(config)
    folder.mkdir(parents=True, exist_ok=True)
    export.write_export(folder, model, tokenizer, kind, dtype)
    return folder, model


def make_run(name, tokenizer, config=DEFAULT, kind="base", origin=None, tokens=51_200, **settings):
    """A finished run with one checkpoint, as the training scripts leave it."""
    from nanolab.runtime import Runtime

    flags = {
        "base": BaseTrainConfig(data="", data_dir="/home/me/books", seed=1),
        "sft": SFTConfig(tasks="jsonl=/home/me/talk.jsonl:2,gsm8k:1", seed=1),
        "rl": RLConfig(task="gsm8k", seed=1),
    }[kind]
    rt = Runtime(torch.device("cpu"), torch.float32)
    run = Run.start(name, flags, rt, kind=kind, env=settings)
    run.pin_tokenizer(lambda: tokenizer)
    meta = {
        "run": name,
        "kind": kind,
        **run.facts,
        "model_config": dataclasses.asdict(config),
        "config": run.config,
        "plan": {"flops_per_token": 1000},
        "env": run.env | {"commit": "c0ffee"},
        "loop": {"total_training_time": 12.5},
        "tokens": tokens,
        **({"origin": {"name": origin}} if origin else {}),
    }
    checkpoint.save(run.checkpoints, 7, weights=build(config).state_dict(), optimizer=None, meta=meta, runtime=rt)
    run.finish({"run": name, "kind": kind, "step": 7})
    return find_model(name)


def ids(config, B=2):
    return torch.randint(config.vocab_size, (B, config.sequence_len), generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("changes", [dict(), dict(tied_head=False)], ids=str)
def test_gpt2_is_transformers_own(tokenizer, tmp_path, changes):
    """In fp64, where nothing but a wrong matrix makes a difference. Every attn.c_proj is square: only its name says
    that it is transposed.
    """
    folder, ours = written(tmp_path, dataclasses.replace(SQUARE, **changes), tokenizer)
    theirs, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True
    )
    assert type(theirs) is transformers.GPT2LMHeadModel and not any(found.values())
    # 320 rows here
    assert theirs.transformer.h[0].attn.c_proj.weight.shape == (
        16,
        16,
    ) and theirs.get_input_embeddings().weight.shape == (285, 16)
    ours = ours.double()
    ours.compute_dtype = torch.float64
    want, got = ours(ids(SQUARE)), theirs(ids(SQUARE)).logits
    assert want.std() > 0.3 and got.shape == want.shape
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    greedy = theirs.generate(ids(SQUARE)[:, :8], attention_mask=torch.ones(2, 8), max_new_tokens=8, eos_token_id=None)
    by_hand = ids(SQUARE)[:, :8]
    for _ in range(8):
        by_hand = torch.cat([by_hand, ours(by_hand)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(greedy, by_hand)
    assert not (folder / export.CODE).exists()


@pytest.mark.parametrize(
    "flag",
    [
        dict(softcap=15.0),
        dict(softmax="softmax1"),
        dict(positions="rope"),
        dict(bias=""),
        dict(mlp="gelu"),
        dict(document_mask=True, bos=0),
    ],
    ids=str,
)
def test_one_flag_off_gpt2_brings_its_code(flag):
    with torch.device("meta"):
        assert export.brings_code(GPT(dataclasses.replace(SQUARE, **flag))) and not export.brings_code(GPT(SQUARE))


HARD = [
    TEXT,
    export.HARD_TEXT,
    "",
    " ",
    "\n\n\n",
    "1234567",
    "\u0000\ufffd\u200b",
    "a\u0301e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "<|user_start|>hi<|user_end|>",
    "x" * 5000,
]


@pytest.mark.parametrize("config", [DEFAULT, SQUARE], ids=["own code", "gpt2"])
def test_token_ids_are_ours(tokenizer, tmp_path, config):
    """Also of names of special tokens, where they are asked for as text; and nothing is added."""
    folder, _ = written(tmp_path, config, tokenizer)
    theirs = (
        transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        if config is DEFAULT
        else transformers.AutoTokenizer.from_pretrained(folder)
    )
    for text in HARD:
        assert theirs(text, split_special_tokens=True).input_ids == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert (
        theirs.bos_token_id == tokenizer.bos and theirs.model_max_length == 32 and len(theirs) == tokenizer.vocab_size
    )
    assert theirs("<|bos|>a").input_ids[0] == tokenizer.bos


@pytest.fixture(scope="module")
def specials_first(tmp_path_factory):
    """Trained with `tokenizers`, whose trainer puts special tokens first; of as many tokens as the models have."""
    import tokenizers

    learner, level = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers.ByteLevel
    learner.pre_tokenizer, learner.decoder = level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=276,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=level.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator([TEXT], trainer)
    path = tmp_path_factory.mktemp("first") / "tokenizer.json"
    learner.save(str(path))
    return learner, Tokenizer.load(path)


@pytest.mark.fault("L2")
@pytest.mark.parametrize("config", [DEFAULT, SQUARE], ids=["own code", "gpt2"])
def test_special_tokens_that_are_not_the_last_keep_their_ids(specials_first, tmp_path, config):
    original, ours = specials_first
    folder, model = written(tmp_path, config, ours)
    theirs, generation = (
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True),
        transformers.GenerationConfig.from_pretrained(folder),
    )
    assert (
        theirs.bos_token_id
        == json.loads((folder / "config.json").read_text())["bos_token_id"]
        == generation.bos_token_id
        == ours.bos
        == 0
    )
    assert theirs.convert_tokens_to_ids(list(ours.specials)) == list(ours.specials.values()) and len(theirs) == 285
    for i in range(285):
        text = original.decode([i], skip_special_tokens=False) if i < 276 else ours.decode([i])
        assert theirs.decode([i]) == text and theirs.decode([i], skip_special_tokens=True) == (
            "" if i in ours.specials.values() else text
        )
    assert theirs("<|endoftext|>I find it").input_ids == original.encode("<|endoftext|>I find it").ids


@pytest.mark.slow
@pytest.mark.fault("L2")
def test_the_check_compares_every_token(specials_first, tmp_path, exports_read_warm):
    """A tokenizer.json that only adds its special tokens: text has the same ids there, but special tokens have not."""
    _, ours = specials_first
    folder, model = written(tmp_path, SQUARE, ours)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["vocab"] = {s: i for s, i in raw["model"]["vocab"].items() if s not in ours.specials}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError) as error:
        export.check_export(folder, model, ours)
    assert error.value.code == "export-tokens-differ"


@torch.no_grad()
@pytest.mark.fault("L5")
def test_the_card_of_a_gpt2_says_how_padding_on_the_left_is_read(tokenizer, tmp_path):
    """As it says: `forward` needs position_ids there."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(written(tmp_path, SQUARE, tokenizer)[0]).eval()
    text = ids(SQUARE)[:1, :6]
    padded, mask = torch.cat([torch.ones(1, 3, dtype=torch.int64), text], dim=1), torch.tensor([[0] * 3 + [1] * 6])
    want, off = theirs(text).logits, theirs(padded, attention_mask=mask).logits[:, 3:]
    said = theirs(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 3:]
    assert (off - want).abs().max() > 0.1
    torch.testing.assert_close(said, want, atol=1e-4, rtol=0)
    assert "position_ids" in model_card(
        make_run("books", tokenizer), SQUARE, tokenizer, "fp32", "", export.LICENCE
    ) and "position_ids" not in card(make_run("own", tokenizer), tokenizer)


TALK = [{"role": "user", "content": "What is 3 times 4?"}]
TALKS = [
    TALK,
    [
        {"role": "system", "content": "Be brief."},
        *TALK,
        {"role": "assistant", "content": "12."},
        {"role": "user", "content": "  and\n4 times 4? "},
    ],
    [
        *TALK,
        {
            "role": "assistant",
            "content": [
                {"type": "python", "text": "3*4"},
                {"type": "python_output", "text": "12"},
                {"type": "text", "text": "12"},
            ],
        },
        *TALK,
    ],
]


def test_chat_prompts_are_ours(tokenizer, tmp_path):
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(written(tmp_path, DEFAULT, tokenizer, "sft")[0])
    for talk in TALKS:
        assert theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ] == render_prompt(tokenizer, talk)


@pytest.mark.parametrize(
    ("kind", "ends", "pad"),
    [
        ("base", ["<|bos|>", "<|assistant_end|>"], "<|output_end|>"),
        ("sft", ["<|assistant_end|>", "<|bos|>"], "<|bos|>"),
        ("rl", ["<|assistant_end|>", "<|bos|>"], "<|bos|>"),
    ],
)
def test_what_ends_a_text(tokenizer, tmp_path, kind, ends, pad):
    """And padding is no end, which trainers would leave out of the loss. A base model has no chat template."""
    folder, _ = written(tmp_path, DEFAULT, tokenizer, kind)
    generation, theirs = (
        transformers.GenerationConfig.from_pretrained(folder),
        transformers.PreTrainedTokenizerFast.from_pretrained(folder),
    )
    assert generation.eos_token_id == [tokenizer.special(name) for name in ends]
    assert (theirs.eos_token, theirs.pad_token, theirs.pad_token_id) == (ends[0], pad, generation.pad_token_id)
    assert theirs.pad_token != theirs.eos_token and (theirs.chat_template is None) == (kind == "base")
    assert theirs(["a b c", "a"], padding=True).attention_mask[1][0] == 0


def test_config_holds_every_field(tokenizer, tmp_path):
    folder, model = written(tmp_path, DEFAULT, tokenizer, dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    assert (
        from_json(GPTConfig, config["gpt"]) == dataclasses.replace(DEFAULT, pad_vocab_to=1)
        and config["dtype"] == "bfloat16"
    )
    state = export.load_file(folder / "model.safetensors")
    assert (
        state["model.gpt.h.0.attn.c_q.weight"].dtype == torch.bfloat16
        and state["model.gpt.lambdas.resid"].dtype == torch.float32
    )
    for name, p in model.state_dict().items():
        rows = 285 if len(p.shape) and len(p) == 320 else None  # those of tokens
        # the model has been rounded, too
        assert torch.equal(state[f"model.gpt.{name}"].float(), p[:rows] if rows else p)


@torch.no_grad()
@pytest.mark.fault("S13")
def test_auto_classes_and_attention(tokenizer, tmp_path):
    """sdpa and eager are the one attention there is; others are refused by name."""
    folder, model = written(tmp_path, DEFAULT, tokenizer)
    base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    torch.testing.assert_close(base(ids(DEFAULT)).last_hidden_state, model.hidden(ids(DEFAULT)), atol=1e-5, rtol=0)
    for name in ("sdpa", "eager"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, attn_implementation=name
        )
        torch.testing.assert_close(theirs(ids(DEFAULT)).logits, model(ids(DEFAULT)), atol=1e-5, rtol=0)
    for name in ("flash_attention_2", "flex_attention"):
        with pytest.raises(
            ValueError, match=f"attn_implementation '{name}' is not offered by this model; expected 'sdpa' or 'eager'"
        ):
            transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation=name)


def test_licence_is_the_projects():
    text = (Path(nanolab.__file__).parents[1] / "LICENSE").read_text()
    assert all(line in text for line in export.LICENCE.split(", "))
    assert export.LICENCE in export.modelling_file()


@pytest.mark.slow
def test_a_run_becomes_a_folder(tokenizer, tmp_path, capsys):
    """The whole command; its own check reads the folder in a process that cannot import nanolab."""
    make_run("books", tokenizer)
    out = tmp_path / "deep" / "out"
    assert export_hf.run(ExportConfig(model="books", out=str(out))) == 0
    said = capsys.readouterr().out
    assert (
        "NanolabForCausalLM, with its code" in said
        and "logits differ by 0 at most" in said
        and "token ids are equal" in said
    )
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        export.CODE,
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["out"] and (out / "model.safetensors").stat().st_mode == (
        out / "config.json"
    ).stat().st_mode
    with pytest.raises(UserError, match="out exists already; expected a new folder; try another --out, or --overwrite"):
        export_hf.run(ExportConfig(model="books", out=str(out)))


def test_overwriting(tokenizer, tmp_path, monkeypatch):
    """Replaces an export and nothing else. Without transformers the folder is written unchecked, and that is said."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    found, out = make_run("books", tokenizer), tmp_path / "out"
    export.export(found, out, model_card)
    (out / "chat_template.jinja").touch()  # of another kind of model
    done = export.export(found, out, model_card, overwrite=True)
    assert (
        done.difference is None
        and not (out / "chat_template.jinja").exists()
        and [path.name for path in tmp_path.iterdir() if path.name != "base"] == ["out"]
    )
    for name in ("thesis.tex", "zoo"):
        (out / name).mkdir()
    with pytest.raises(
        UserError,
        match="out holds thesis.tex and 1 more, which no export writes and --overwrite would delete; .* move it away",
    ):
        export.export(found, out, model_card, overwrite=True)
    assert (out / "thesis.tex").is_dir() and (out / "config.json").is_file()
    (tmp_path / "letters").mkdir()
    with pytest.raises(UserError, match="letters holds no exported model .* --overwrite replaces only those"):
        export.export(found, tmp_path / "letters", model_card, overwrite=True)


def test_originals_are_not_replaced(tokenizer, tmp_path):
    """What save_pretrained leaves has names of exports only; and an export that was imported is that run's original."""
    original, _ = written(tmp_path / "original", SQUARE, tokenizer)
    (original / "README.md").write_text("---\nlicense: mit\n---\n# GPT-2, not by nanolab\n")
    found = make_run("other", tokenizer, imported=str(original))
    with pytest.raises(UserError, match="original holds no exported model .* --overwrite replaces only those"):
        export.export(found, original, model_card, overwrite=True)
    (original / "README.md").write_text("---\ntags:\n- nanolab\n---\n")
    with pytest.raises(UserError, match="original is the folder that other was imported from; expected another one"):
        export.export(found, tmp_path / "x" / ".." / "original", model_card, overwrite=True)
    assert (original / "model.safetensors").is_file()


def test_a_folder_that_cannot_be_replaced_stays(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(FileNotFoundError):
        export.put(tmp_path / "not written", tmp_path / "out")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*")) if "base" not in path.parts] == [
        "out",
        "out/mine",
    ]


def test_what_cannot_be_written_is_named(tokenizer, tmp_path, monkeypatch):
    """The folder, also where its disk is full, and not the place of temporary files."""
    found = make_run("books", tokenizer, SQUARE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))  # bytes of a file: less than the weights
    try:
        with pytest.raises(
            UserError, match="out cannot be written: .*; expected room and permission there; try another --out"
        ):
            export.export(found, tmp_path / "out", model_card)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match="none cannot be written: .*; try TMPDIR="):
        export.export(found, tmp_path / "out", model_card)
    assert not list(tmp_path.glob("*out*"))


def test_mistakes_are_said(tokenizer, tmp_path):
    found = make_run("books", tokenizer)
    with pytest.raises(UserError, match="--dtype int4 is unknown; expected one of fp32, bf16"):
        export.export(found, tmp_path / "out", model_card, "int4")
    with pytest.raises(UserError, match="--out is missing"):
        export_hf.run(ExportConfig(model="books"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/out cannot be written: .*; try another --out"):
        export.export(found, tmp_path / "file" / "out", model_card)


@pytest.mark.slow
def test_a_folder_that_is_not_the_model_is_refused(tokenizer, tmp_path, exports_read_warm):
    folder, model = written(tmp_path / "a", SQUARE, tokenizer)
    assert export.check_export(folder, model, tokenizer) < 1e-5
    model.wte.weight.data[:200] *= 1.01
    with pytest.raises(
        UserError, match="the logits of the folder differ by up to .* from the model's; expected at most 0.0001"
    ):
        export.check_export(folder, model, tokenizer)
    with pytest.raises(UserError, match="transformers reads text as other ids than nanolab"):
        export.check_export(folder, model, Tokenizer.train([TEXT.upper()], 285))
    (folder / "model.safetensors").write_bytes(b"1234567890")
    with pytest.raises(UserError, match="transformers cannot read the folder that was written: .*nothing was kept"):
        export.check_export(folder, model, tokenizer)


def test_pushing_needs_a_name_and_a_token(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="--push mine is not a repository; expected USER/NAME; try --push USER/mine"):
        push.check_push("mine")
    with pytest.raises(UserError, match="--push needs a token .* type hf auth login, or set HF_TOKEN"):
        push.check_push("me/mine")


def test_a_refused_upload_loses_nothing(tokenizer, tmp_path, monkeypatch):
    """Nobody listens on that port."""
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    folder, _ = written(tmp_path / "out", DEFAULT, tokenizer)
    before = sorted(folder.iterdir())
    with pytest.raises(
        UserError, match="me/mine could not be uploaded: .*; the folder .*out is whole; type hf upload me/mine .*out"
    ):
        push.push(folder, "me/mine")
    assert sorted(folder.iterdir()) == before


def test_a_new_repository_is_private_and_an_old_one_loses_what_another_export_left(tokenizer, tmp_path, monkeypatch):
    """The hub's own client says what it would change on a hub that is not there."""
    import huggingface_hub.hf_api

    asked, there = (
        {},
        [
            ".gitattributes",
            "README.md",
            "chat_template.jinja",
            export.CODE,
            "model.safetensors",
            "notes/README.md",
            "scores.csv",
        ],
    )
    monkeypatch.setattr(huggingface_hub.hf_api, "is_xet_available", lambda: False, raising=False)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo, **flags: asked.update(flags) or f"https://hub/{repo}"
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, **where: there)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_commit", lambda self, operations, **rest: asked.update(operations=operations)
    )
    folder, _ = written(tmp_path / "out", SQUARE, tokenizer)
    assert (
        push.push(folder, "me/mine") == "https://hub/me/mine" and asked["private"] is True and asked["exist_ok"] is True
    )
    changes = {(type(op).__name__.removeprefix("CommitOperation"), op.path_in_repo) for op in asked["operations"]}
    assert changes == {("Delete", name) for name in ("README.md", "chat_template.jinja", export.CODE)} | {
        ("Add", path.name) for path in folder.iterdir()
    }


def card(found, tokenizer, dtype="fp32"):
    return model_card(found, DEFAULT, tokenizer, dtype, export.CODE, export.LICENCE)


CHAT = {
    "step": 7,
    "settings": {"temperature": 0.0, "max_tokens": 48, "tool": "calculator"},
    "chatcore": None,
    "tasks": {
        "gsm8k:test": {
            "split": "test",
            "version": 1,
            "baseline": 0.0,
            "n": 200,
            "accuracy": 0.125,
            "interval": [0.086, 0.178],
            "called": 0.5,
            "outcomes": {},
            "examples": [{"question": "How\nmany?", "reply": "12", "correct": True, "reference": "12"}],
        }
    },
}


def test_the_card_says_what_is_on_record(tokenizer):
    base = make_run("books", tokenizer)
    (base.run_dir / "eval_base.json").write_text(
        json.dumps(
            {
                "step": 7,
                "data": "/home/me/books",
                "val": {"bpb": 1.23456, "bytes": 4_000_000},
                "samples": [{"prompt": "A", "text": "B"}],
            }
        )
    )
    text = card(base, tokenizer)
    for line in (
        "- base: pretrained on `books`",
        "| base | books@7 | 51,200 | 5.12e+07 | 12 s |",
        "`c0ffee`",
        "| bits per byte (4.0 MB) | - | 1.2346 | - |",
        '- "A" -> "B"',
        f"{sum(p.numel() for p in GPT(DEFAULT).parameters()):,} parameters",
        "fp32, as trained",
        "put `tokenizer.bos_token` before a text",
        "trust_remote_code=True",
    ):
        assert line in text
    task = {"shots": 10, "n": 50, "accuracy": 0.3, "interval": [0.19, 0.44], "baseline": 0.25}
    rules = {rule: {"accuracy": 0.4, "interval": [0.3, 0.5]} for rule in ("sum", "per_token", "per_byte")}
    core = {"label": "CORE-1 of 22", "value": 0.0667, "interval": [-0.08, 0.25], "tasks": {"copa": task}}
    record = {
        "step": 7,
        "core": core,
        "hellaswag": {"n": 90, **rules},
        "lambada": {"n": 80, "accuracy": 0.1, "interval": [0.05, 0.2]},
    }
    (base.run_dir / "eval_base.json").write_text(
        json.dumps(json.loads((base.run_dir / "eval_base.json").read_text()) | record)
    )
    text = card(base, tokenizer)
    for line in (
        "| bits per byte",
        "| CORE-1 of 22 | - | 0.0667 | -0.0800 to 0.2500 |",
        "| copa 10-shot (n = 50) | 25.0 % | 30.0 % | 19.0 % to 44.0 % |",
        "| hellaswag by loss per byte (n = 90) | 25.0 % | 40.0 % | 30.0 % to 50.0 % |",
        "| lambada last word (n = 80) | - | 10.0 % | 5.0 % to 20.0 % |",
    ):
        assert line in text
    assert "/home" not in text and "chat" not in text.partition("## What it cannot do")[0]
    talk = make_run("talk", tokenizer, kind="sft", origin="books@7")
    assert "No evaluation of talk@7 is on record." in card(talk, tokenizer)
    (talk.run_dir / "eval_chat.json").write_text(json.dumps(CHAT))
    text = card(talk, tokenizer, "bf16")
    for line in (
        "- base: pretrained on `books`",
        "- sft: fine-tuned on conversations of `jsonl=talk.jsonl:2, gsm8k:1`",
        "| gsm8k test (n = 200) | 0.0 % | 12.5 % | 8.6 % to 17.8 % |",
        (
            "Tasks: right answers; n problems. Replies were drawn with temperature 0.0, max tokens 48; calls in them"
            " were answered by the tool calculator."
        ),
        "> How / many?",
        "rounded to bf16",
        "measured before the weights were rounded to bf16",
        "apply_chat_template",
        "It may call a calculator",
    ):
        assert line in text
    assert "measured before" not in card(talk, tokenizer)
    (talk.run_dir / "eval_chat.json").write_text(
        json.dumps(CHAT | {"settings": CHAT["settings"] | {"tool": "", "temperature": 0.7, "num_samples": 4}})
    )
    assert (
        "drawn, 4 to each problem, of which the share of right ones counts, with temperature 0.7, max tokens 48; calls"
        " of a tool in them were not answered." in card(talk, tokenizer)
    )
    (talk.run_dir / "eval_chat.json").write_text(json.dumps(CHAT | {"step": 6}))
    assert "No evaluation of talk@7 is on record." in card(talk, tokenizer)


def test_the_card_of_what_is_not_on_record(tokenizer):
    """A run whose origin is gone; a stage of reinforcement learning, whose FLOPs nobody counts; a model from
    elsewhere.
    """
    lost = card(make_run("lost", tokenizer, kind="sft", origin="gone@3"), tokenizer)
    assert (
        "It started from gone@3, whose records, or those of what that started from, are not there any more." in lost
        and "- sft: " in lost
    )
    assert "nanolab begins every text with `<|bos|>`." in lost and "trained on begins" not in lost
    better = make_run("better", tokenizer, kind="rl", origin="lost2@7")
    make_run("lost2", tokenizer)
    assert "| rl | better@7 | not known | not known | 12 s |" in card(better, tokenizer)
    other = card(make_run("other", tokenizer, imported="/home/me/gpt2", tokens=0), tokenizer)
    assert (
        "- base: imported from a folder of transformers, `gpt2`; how that was trained is not on record" in other
        and "/home" not in other
    )
    tuned = card(make_run("tuned", tokenizer, kind="sft", origin="other@7"), tokenizer)
    assert all(
        "nanolab begins every text with `<|bos|>`." in text and "trained on begins" not in text
        for text in (other, tuned)
    )
    assert "Every text that the model was trained on begins with `<|bos|>`." in card(better, tokenizer)


def test_a_damaged_record_is_not_taken_for_one_that_is_gone(tokenizer):
    base, talk = make_run("books", tokenizer), make_run("talk", tokenizer, kind="sft", origin="books@7")
    (base.run_dir / "eval_base.json").write_text("{")
    with pytest.raises(UserError, match="eval_base.json is missing or damaged"):
        card(talk, tokenizer)


@torch.no_grad()
def test_where_a_text_ends_is_said_as_it_is(tokenizer, tmp_path):
    """GPT-2's own class does not stop at its last position."""
    found = make_run("books", tokenizer)
    assert "32 tokens at most; generation stops there." in card(found, tokenizer)
    assert "32 tokens at most; `generate` does not stop there, but fails: leave room" in model_card(
        found, SQUARE, tokenizer, "fp32", "", export.LICENCE
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(written(tmp_path, SQUARE, tokenizer)[0])
    with pytest.raises(IndexError):
        theirs.generate(ids(SQUARE)[:, :30], attention_mask=torch.ones(2, 30), max_new_tokens=8, eos_token_id=None)

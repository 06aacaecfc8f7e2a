"""scripts.import_hf: the run is the model that transformers reads from the folder, and the other commands take it;
mistakes are named.
"""

import dataclasses
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nanolab.cli import UserError, from_preset
from nanolab.data.chat import render_prompt
from nanolab.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanolab.evals.config import BaseEvalConfig
from nanolab.inference.config import ChatConfig
from nanolab.inference.engine import Engine
from nanolab.interop import export, gpt2, hf_model, import_gpt2
from nanolab.interop.config import ImportConfig
from nanolab.model.config import InspectConfig
from nanolab.model.gpt import GPT
from nanolab.records.models import find_model, load_model, read_json
from nanolab.runtime import Runtime
from nanolab.stages.config import SFTConfig
from nanolab.training.schedule import gpt_config
from scripts import base_eval, chat_cli, chat_sft, import_hf

spec = importlib.util.spec_from_file_location("nanolab_tests_tiny_gpt2", Path(__file__).with_name("tiny_gpt2.py"))
tiny_gpt2 = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_gpt2)

CPU = Runtime(torch.device("cpu"), torch.float32)
TEXT = "the dog isn't naïve <|endoftext|> <|user_start|>"


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return tiny_gpt2.make(tmp_path_factory.mktemp("published") / "tiny")


@pytest.fixture
def folder(published, tmp_path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(published, tmp_path / "tiny")


def imported(folder: Path, name: str = ""):
    import_hf.run(ImportConfig(str(folder), name))
    return load_model(name or folder.name, CPU)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{}, {"old_tokenizer": True, "tie_word_embeddings": False, "n_embd": 48, "n_head": 4, "n_layer": 3}]
)
def test_the_run_is_the_model_of_the_folder(settings, tmp_path, capsys):
    folder = tiny_gpt2.make(tmp_path / "tiny", **settings)
    theirs, tok = (
        transformers.GPT2LMHeadModel.from_pretrained(folder),
        transformers.GPT2Tokenizer.from_pretrained(folder),
    )
    model, tokenizer, meta = imported(folder)
    V = len(tok)
    assert tokenizer.vocab_size == model.config.vocab_size == V + 9 and [
        tokenizer.special(name) for name in SPECIAL_TOKENS
    ] == list(range(V, V + 9))
    assert (
        tokenizer.bos == model.config.bos == tok.eos_token_id and tokenizer.decode([tokenizer.bos]) == "<|endoftext|>"
    )
    plain = "the dog isn't naïve, it's 345"
    assert tokenizer.encode(plain) == tok.encode(plain)
    ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(TEXT)]])
    got, want = model(ids), theirs(ids).logits
    torch.testing.assert_close(got[..., :V], want, atol=1e-4, rtol=0)
    mean = theirs.transformer.wte.weight.double().mean(0).float()
    assert all(torch.equal(row, mean) for row in model.wte.weight[V:]) and torch.equal(
        model.wte.weight[:V], theirs.transformer.wte.weight
    )
    # logits are linear in the head's rows
    torch.testing.assert_close(got[..., V:].mean(-1), want.mean(-1), atol=1e-4, rtol=0)
    out, saved = gpt2.to_hf(model.state_dict(), model.config), load_file(folder / "model.safetensors")
    assert out.keys() == saved.keys() and all(
        torch.equal(out[name][:V] if name.endswith(("wte.weight", "lm_head.weight")) else out[name], saved[name])
        for name in saved
    )
    assert (meta["kind"], meta["tokens"], read_json(find_model("tiny").run_dir / "result.json")["kind"]) == (
        "base",
        0,
        "base",
    )
    assert f"{V + 9} tokens: {V} of its own, 9 chat tokens added" in capsys.readouterr().out


@torch.no_grad()
@pytest.mark.fault("L2")
def test_special_tokens_that_come_first_stay_first(folder, tmp_path):
    """Imported and exported again: `tokenizers` gives the ids of the original file, and the weights of those ids are
    the same.
    """
    import tokenizers

    raw = json.loads((folder / "tokenizer.json").read_text())
    end = raw["added_tokens"][0]["id"]
    raw["model"]["vocab"] = {s: 0 if s == tiny_gpt2.END else i + 1 for s, i in raw["model"]["vocab"].items()} | {
        tiny_gpt2.END: 0
    }
    raw["added_tokens"][0]["id"] = 0
    raw["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    for name in ("config.json", "generation_config.json"):
        changed(folder / name, bos_token_id=0, eos_token_id=0)
    original = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model, tokenizer, _ = imported(folder, "g")
    assert tokenizer.bos == model.config.bos == 0 and tokenizer.vocab_size == end + 10
    pinned = tokenizers.Tokenizer.from_file(str(find_model("g").run_dir / "tokenizer" / "tokenizer.json"))
    (tmp_path / "out").mkdir()
    export.write_export(tmp_path / "out", model, tokenizer, "base")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = original.encode("<|endoftext|>the dog isn't 345").ids
    assert (
        ids[0] == 0
        and ids
        == pinned.encode("<|endoftext|>the dog isn't 345").ids
        == theirs("<|endoftext|>the dog isn't 345").input_ids
    )
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(path)(torch.tensor([ids])).logits
        for path in (folder, tmp_path / "out")
    )
    torch.testing.assert_close(after[..., : end + 1], before, atol=1e-4, rtol=0)


def test_the_other_commands_take_it(published, tmp_path, capsys, monkeypatch):
    """Evaluated, fine-tuned, and it replies: the words of the import are the commands that work."""
    monkeypatch.setenv("NANOLAB_DTYPE", "float32")
    import_hf.run(ImportConfig(str(published), "g"))
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"the cat sat on mat {i}, " * 9)
    base_eval.run(
        BaseEvalConfig(
            model="g", data_dir=str(tmp_path / "text"), modes="bpb,sample", split_tokens=512, device_type="cpu"
        )
    )
    assert read_json(find_model("g").run_dir / "eval_base.json")["val"]["bpb"] > 0
    chats = [
        [{"role": "user", "content": f"the dog {i}"}, {"role": "assistant", "content": "sat on it"}] for i in range(20)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    tuning = dict(
        model="g",
        run="g-sft",
        tasks=f"jsonl={tmp_path / 'chats.jsonl'}",
        num_iterations=2,
        device_batch_size=4,
        total_batch_size=512,
        eval_every=-1,
        device_type="cpu",
    )
    with pytest.raises(UserError, match="--no-load-optimizer"):
        chat_sft.run(SFTConfig(**tuning | {"run": "none"}))
    chat_sft.run(SFTConfig(**tuning, load_optimizer=False, init_lr_frac=0.05))
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))
    capsys.readouterr()
    chat_cli.run(ChatConfig(prompt="the dog", max_tokens=5, device_type="cpu"))
    said = capsys.readouterr()
    assert "model g-sft@2" in said.err and said.out.endswith("\n")


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_published_sizes_are_presets(name):
    preset = from_preset(InspectConfig, name)
    c = gpt_config(preset, preset.vocab_size)
    flags = import_gpt2.flags_like(c)
    assert (flags.preset, gpt_config(flags, c.vocab_size), flags.total_batch_size) == (name, c, 524288)


@pytest.mark.parametrize("layers,width,heads,row", [(5, 48, 4, 40), (7, 96, 3, 64)])
def test_other_sizes_are_gpt2_with_flags(layers, width, heads, row):
    preset = from_preset(InspectConfig, "gpt2")
    c = dataclasses.replace(gpt_config(preset, 300), n_layer=layers, n_embd=width, n_head=heads, sequence_len=row)
    flags = import_gpt2.flags_like(c)
    assert flags.preset == "gpt2" and gpt_config(flags, 300) == c


def test_parts_halves_and_padding(folder, capsys):
    """Weights in parts are joined, in fp16 widened; rows that no token has are left out."""
    want = imported(folder, "whole")[0].state_dict()
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wte.weight"] = torch.cat((tensors["transformer.wte.weight"], torch.ones(19, 32)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 19}))
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name].half() for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    got = imported(folder, "parts")[0].state_dict()
    assert "19 rows without a token left out" in capsys.readouterr().out
    for name in want:
        rows = len(want[name]) - 9 if name == "wte.weight" else None
        assert got[name].shape == want[name].shape and torch.equal(
            got[name][:rows], want[name][:rows].half().float()
        ), name


def changed(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def in_parts(folder: Path, first: str = "a.safetensors", second: str = "b.safetensors") -> None:
    """The weights in two files, of which the second may lie elsewhere."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: (first, second)[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in (first, second):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def second_cut(folder: Path) -> None:
    in_parts(folder)
    cut(folder / "b.safetensors")


def quantised(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {name: (t * 50).to(torch.int8) for name, t in tensors.items() if name.endswith("mlp.c_fc.weight")},
        folder / "model.safetensors",
    )


def index(text: str):
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    "damage,says",
    [
        (lambda f: changed(f / "config.json", model_type="llama"), "is of a 'llama' model; expected 'gpt2'"),
        (lambda f: changed(f / "config.json", n_layer=3), r"the weights lack transformer\.h\.2\..* and 11 more"),
        (lambda f: changed(f / "config.json", vocab_size=300), r"wte\.weight has the shape .*; expected \(300, 32\)"),
        (lambda f: changed(f / "config.json", activation_function="relu"), "activation_function 'relu'"),
        (lambda f: (f / "config.json").unlink(), "no config.json in"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors in .*copy or download it"),
        (pickled, r"pytorch_model\.bin is a pickle.*if you trust it: python -c .*save_pretrained"),
        (lambda f: (f / "config.json").write_text("[1]"), "config.json holds a JSON list; expected an object"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json is not JSON"),
        (lambda f: changed(f / "config.json", n_head=0), "config.json does not say n_head;"),
        (lambda f: changed(f / "config.json", n_layer=True), "config.json does not say n_layer;"),
        (lambda f: changed(f / "config.json", n_head=3), "n_embd 32 for n_head 3; expected a multiple"),
        (lambda f: cut(f / "model.safetensors"), "model.safetensors is damaged"),
        (second_cut, "b.safetensors is damaged"),
        (index("{"), r"index\.json is not JSON"),
        (index("[]"), r"index\.json holds a JSON list"),
        (index("{}"), r"index\.json has no weight_map"),
        (index('{"weight_map": ["a"]}'), r"index\.json has no weight_map"),
        (index('{"weight_map": {"x": 3}}'), r"index\.json names the file 3"),
        (
            lambda f: in_parts(f, second="../b.safetensors"),
            r"index\.json names the file '\.\./b\.safetensors'; expected files beside it",
        ),
        (
            lambda f: in_parts(f, second=str(f.parent / "b.safetensors")),
            r"index\.json names the file '/.*/b\.safetensors'; expected files beside it",
        ),
        (quantised, r"model\.safetensors holds transformer\.h\.\d\.mlp\.c_fc\.weight in int8; expected floating point"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer in"),
        (
            lambda f: (f / "tokenizer.json").write_text((f.parent / "other" / "tokenizer.json").read_text()),
            r"has 257 tokens, but the weights have \d+ rows",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_named_and_leaves_nothing(damage, says, folder, base_dir):
    (folder.parent / "other").mkdir()
    bytes_only = transformers.GPT2Tokenizer.from_pretrained(folder).backend_tokenizer.to_str()
    model = json.loads(bytes_only)
    letters = sorted(model["model"]["vocab"], key=model["model"]["vocab"].get)
    letters = [token for token in letters if len(token) == 1]
    model["model"] |= {"vocab": {token: i for i, token in enumerate(letters)}, "merges": []}
    model["added_tokens"] = [token | {"id": 256} for token in model["added_tokens"]]
    (folder.parent / "other" / "tokenizer.json").write_text(json.dumps(model))
    damage(folder)
    with pytest.raises(UserError, match=says):
        import_hf.run(ImportConfig(str(folder), "r"))
    assert not (base_dir / "runs" / "r").exists()


def test_names_that_cannot_be_are_named(folder):
    for cfg, says in [
        (ImportConfig(), "no folder ''"),
        (ImportConfig(str(folder / "none")), "no folder .*none"),
        (ImportConfig(str(folder), "a@b"), "a@b"),
    ]:
        with pytest.raises(UserError, match=says):
            import_hf.run(cfg)
    import_hf.run(ImportConfig(str(folder)))
    with pytest.raises(UserError, match="run 'tiny' exists already"):
        import_hf.run(ImportConfig(str(folder)))


def make_chat(name: str, tokenizer, kind: str) -> None:
    """A finished GPT-2 of that kind."""
    preset = from_preset(InspectConfig, "gpt2")
    c = dataclasses.replace(
        gpt_config(preset, tokenizer.vocab_size), n_layer=2, n_embd=16, n_head=2, sequence_len=64, bos=tokenizer.bos
    )
    model = GPT(c)
    model.init_weights(0)
    import_gpt2.write_run(name, Path("none"), model.state_dict(), c, tokenizer, CPU, kind)


@pytest.mark.fault("S14")
@pytest.mark.parametrize("kind", ["base", "sft", "rl"])
def test_an_exported_folder_comes_back_as_what_it_was(kind, tmp_path, capsys, monkeypatch):
    """Also where transformers has saved it again; an older export says it by its template."""
    monkeypatch.setenv("NANOLAB_DTYPE", "float32")
    tokenizer = Tokenizer.train(["three times four is 12, the fox said. " * 3], 277)
    make_chat("m", tokenizer, kind)
    out, again = tmp_path / "out", tmp_path / "again"
    model, want, _ = load_model("m", CPU)
    out.mkdir()
    export.write_export(out, model, want, kind)
    transformers.AutoModelForCausalLM.from_pretrained(out).save_pretrained(again)
    transformers.AutoTokenizer.from_pretrained(out).save_pretrained(again)
    for folder, name in ((out, "back"), (again, "again")):
        back, tok, meta = imported(folder, name)
        assert (meta["kind"], read_json(find_model(name).run_dir / "result.json")["kind"]) == (kind, kind)
        assert tok.hash == want.hash and all(
            torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values())
        )
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != export.KIND}))
    assert imported(out, "older")[2]["kind"] == ("base" if kind == "base" else "sft")
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))
    capsys.readouterr()
    asked = []
    monkeypatch.setattr(
        "nanolab.inference.engine.Engine.add",
        lambda engine, request, *rest, add=Engine.add: (
            asked.append(list(request.prompt)) or add(engine, request, *rest)
        ),
    )
    chat_cli.run(ChatConfig(model="back", prompt="four?", max_tokens=3, device_type="cpu"))
    assert asked == [
        (
            [want.bos, *want.encode("four?")]
            if kind == "base"
            else render_prompt(want, [{"role": "user", "content": "four?"}])
        )
    ]


@pytest.mark.fault("S14")
def test_another_chat_template_makes_no_chat_model(folder, capsys):
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
    )
    assert imported(folder)[2]["kind"] == "base"
    assert "chat template is not nanolab's, and is left out" in capsys.readouterr().out


def renamed(folder: Path, **names: torch.Tensor) -> None:
    save_file(load_file(folder / "model.safetensors") | names, folder / "model.safetensors")


def poisoned(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 4:7] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    tensors["transformer.ln_f.bias"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def ordinary_added_token(folder: Path) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"].append(
        raw["added_tokens"][0] | {"id": len(raw["model"]["vocab"]), "content": "<URL>", "special": False}
    )
    (folder / "tokenizer.json").write_text(json.dumps(raw))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 497774208\n"


@pytest.mark.fault("S14")
@pytest.mark.parametrize(
    ("damage", "code", "values"),
    [
        (
            poisoned,
            "weights-not-finite",
            {"tensors": {"transformer.h.1.mlp.c_fc.weight": 3, "transformer.ln_f.bias": 1}},
        ),
        (lambda f: renamed(f, **{"score.weight": torch.zeros(2, 32)}), "weights-hold", {"tensors": ["score.weight"]}),
        (lambda f: (f / "model.safetensors").write_text(POINTER), "git-lfs-pointer", {}),
        (lambda f: (f / "tokenizer.json").write_text(POINTER), "git-lfs-pointer", {}),
        (ordinary_added_token, "added-tokens", {"tokens": ["<URL>"]}),
    ],
)
def test_what_cannot_be_imported_is_named_as_the_file_has_it(damage, code, values, folder, base_dir):
    damage(folder)
    with pytest.raises(UserError) as error:
        import_hf.run(ImportConfig(str(folder), "r"))
    assert error.value.code == code and values.items() <= error.value.values.items()
    assert set(re.findall(r"--[a-z-]+", str(error.value))) <= {"--folder", "--run"} and "tok_train" not in str(
        error.value
    )
    assert not (base_dir / "runs" / "r").exists()


@pytest.mark.fault("S14")
@pytest.mark.parametrize(
    ("damage", "code"),
    [(poisoned, "weights-not-finite"), (lambda f: (f / "model.safetensors").write_text(POINTER), "git-lfs-pointer")],
)
def test_the_same_is_named_in_a_folder_that_is_evaluated(damage, code, folder):
    damage(folder)
    with pytest.raises(UserError) as error:
        hf_model.load_folder(folder, CPU)
    assert error.value.code == code


@pytest.mark.fault("S14")
def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    tokenizer = Tokenizer.train(["three times four is 12, the fox said. " * 3], 277)
    c = dataclasses.replace(
        gpt_config(from_preset(InspectConfig, "gpt2"), 277),
        n_layer=2,
        n_embd=16,
        n_head=2,
        sequence_len=64,
        bos=tokenizer.bos,
    )
    model = GPT(c)
    model.init_weights(0)
    with torch.no_grad():
        model.h[1].attn.c_k.weight[2, 3] = float("nan")
    import_gpt2.write_run("m", Path("none"), model.state_dict(), c, tokenizer, CPU)
    with pytest.raises(UserError) as error:
        export.export(find_model("m"), tmp_path / "out", lambda *_: "")
    assert (error.value.code, error.value.values["tensors"]) == ("weights-not-finite", {"h.1.attn.c_k.weight": 1})
    assert not (tmp_path / "out").exists()

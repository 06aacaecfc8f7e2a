"""A run -> a folder that transformers loads: config, weights, tokenizer, card; whole or not at all, and checked before
it is there.

A model that is GPT-2 becomes a GPT2LMHeadModel. Every other one comes with its own code in modeling_nanolab.py
(one_file.py)."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from nanolab.cli import UserError, to_json
from nanolab.data.chat import template_of
from nanolab.data.tokenizer import Tokenizer
from nanolab.interop import gpt2, one_file
from nanolab.model.gpt import GPT, Embedding, Norm
from nanolab.records.environment import git_commit
from nanolab.records.models import ModelRef, load_model
from nanolab.runtime import Runtime

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CODE = "modeling_nanolab.py"
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    CODE,
}
# of transformers -> classes in CODE
AUTO = {"AutoConfig": "NanolabConfig", "AutoModel": "NanolabModel", "AutoModelForCausalLM": "NanolabForCausalLM"}
KIND = "nanolab_kind"  # in config.json: base, sft or rl
MARK = "\n- nanolab\n"  # the tag in the card's header, which other people's folders do not have
LICENCE = "MIT License, Copyright (c) 2026 nanolab contributors"
TOLERANCE = 1e-4  # of a logit in fp32
HARD_TEXT = (
    "It's 12,345.67\n\n\tx = {'\u00e9': '\U0001f600'}   <|bos|> \u4f60\u597d \u0627\u0644\u0633 I'LL\r\n "
    " don't<|assistant_end|>  2018 1234567 00000000 \u0662\u0660\u0661\u0668"
)


@dataclass(frozen=True)
class Exported:
    folder: Path
    native: bool  # a GPT2LMHeadModel, which transformers has
    bytes: int
    difference: float | None  # largest of a logit between the folder's model and ours; None: not checked


def export(
    found: ModelRef, out: Path, card: Callable[..., str], dtype: str = "fp32", overwrite: bool = False
) -> Exported:
    """Write the model to `out`. Raises UserError for a folder that may not be replaced, that cannot be written, or
    whose model differs from ours.

    card: writes README.md (evals/model_card.py). dtype: of the weights, a key of DTYPES; "bf16" rounds them.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is unknown; expected one of {', '.join(DTYPES)}; try --dtype bf16")
    check_place(out, overwrite)
    model, tokenizer, meta = load_model(found, Runtime(torch.device("cpu"), torch.float32))
    if (source := meta.get("env", {}).get("imported")) and Path(source).resolve() == out.resolve():
        raise UserError(
            f"{out} is the folder that {found.name} was imported from; expected another one, since that is the"
            " original; try another --out"
        )
    gpt2.check_weights(
        model.state_dict(),
        f"{found.name}@{found.step}",
        f"export a step saved before training broke: --model {found.name}@STEP",
    )
    text = card(found, model.config, tokenizer, dtype, CODE if brings_code(model) else "", LICENCE)
    temp = out.parent / f".tmp-{out.name}-{os.getpid()}"
    try:
        with writing(out, "another --out"):
            temp.mkdir(parents=True)
            write_export(temp, model, tokenizer, meta["kind"], DTYPES[dtype])
            (temp / "README.md").write_text(text, encoding="utf-8")
        difference = check_export(temp, model, tokenizer)
        with writing(out, "another --out"):
            put(temp, out)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return Exported(out, not brings_code(model), sum(path.stat().st_size for path in out.iterdir()), difference)


def check_place(out: Path, overwrite: bool) -> None:
    """Raise UserError unless `out` may be written: it is not there, or it is an export and may be replaced."""
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out} exists already; expected a new folder; try another --out, or --overwrite to replace it")
    names, card = {path.name for path in out.iterdir()} if out.is_dir() else set(), out / "README.md"
    if (
        not {"config.json", "model.safetensors"} <= names
        or not card.is_file()
        or MARK not in card.read_text(encoding="utf-8", errors="replace")
    ):
        raise UserError(
            f"{out} holds no exported model (config.json, model.safetensors and nanolab's README.md); --overwrite"
            " replaces only those; try another --out"
        )
    if strangers := sorted(names - FILES):
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise UserError(
            f"{out} holds {strangers[0]}{more}, which no export writes and --overwrite would delete; expected an"
            " exported model alone; move it away, or try another --out"
        )


def put(temp: Path, out: Path) -> None:
    """Give a whole folder its name, in the place of what has it, which keeps it if that fails."""
    old = temp.with_name(f"{temp.name}-old")
    if out.exists():
        out.rename(old)
    try:
        temp.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def writing(place: Path, instead: str) -> Iterator[None]:
    """Raises UserError, naming the place, where something cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        raise UserError(
            f"{place} cannot be written: {getattr(error, 'strerror', None) or error}; expected room and permission"
            f" there; try {instead}"
        ) from None


def write_export(folder: Path, model: GPT, tokenizer: Tokenizer, kind: str, dtype: torch.dtype = torch.float32) -> None:
    """Everything but the card. kind: base, sft or rl. The model's own weights are rounded to `dtype`, so that it stays
    what is written.
    """
    round_(model, dtype)
    specials = special_ids(tokenizer, kind)
    common = {name: specials[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    names = castable(model)
    state = {name: tensor.to(dtype) if name in names else tensor for name, tensor in model.state_dict().items()}
    if brings_code(model):
        rows, height = model.config.vocab_size, model.wte.num_embeddings
        tables = {name for name, m in model.named_modules() if isinstance(m, Embedding) and m.num_embeddings == height}
        tables.add("lm_head")
        # trainers read the head's matrix
        state = {name: tensor[:rows] if name.rpartition(".")[0] in tables else tensor for name, tensor in state.items()}
        config, state = (
            nanolab_config(model),
            {f"model.gpt.{name}": tensor.contiguous() for name, tensor in state.items()},
        )
        (folder / CODE).write_text(modelling_file(), encoding="utf-8")
    else:
        config, state = gpt2.config_to_hf(model.config), gpt2.to_hf(state, model.config)
    write_json(folder / "config.json", config | common | {"dtype": str(dtype).removeprefix("torch."), KIND: kind})
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors keeps its files to their owner
    tokenizer.save(folder)
    write_json(folder / "generation_config.json", common | {"eos_token_id": specials["ends"]})
    write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, specials, model.config.sequence_len))
    if kind != "base":
        (folder / "chat_template.jinja").write_text(template_of(tokenizer), encoding="utf-8")


def brings_code(model: GPT) -> bool:
    return bool(gpt2.is_gpt2(model.config))


def special_ids(tokenizer: Tokenizer, kind: str) -> dict[str, Any]:
    """Tokens with a part in generation. What begins a document ends a text, too; in a chat, a reply's end does.

    Padding is a token that is no target in training, since trainers leave its id out of the loss: in a chat what begins
    it, elsewhere the end of a tool's output. `generate` guesses a mask from padding in a prompt that has none, unless
    it is also an end."""
    bos, end = tokenizer.bos, tokenizer.special("<|assistant_end|>")
    if kind == "base":
        return {
            "bos_token_id": bos,
            "eos_token_id": bos,
            "pad_token_id": tokenizer.special("<|output_end|>"),
            "ends": [bos, end],
        }
    return {"bos_token_id": bos, "eos_token_id": end, "pad_token_id": bos, "ends": [end, bos]}


def nanolab_config(model: GPT) -> dict[str, Any]:
    """config.json for modeling_nanolab.py. The tables have a row for each token and none to pad them."""
    c = replace(model.config, pad_vocab_to=1)
    return {
        "model_type": "nanolab",
        "architectures": ["NanolabForCausalLM"],
        "auto_map": {auto: f"{CODE[:-3]}.{name}" for auto, name in AUTO.items()},
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.sequence_len,
        "hidden_size": c.n_embd,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "gpt": to_json(c),
    }


def tokenizer_config(tokenizer: Tokenizer, specials: dict[str, Any], limit: int) -> dict[str, Any]:
    names = {name.removesuffix("_id"): name_of(tokenizer, i) for name, i in specials.items() if name.endswith("_id")}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "model_max_length": limit,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def modelling_file() -> str:
    """modeling_nanolab.py."""
    commit = git_commit()
    head = (
        f"nanolab's language model for transformers, in one file: ids -> logits, loss and text.\n\n{LICENCE}. Needs"
        " torch 2.9 and transformers 4.57 or 5, and nothing else.\nWritten by nanolab's"
        f" scripts.export_hf{f' at commit {commit}' if commit else ''}.\n\nThese are nanolab's own modules, statement"
        " by statement, without what this model does not need: it computes what nanolab computes.\nA comment names"
        " each module where it begins. Everything is computed in the dtype of the weights, logits and loss in fp32.\n"
    )
    return one_file.stitch("nanolab.interop.hf_wrapper", head)


def castable(model: GPT) -> set[str]:
    """Names of the parameters that are cast to the compute dtype wherever they are used; the others are fp32 in any
    dtype.
    """
    kept = (nn.Linear, nn.Embedding, Norm, type(model.lm_head))
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, kept)
        for name, _ in module.named_parameters(recurse=False)
    }


@torch.no_grad()
def round_(model: GPT, dtype: torch.dtype) -> None:
    """Round the weights that `write` casts."""
    names = castable(model)
    for name, p in model.named_parameters():
        if name in names:
            p.copy_(p.to(dtype))


def name_of(tokenizer: Tokenizer, i: int) -> str:
    return tokenizer.decode([i])


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# What a reader of the folder does, in a process that knows transformers alone.
READ = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
sys.modules["nanolab"] = None  # whoever imports it here fails
folder, work, trust = sys.argv[1], sys.argv[2], sys.argv[3] == "code"  # transformers 5 asks about the tokenizer, too
asked = json.load(open(work + "/asked.json"))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).float().eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
with torch.no_grad():
    logits = model(torch.tensor(asked["ids"])).logits
encoded = tokenizer(asked["text"], add_special_tokens=False, split_special_tokens=True).input_ids
one, whole = [[i] for i in range(asked["vocab_size"])], dict(clean_up_tokenization_spaces=False)
said = {
    "tokens": tokenizer.batch_decode(one, **whole),
    "text": tokenizer.batch_decode(one, skip_special_tokens=True, **whole),
    "special": {name: tokenizer.convert_tokens_to_ids(name) for name in asked["special"]},
    "roles": {
        name: [getattr(tokenizer, name), getattr(model.config, name)]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    },
}
json.dump(said, open(work + "/said.json", "w"))
save_file({"logits": logits.contiguous(), "encoded": torch.tensor(encoded)}, work + "/said.safetensors")
"""


@torch.no_grad()
def check_export(folder: Path, model: GPT, tokenizer: Tokenizer) -> float | None:
    """The largest difference of a logit between the folder, read by transformers in a process of its own, and `model`.

    None where transformers is not installed. Raises UserError for a difference above TOLERANCE, other token ids, and a
    folder that cannot be read, and where there is no room for temporary files."""
    if importlib.util.find_spec("transformers") is None:
        return None
    c = model.config
    ids = torch.randint(c.vocab_size, (2, min(64, c.sequence_len)), generator=torch.Generator().manual_seed(0))
    with writing(Path(tempfile.gettempdir()), "TMPDIR=/another/folder"), tempfile.TemporaryDirectory() as work:
        write_json(
            Path(work) / "asked.json",
            {
                "ids": ids.tolist(),
                "text": HARD_TEXT,
                "special": list(tokenizer.specials),
                "vocab_size": tokenizer.vocab_size,
            },
        )
        env = os.environ | {
            "HF_MODULES_CACHE": f"{work}/modules",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        trust = "code" if (folder / CODE).exists() else "plain"
        command = [sys.executable, "-c", READ, str(folder.resolve()), work, trust]
        done = subprocess.run(command, cwd=work, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
            raise UserError(
                f"transformers cannot read the folder that was written: {said[0]}; nothing was kept; try bash"
                " runs/setup.sh hf"
            )
        said, tokens = (
            load_file(Path(work) / "said.safetensors"),
            json.loads((Path(work) / "said.json").read_text(encoding="utf-8")),
        )
    if said["encoded"].tolist() != tokenizer.encode(HARD_TEXT):
        raise UserError(
            "transformers reads text as other ids than nanolab; expected the same; nothing was kept; try bash"
            " runs/setup.sh hf"
        )
    if other := other_tokens(tokens, tokenizer):
        raise UserError(
            f"transformers reads {len(other)} tokens otherwise than nanolab (first {other[0]}); expected the same;"
            " nothing was kept; try bash runs/setup.sh hf",
            "export-tokens-differ",
            tokens=other,
        )
    difference = (said["logits"] - model(ids)).abs().max().item()
    if not difference <= TOLERANCE:
        raise UserError(
            f"the logits of the folder differ by up to {difference:.2g} from the model's; expected at most"
            f" {TOLERANCE:g}; nothing was kept; try bash runs/setup.sh hf"
        )
    return difference


def other_tokens(said: dict[str, Any], tokenizer: Tokenizer) -> list[str]:
    """What READ says otherwise than `tokenizer`: ids of special tokens, the text of each id, the tokens with a part in
    generation.
    """
    special = set(tokenizer.specials.values())
    names = [
        f"{name}: id {said['special'][name]}, not {i}"
        for name, i in tokenizer.specials.items()
        if said["special"][name] != i
    ]
    texts = [(i, "" if i in special else tokenizer.decode([i])) for i in range(tokenizer.vocab_size)]
    ids = [
        f"id {i}: {said['tokens'][i]!r}, not {text!r}"
        for i, text in texts
        if said["text"][i] != text or (i not in special and said["tokens"][i] != text)
    ]
    return [*names, *ids, *(f"{role}: {a} and {b}" for role, (a, b) in said["roles"].items() if a != b)]

"""GPT-2 weights and configs, ours <-> those of transformers' GPT2LMHeadModel.

transformers keeps the four matrices of a block as Conv1D, (inputs, outputs), where ours are (outputs, inputs). Which
ones are transposed is a fact of their names: attn.c_proj is square, so its shape says nothing. Query, key and value are
one tensor there."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nanolab.cli import UserError
from nanolab.data.kinds import check_pointer
from nanolab.model.accounting import padded_vocab, windows
from nanolab.model.config import Architecture, GPTConfig
from nanolab.model.gpt import GPT
from nanolab.presets import GPT2, PRESETS


class Module(NamedTuple):
    ours: tuple[str, ...]  # one after the other along the outputs they are `theirs`
    theirs: str
    conv1d: bool = False  # its weight is the transpose of ours


LAYER = (
    Module(("norm_1",), "ln_1"),
    Module(("attn.c_q", "attn.c_k", "attn.c_v"), "attn.c_attn", conv1d=True),
    Module(("attn.c_proj",), "attn.c_proj", conv1d=True),
    Module(("norm_2",), "ln_2"),
    Module(("mlp.c_fc",), "mlp.c_fc", conv1d=True),
    Module(("mlp.c_proj",), "mlp.c_proj", conv1d=True),
)
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # which old versions saved beside the weights

# What makes a model GPT-2, and what its config.json says of it. Flags that are not here may be anything: other settings
# make them idle.
FLAGS = {
    name: GPT2[name]
    for name in (
        "positions",
        "qk_norm",
        "qk_gain",
        "value_embeds",
        "residual_scalars",
        "smear",
        "backout",
        "embed_norm",
        "mlp",
        "norm",
        "norm_gain",
        "softcap",
    )
}
FLAGS |= {
    name: getattr(Architecture(), name) for name in ("attention", "softmax", "gate", "score_softcap", "document_mask")
}
FACTS: dict[str, tuple[Any, ...]] = {  # what config.json may say; where it is silent it means the first
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # one function under two names
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
}
SIZES = {
    "sequence_len": "n_positions",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}


def is_gpt2(c: GPTConfig) -> str:
    """What keeps a model from being GPT-2, flag by flag; "" if nothing does. Its head may be tied or its own."""
    wrong = [
        f"{name} {getattr(c, name)} (GPT-2: {value})" for name, value in FLAGS.items() if getattr(c, name) != value
    ]
    if set(c.bias.split(",")) != set(GPT2["bias"].split(",")):
        wrong.append(f"bias {c.bias or 'none'} (GPT-2: {GPT2['bias']})")
    if min(windows(c)) < c.sequence_len:
        wrong.append(
            f"window_pattern {c.window_pattern} with windows of {min(windows(c))} (GPT-2: whole rows of"
            f" {c.sequence_len})"
        )
    return ", ".join(wrong)


def config_from_hf(config: Mapping[str, Any]) -> GPTConfig:
    """The model of a config.json, without dropout. Raises UserError naming what GPT-2 does not have."""
    if config.get("model_type") != "gpt2":
        raise UserError(
            f"config.json is of a {config.get('model_type')!r} model; expected 'gpt2'; models of other families can be"
            " evaluated as they are, but not imported"
        )
    missing = [theirs for theirs in SIZES.values() if type(config.get(theirs)) is not int or config[theirs] < 1]
    if missing:
        raise UserError(
            f"config.json does not say {', '.join(missing)}; expected whole numbers; save the model again with"
            " save_pretrained"
        )
    if config["n_embd"] % config["n_head"]:
        raise UserError(
            f"config.json has n_embd {config['n_embd']} for n_head {config['n_head']}; expected a multiple; save the"
            " model again with save_pretrained"
        )
    said = {name: config.get(name, allowed[0]) for name, allowed in FACTS.items()}
    wrong = [
        f"{name} {said[name]!r} (expected {allowed[0]!r})"
        for name, allowed in FACTS.items()
        if said[name] not in allowed
    ]
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        wrong.append(f"n_inner {config['n_inner']} (expected {4 * config['n_embd']}, four times the width)")
    if wrong:
        raise UserError(
            f"config.json has {', '.join(wrong)}: a GPT-2 that nanolab has no place for; use a model without that"
        )
    flags = {name: value for name, value in PRESETS["gpt2"].items() if name in Architecture.__dataclass_fields__}
    sizes = {ours: config[theirs] for ours, theirs in SIZES.items()}
    return GPTConfig(**flags | sizes | {"tied_head": config.get("tie_word_embeddings", True), "pad_vocab_to": 1})


def config_to_hf(c: GPTConfig) -> dict[str, Any]:
    """config.json of a model that `is_gpt2`. A text begins and ends with the token that separates our documents, if c
    names it.
    """
    document = c.bos if c.bos >= 0 else None
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **{theirs: getattr(c, ours) for ours, theirs in SIZES.items()},
        "n_inner": 4 * c.n_embd,
        **{name: allowed[0] for name, allowed in FACTS.items()},
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": c.tied_head,
        "bos_token_id": document,
        "eos_token_id": document,
        "use_cache": True,
    }


def to_hf(state: Mapping[str, Tensor], c: GPTConfig) -> dict[str, Tensor]:
    """Our weights as GPT2LMHeadModel names and shapes them, contiguous, values and dtype unchanged.

    Rows that pad the vocabulary are left out, and so is a tied head, as save_pretrained does. c: of a model that
    `is_gpt2`."""
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
    out = {}
    for ours, theirs, transposed in _names(c):
        tensor = state[ours[0]] if len(ours) == 1 else torch.cat([state[name] for name in ours])
        out[theirs] = (
            tensor.mT if transposed else tensor[: c.vocab_size] if _is_table(theirs) else tensor
        ).contiguous()
    return out


def from_hf(tensors: Mapping[str, Tensor], c: GPTConfig) -> dict[str, Tensor]:
    """The inverse of `to_hf`: tensors of a GPT2LMHeadModel, or of the GPT2Model in it, under our names.

    Raises UserError for tensors that are missing, that nobody knows, or whose shapes are not those of the config.
    """
    saved = {_full(name): name for name in tensors}
    tensors = {_full(name): tensor for name, tensor in tensors.items() if not _is_mask(name)}
    head, table = tensors.get("lm_head.weight"), tensors.get("transformer.wte.weight")
    if c.tied_head and head is not None:
        tensors.setdefault("transformer.wte.weight", head)  # a file may hold the one tensor under either name
        if table is not None and not torch.equal(head, table):
            raise UserError(
                "lm_head.weight differs from wte.weight, but config.json ties them; expected equal ones; set"
                " tie_word_embeddings to false there to keep both"
            )
        del tensors["lm_head.weight"]
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in to_hf(GPT(c).state_dict(), c).items()}
    for what, names in (("lack", expected.keys() - tensors.keys()), ("hold", tensors.keys() - expected.keys())):
        if names:
            first, more = saved.get(min(names), min(names)), f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"the weights {what} {first}{more}; expected those of a GPT-2 with {c.n_layer} layers, as config.json"
                " says; check that both are of one model",
                f"weights-{what}",
                tensors=sorted(saved.get(name, name) for name in names),
            )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(
                f"{name} has the shape {tuple(tensors[name].shape)}; expected {shape} by config.json; check that both"
                " are of one model"
            )
    state, padding = {}, padded_vocab(c) - c.vocab_size
    for ours, theirs, transposed in _names(c):
        tensor = tensors[theirs].mT if transposed else tensors[theirs]
        tensor = F.pad(tensor, (0, 0, 0, padding)) if padding and _is_table(theirs) else tensor
        state |= {name: part.contiguous() for name, part in zip(ours, tensor.chunk(len(ours)))}
    return state


def read_folder(folder: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """(config, our weights in fp32) of a folder that save_pretrained wrote. Raises UserError for what is missing,
    damaged or not GPT-2.
    """
    index = folder / "model.safetensors.index.json"  # of large models, which are saved in parts
    for path in sorted(folder.glob("*")):
        check_pointer(path)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"no config.json in {folder}; expected a folder that transformers' save_pretrained wrote; check the path"
        )
    c = config_from_hf(_json(folder / "config.json"))
    names = _shards(index) if index.exists() else ["model.safetensors"]
    if missing := [name for name in names if not (folder / name).is_file()]:
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        how = (
            'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
        others = (
            f"; {pickled.name} is a pickle, which runs what it holds, and is not read; if you trust it: {how}"
            if pickled
            else "; copy or download it"
        )
        raise UserError(f"no {missing[0]} in {folder}; expected the weights{others}")
    tensors = {name: tensor for file in names for name, tensor in _weights(folder / file).items()}
    state = from_hf(tensors, c)
    check_weights(tensors, folder, "copy or download it again, or take a step that was saved before training broke")
    return c, {name: tensor.float() for name, tensor in state.items()}


def check_weights(tensors: Mapping[str, Tensor], of: Path | str, advice: str) -> None:
    """Raises UserError naming the tensors that hold NaN or infinity, and how many numbers of each do."""
    bad = {name: n for name, tensor in tensors.items() if not _is_mask(name) and (n := int((~tensor.isfinite()).sum()))}
    if bad:
        first = ", ".join(f"{name} ({n:,})" for name, n in list(bad.items())[:4]) + (", ..." if len(bad) > 4 else "")
        raise UserError(
            f"{sum(bad.values()):,} numbers of the weights of {of} are NaN or infinite, in {first}; expected finite"
            f" ones; {advice}",
            "weights-not-finite",
            tensors=bad,
        )


def with_rows(
    state: Mapping[str, Tensor], c: GPTConfig, known: int, vocab_size: int
) -> tuple[dict[str, Tensor], GPTConfig]:
    """The model with `vocab_size` tokens: the first `known` are its own, the others begin as the mean of these."""
    tables = ("wte.weight",) if c.tied_head else ("wte.weight", "lm_head.weight")

    def resized(rows: Tensor) -> Tensor:
        return torch.cat((rows[:known], rows[:known].double().mean(0).to(rows.dtype).expand(vocab_size - known, -1)))

    return {name: resized(tensor) if name in tables else tensor for name, tensor in state.items()}, replace(
        c, vocab_size=vocab_size
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not JSON ({error}); expected what save_pretrained wrote; copy or download it again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a JSON {type(content).__name__}; expected an object, as save_pretrained writes; copy or"
            " download it again"
        )
    return content


def _shards(index: Path) -> list[str]:
    """The files of weights that an index names, in order; all lie beside it."""
    parts = _json(index).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise UserError(
            f"{index} has no weight_map; expected the file of each tensor by name; copy or download it again"
        )
    if strange := [name for name in parts.values() if not isinstance(name, str) or Path(name).name != name]:
        raise UserError(f"{index} names the file {strange[0]!r}; expected files beside it; copy or download it again")
    return sorted(set(parts.values()))


def _weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, as they are."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); expected the weights; copy or download it again") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not _is_mask(name):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{path} holds {name} in {kind}; expected floating point; quantised weights are not read: take the"
                " model that they were made from"
            )
    return tensors


def _names(c: GPTConfig) -> list[tuple[tuple[str, ...], str, bool]]:
    """(our tensors, the tensor that they are there, whether it is transposed), for every tensor of the model."""
    rows: list[tuple[tuple[str, ...], str, bool]] = [
        (("wte.weight",), "transformer.wte.weight", False),
        (("positions.wpe.weight",), "transformer.wpe.weight", False),
    ]
    modules = [
        Module(tuple(f"h.{i}.{name}" for name in m.ours), f"h.{i}.{m.theirs}", m.conv1d)
        for i in range(c.n_layer)
        for m in LAYER
    ]
    for ours, theirs, conv1d in [*modules, Module(("norm_f",), "ln_f")]:
        for kind in ("weight", "bias"):
            rows.append(
                (tuple(f"{name}.{kind}" for name in ours), f"transformer.{theirs}.{kind}", conv1d and kind == "weight")
            )
    return rows if c.tied_head else [*rows, (("lm_head.weight",), "lm_head.weight", False)]


def _is_table(theirs: str) -> bool:
    return theirs in ("transformer.wte.weight", "lm_head.weight")


def _is_mask(name: str) -> bool:
    return MASKS.fullmatch(_full(name).removeprefix("transformer.")) is not None


def _full(name: str) -> str:
    """A tensor's name in GPT2LMHeadModel, whichever wrapper saved it."""
    name = name.removeprefix("_orig_mod.")
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"

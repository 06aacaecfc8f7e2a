"""A model as tables: tensors, parameters of each part, layers, FLOPs, cache bytes, kernels. Nothing is allocated."""

import re
from dataclasses import asdict, fields
from typing import Any

from nanolab.model.config import Architecture, GPTConfig, InspectConfig
from nanolab.tables import print_rich, ruled_table

# the first word of a parameter's name, after the block's -> what the table calls it, in this order; other words come
# last
PARTS = {
    "wte": "token embedding",
    "embedding": "beside the token embedding",
    "positions": "positions",
    "value_embeds": "value embeddings",
    "attn": "attention",
    "mlp": "MLP",
    "lm_head": "head",
}


OTHER = "norms and mixing"


def describe_model(cfg: InspectConfig) -> dict[str, Any]:
    """What `print_model` prints, JSON-ready."""
    import torch

    from nanolab import runtime
    from nanolab.model.gpt import GPT
    from nanolab.training.schedule import gpt_config

    config = gpt_config(cfg, cfg.vocab_size, bos=0)
    rt = runtime.start(cfg.device_type)
    with torch.device("meta"):
        model = GPT(config, rt.dtype, cfg.attn_kernel)
    document = {
        "preset": cfg.preset,
        "model": asdict(config),
        "machine": {"device_type": rt.device.type, "device_name": rt.device_name, "dtype": rt.dtype_name},
        "tensors": tensors(model),
        "layers": layers(config, model.kernel_names(rt.device.type)),
        "totals": totals(config, cfg.context or config.sequence_len, rt.device.type, rt.dtype.itemsize),
    }
    rt.close()
    return document


def tensors(model) -> list[dict[str, Any]]:
    """One entry for each kind of parameter: part, name with * for the layer, shape, layers that have it (or none),
    parameters in all.
    """
    kinds: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        shape, layer = tuple(p.shape), re.search(r"\.(\d+)\.", name)
        kind = re.sub(r"\.\d+\.", ".*.", name)
        entry = kinds.setdefault((kind, shape), dict(part=part(kind), name=kind, shape=shape, layers=[], parameters=0))
        entry["layers"] += [int(layer[1])] if layer else []
        entry["parameters"] += p.numel()
    order = [*PARTS.values(), OTHER]
    return sorted(kinds.values(), key=lambda entry: order.index(entry["part"]))


def part(name: str) -> str:
    return PARTS.get(name.removeprefix("h.*.").split(".")[0], OTHER)


def layers(c: GPTConfig, kernels: list[str]) -> list[dict[str, Any]]:
    """One entry for each kind of layer: its numbers, window (None: the whole row), positions, heads, cached values per
    token, kernel.
    """
    from nanolab.model.accounting import cached_shapes, windows
    from nanolab.model.variants.positions import POSITIONS, rope_dim

    rotated = [POSITIONS[c.positions].uses_rope(c, i) for i in range(c.n_layer)]
    groups: list[dict[str, Any]] = []
    for i, (window, shapes, kernel) in enumerate(zip(windows(c), cached_shapes(c), kernels)):
        facts = dict(
            window=window if window < c.sequence_len else None,
            positions=f"rope, {rope_dim(c)} channels" if rotated[i] else "none" if any(rotated) else c.positions,
            heads=c.n_head,
            kv_heads=c.n_kv_head,
            cached=[list(shape) for shape in shapes],
            kernel=kernel,
        )
        same = next((g for g in groups if facts == {k: v for k, v in g.items() if k != "layers"}), None)
        if same is None:
            groups.append(same := dict(layers=[], **facts))
        same["layers"].append(i)
    return groups


def totals(c: GPTConfig, context: int, device_type: str, bytes_per_value: int) -> dict[str, Any]:
    """Parameters, FLOPs per token, cache bytes per token, and what training takes (bytes: for one row, and for each
    more).
    """
    from nanolab.model.accounting import (
        decode_flops_per_token,
        kv_bytes_per_token,
        n_params,
        peak_bytes,
        train_flops_per_token,
        train_memory,
    )

    p = n_params(c)
    one, two = (peak_bytes(train_memory(c, rows, bytes_per_value, device_type)) for rows in (1, 2))
    return {
        "parameters": p["total"],
        "without_wpe": p["total"] - p["wpe"],
        "scaling": p["scaling"],
        "train_flops_per_token": train_flops_per_token(c),
        "context": context,
        "decode_flops_per_token": decode_flops_per_token(c, context),
        "kv_bytes_per_token": {"bfloat16": kv_bytes_per_token(c, 2), "float32": kv_bytes_per_token(c, 4)},
        "train_bytes": one,
        "train_bytes_per_row": two - one,
    }


def print_model(document: dict[str, Any]) -> None:
    """Print what `describe_model` found; nothing is computed here but sums and shares."""
    c = document["model"]
    print_rich(
        f"[bold]{document['preset']}[/]: {c['n_layer']} layers, width {c['n_embd']:,}, {c['n_head']} heads of"
        f" {c['n_embd'] // c['n_head']}, rows of {c['sequence_len']:,} tokens, vocabulary {c['vocab_size']:,}"
    )
    changed = {f.name: c[f.name] for f in fields(Architecture) if c[f.name] != f.default}
    print_rich(
        "other than by default: " + (" ".join(flag_text(name, value) for name, value in changed.items()) or "nothing")
    )
    for table in (tensor_table(document), layer_table(document), total_table(document)):
        print_rich("", table)


def flag_text(name: str, value: Any) -> str:
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{dashed}" if value else f"--no-{dashed}"
    return f"--{dashed} {value:g}" if isinstance(value, float) else f"--{dashed} {value}"


def tensor_table(document: dict[str, Any]):
    made = ruled_table(
        "Parameters", dict(tensor="left", shape="right", layers="left", parameters="right", share="right")
    )
    total, n_layer, tied = (
        document["totals"]["parameters"],
        document["model"]["n_layer"],
        document["model"]["tied_head"],
    )
    for part in dict.fromkeys(t["part"] for t in document["tensors"]):
        inside = [t for t in document["tensors"] if t["part"] == part]
        n = sum(t["parameters"] for t in inside)
        made.add_row(
            f"[bold]{part}[/]" + (", which is also the head's matrix" if tied and part == PARTS["wte"] else ""),
            "",
            "",
            f"[bold]{n:,}[/]",
            f"[bold]{n / total:.1%}[/]",
        )
        for t in inside:
            repeats = (
                ""
                if not t["layers"]
                else f"x {len(t['layers'])}" + (f": {layer_numbers(t['layers'])}" if len(t["layers"]) < n_layer else "")
            )
            made.add_row(
                f"  {t['name']}", " x ".join(f"{n:,}" for n in t["shape"]), repeats, f"{t['parameters']:,}", ""
            )
    made.add_section()
    made.add_row("[bold]all[/]", "", "", f"[bold]{total:,}[/]", "")
    return made


def layer_table(document: dict[str, Any]):
    machine = document["machine"]
    left, right = "left", "right"
    columns = dict(layers=left, sees=left, positions=left, heads=right)
    columns |= {"key/value heads": right, "cached per token": left, "kernel": left}
    made = ruled_table("Attention", columns)
    for g in document["layers"]:
        sees = "the whole row" if g["window"] is None else f"{g['window']:,} tokens back"
        values = " + ".join(f"{heads} x {channels}" for heads, channels in g["cached"] if channels)
        made.add_row(
            layer_numbers(g["layers"]),
            sees,
            g["positions"],
            str(g["heads"]),
            str(g["kv_heads"]),
            f"{values} numbers",
            g["kernel"],
        )
    made.caption = f"kernels are those of this machine: {machine['device_type']}, {machine['dtype']}"
    made.caption_justify = "left"
    return made


def total_table(document: dict[str, Any]):
    t, c, machine = document["totals"], document["model"], document["machine"]
    made = ruled_table("In all", dict(what="left", amount="right", unit="left"))
    made.show_header = False
    made.add_row("parameters", f"{t['parameters']:,}", "")
    if t["without_wpe"] != t["parameters"]:
        made.add_row("  without the table of positions", f"{t['without_wpe']:,}", "")
    made.add_row("  that the scaling laws count", f"{t['scaling']:,}", "matrices of the layers, and the head's")
    made.add_row("training, per token", scaled(t["train_flops_per_token"]), "FLOPs, forward and backward")
    made.add_row(f"decoding, per token after {t['context']:,} others", scaled(t["decode_flops_per_token"]), "FLOPs")
    for dtype, n in t["kv_bytes_per_token"].items():
        made.add_row(
            f"cache in {dtype}, per token", f"{n:,}", f"bytes; {scaled(n * c['sequence_len'])}B for a whole row"
        )
    made.add_row(
        f"training memory, {machine['dtype']} on {machine['device_type']}",
        f"about {scaled(t['train_bytes'])}B",
        f"with one row on the device, {scaled(t['train_bytes_per_row'])}B for each more",
    )
    return made


def scaled(n: float) -> str:
    """Three digits and a unit: 1.23 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.3g} "


def layer_numbers(layers: list[int]) -> str:
    """0-2, 4-6 for runs; 1, 3, ..., 11 for a longer regular series."""
    steps = {b - a for a, b in zip(layers, layers[1:])}
    if len(layers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{layers[0]}, {layers[1]}, ..., {layers[-1]}"
    runs: list[list[int]] = []
    for i in layers:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)

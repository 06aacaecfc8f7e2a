"""Write or check dev/VARIANTS.md, the index of every architectural choice, and tests/contracts/rows.txt, the models
that cover all pairs of choices: python dev/variants.py [--check]

Nothing in the index is typed by hand. Names come from the tables; formulas and papers from the first paragraph of an
entry's docstring, "formula. Source."; what a flag sets from its comment in model/config.py; what is tested from
tests/contracts."""

import ast
import dataclasses
import inspect
import re
import sys
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "contracts")]

import axes  # noqa: E402
from covering import every_pair  # noqa: E402

from nanolab import presets  # noqa: E402
from nanolab.cli import UserError, from_preset  # noqa: E402
from nanolab.cli import main as run  # noqa: E402
from nanolab.help import texts_of  # noqa: E402
from nanolab.model import accounting, config, context, fp8, gpt  # noqa: E402
from nanolab.model.config import Architecture, InspectConfig  # noqa: E402
from nanolab.model.kernels import choice, fa3, reference, spec  # noqa: E402
from nanolab.model.variants import embedding, latent, parts, positions, softmax, tables  # noqa: E402
from nanolab.stages.config import BaseTrainConfig  # noqa: E402
from nanolab.training import recipes  # noqa: E402
from nanolab.training.schedule import gpt_config  # noqa: E402

FILE = ROOT / "dev" / "VARIANTS.md"
CONTRACTS = ROOT / "tests" / "contracts"

# A flag without a table -> what carries it out.
CARRIED_OUT_BY: dict[str, Any] = {
    "bigram_rows": embedding.BigramEmbedding,
    "rope_base": positions.Rope,
    "rope_fraction": positions.rope_dim,
    "rope_scaling": positions.rope_rates,
    "position_pattern": positions.RNope,
    "mla_kv_rank": latent.ranks,
    "mla_q_rank": latent.ranks,
    "mla_rope_dim": latent.rotary_width,
    "window_pattern": config.windows,
    "window_size": config.windows,
    "softmax_n": softmax.SoftmaxN,
    "qk_gain": gpt.CausalSelfAttention.forward,
    "score_softcap": spec.AttnSpec,
    "document_mask": context.Documents,
    "value_embeds": parts.ValueEmbeds,
    "residual_scalars": parts.ResidualScalars,
    "smear": parts.Smear,
    "backout": parts.Backout,
    "embed_norm": gpt.GPT,
    "norm_gain": gpt.Norm,
    "bias": gpt.Linear,
    "softcap": gpt.softcapped,
    "tied_head": gpt.TiedHead,
    "pad_vocab_to": config.padded_vocab,
    "embed_dropout": gpt.dropout,
    "attn_dropout": reference.definition,
    "resid_dropout": gpt.dropout,
    "mlp_dropout": gpt.dropout,
}


def text() -> str:
    parts = [INTRODUCTION, *(section(flag, table) for flag, table in tables.AXES.items()), other_flags()]
    return (
        "\n\n".join([*parts, kernel_section(), recipe_section(), fp8_section(), preset_section(), contract_section()])
        + "\n"
    )


INTRODUCTION = """<!-- written by python dev/variants.py -->
# Variants

Every architectural choice: flag, formula, paper, where it is written, which contracts run on it. To add one, write a
class whose docstring begins "formula. Source." and give it a line in its table; the contracts pick it up, and `python
dev/variants.py` writes it in here. Paper and formula are read from the code, the last two columns from the tests in
[tests/contracts](../tests/contracts). What the contracts are is said [at the end](#the-contracts)."""


def section(flag: str, table: dict[str, Any]) -> str:
    """One table of classes or functions."""
    rows = []
    for name, entry in table.items():
        formula, source = formula_and_source(entry)
        typed = axes.shown(name)
        shown = f"`{typed}`" + (" (default)" if name == default(flag) else "")
        said = complete(f"{dashed(flag)} {name}", formula=formula, paper=source, place=place(entry))
        rows.append([shown, *said, *status(flag, typed)])
    return f"## {dashed(flag)}\n\n{texts_of(Architecture)[flag]}.\n\n" + markdown(
        ["value", "formula", "source", "place", "contracts", "refused with"], rows
    )


def complete(entry: str, **cells: str) -> list[str]:
    """The cells. Raises UserError that names the entry and what is empty."""
    if missing := [what for what, cell in cells.items() if not cell]:
        seen = f"{entry} has no {' and no '.join(missing)} for dev/VARIANTS.md"
        todo = 'begin its own docstring with "Formula. Authors, arXiv 1234.56789." and write it in a file'
        raise UserError(
            f"{seen}; expected all of {', '.join(cells)}; {todo}", "entry-undocumented", entry=entry, missing=missing
        )
    return list(cells.values())


def other_flags() -> str:
    rows = []
    for field in dataclasses.fields(Architecture):
        if field.name not in tables.AXES:
            entry = CARRIED_OUT_BY[field.name]
            text = linked(texts_of(Architecture)[field.name])
            says = [f"`{dashed(field.name)}`", f"`{value_text(field.default)}`", text]
            rows.append([*says, *formula_and_source(entry), place(entry), *status(field.name)])
    head = ["flag", "default", "what it sets", "formula", "source", "place", "contracts", "refused with"]
    return "## Numbers, patterns and switches\n\n" + markdown(head, rows)


def kernel_section() -> str:
    """What a kernel offers is asked of its `missing`; fa3, which would ask the machine, is taken to be loadable."""
    with patch.object(fa3, "probed", lambda device_type: (None, "")):
        rows = []
        for name, kernel in choice.KERNELS.items():
            offers = [offered(kernel, *machine) for machine in (("cpu", torch.float32), ("cuda", torch.bfloat16))]
            module = kernel.run.__module__.rpartition(".")[2]
            tested = "every contract" if offers[0] != "does not run" else tests_of(rf"\b{module}\.")
            what = doc(sys.modules[kernel.run.__module__])
            rows.append(
                [
                    f"`{name}`",
                    *complete(f"--attn-kernel {name}", what=linked(what), place=place(kernel.run)),
                    *offers,
                    tested,
                ]
            )
    orders = "; ".join(f"{device}: {', '.join(names)}" for device, names in choice.PREFERENCE.items())
    head = ["kernel", "what it is", "place", "in fp32 on CPUs", "in bf16 on CUDA", "tests"]
    return (
        "## --attn-kernel\n\nEach layer gets the first kernel of its machine's list that can do what the flags ask"
        f" ({orders}), or the one that is asked for. Beyond causal attention the flags may ask for:"
        f" {', '.join(sorted(spec.NEEDS))}. Tests beside the contracts: {tests_of('import .*KERNELS')}.\n\n"
        + markdown(head, rows)
    )


def offered(kernel: Any, device_type: str, dtype: torch.dtype) -> str:
    def lacks(*needs: str) -> bool:
        return bool(kernel.missing(frozenset(needs), device_type, dtype, (9, 0) if device_type == "cuda" else None))

    if lacks():
        return "does not run"
    alone = sorted(need for need in spec.NEEDS if lacks(need))
    pairs = [f"{a} with {b}" for a, b in combinations(sorted(spec.NEEDS - set(alone)), 2) if lacks(a, b)]
    return f"all but {', '.join(alone + pairs)}" if alone or pairs else "all"


def recipe_section() -> str:
    rows = []
    for name, recipe in recipes.RECIPES.items():
        shown, key = f"`{name}`" + (" (default)" if name == BaseTrainConfig.recipe else ""), f'"{name}": '
        what = [comment_above(recipes, key), doc(recipe.groups), doc(recipe.lr_shape) or recipe.lr_shape.__name__]
        what, groups, rates = map(linked, what)
        rows.append(
            [shown, *complete(f"--recipe {name}", what=what, groups=groups, rates=rates, place=line_of(recipes, key))]
        )
    head = ["recipe", "what it is", "groups", "rates over a run", "place"]
    return f"## --recipe\n\nHow a model is trained. Tests: {tests_of('RECIPES')}.\n\n" + markdown(head, rows)


def fp8_section() -> str:
    paragraphs = [" ".join(p.split()) for p in (fp8.__doc__ or "").split("\n\n")]
    return (
        f"## --fp8\n\n{linked(' '.join(paragraphs))} Code: {place(fp8.Float8Linear)}. Tests:"
        f" {tests_of('Float8Linear')}."
    )


def preset_section() -> str:
    rows = []
    for name, row in presets.PRESETS.items():
        cfg = from_preset(InspectConfig, name)
        c = gpt_config(cfg, cfg.vocab_size, bos=0)
        p = accounting.n_params(c)
        size = (
            f"{c.n_layer} layers, width {c.n_embd}, {c.n_head} heads, rows of {c.sequence_len:,}, vocabulary"
            f" {c.vocab_size:,}"
        )
        recipe = row.get("recipe", BaseTrainConfig.recipe)
        rows.append(
            [
                f"`{name}`",
                size,
                f"{p['total']:,}",
                f"{p['total'] - p['wpe']:,}",
                f"`{recipe}`",
                f"`{c.init}`",
                line_of(presets, f'"{name}": '),
            ]
        )
    head = ["preset", "size", "parameters", "without wpe", "recipe", "init", "place"]
    intro = "## --preset\n\nRows of flag values; `python -m scripts.inspect --preset NAME` shows one in full. "
    return f"{intro}Tests: {tests_of('PRESETS')}.\n\n" + markdown(head, rows)


def contract_section() -> str:
    singles, tests = axes.singles(), contract_tests()
    table = {axis: list(values) for axis, values in axes.axes().items()}
    rows = [[test, says] for test, says in tests]
    pairs = len(every_pair(table))
    return (
        f"## The contracts\n\nThese {len(tests)} run, the last one aside on a CPU, on {len(singles)} tiny models"
        f" ({link(CONTRACTS / 'test_model_contract.py')}), each the base model of {link(CONTRACTS / 'axes.py')} with"
        f" one value of one axis changed, or another shape. Of the {pairs:,} pairs of values of two axes all that are"
        f" not refused run the fast ones, many pairs to a model ({link(CONTRACTS / 'test_pairs.py')}); more at once are"
        f" sampled under `slow`. Flags and entries that no contract varies: {', '.join(axes.uncovered()) or 'none'}."
        f" Let off needing a gradient (`idle` in {link(CONTRACTS / 'contracts.py')}): {function_docs()['idle']}\n\n"
        + markdown(["contract", "what must hold"], rows)
        + "\n\nRefused, by name and with what to type instead:\n\n"
        + markdown(["pair", "why"], [[f"`{pair}`", why] for pair, _, why in tables.REFUSED])
    )


# what the tests say


def status(flag: str, value: Any = None) -> list[str]:
    """[which contracts run on this flag (with this value), what it is refused with]."""
    settings = {(axis, name): s for axis, values in axes.axes().items() for name, s in values.items()}
    tried = {key: s for key, s in settings.items() if flag in s and value in (None, s[flag])}
    if value is not None:
        alone = (
            f"all, in {len(tried)} setting{'s' * (len(tried) > 1)}"
            if tried
            else "all, in the base model" * (getattr(axes.BASE, flag) == value)
        )
    else:
        values = {value_text(v) for v in [getattr(axes.BASE, flag), *(s[flag] for s in tried.values())]}
        alone = f"all, with {', '.join(f'`{v}`' for v in sorted(values))}" if len(values) > 1 else ""
    refused: dict[str, set[str]] = {}  # this flag's value -> the other flags with theirs
    for pair in refused_pairs():
        for key in pair & tried.keys():
            (other,) = pair - {key}
            (mine, v), (theirs, w) = next(iter(tried[key].items())), next(iter(settings[other].items()))
            if mine == flag:  # and not a number that comes with the cause
                refused.setdefault(value_text(v), set()).add(f"`{dashed(theirs)} {value_text(w)}`")
    shown = [
        ("" if value is not None else f"`{v}` with ") + ", ".join(sorted(others))
        for v, others in sorted(refused.items())
    ]
    return [alone or "NONE", "; ".join(shown)]


def refused_pairs() -> list[frozenset[tuple[str, str]]]:
    if not _refused:
        table = {axis: list(values) for axis, values in axes.axes().items()}
        _refused.extend(pair for pair in every_pair(table) if not axes.allowed(dict(pair)))
    return _refused


_refused: list[frozenset[tuple[str, str]]] = []


def contract_tests() -> list[tuple[str, str]]:
    """(name, what must hold) of the tests that run on every single model: those that take the fixture `config`."""
    found = []
    for node in functions("test_model_contract.py"):
        if node.name.startswith("test_") and "config" in [a.arg for a in node.args.args]:
            called = [
                n.attr
                for n in ast.walk(node)
                if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "contracts"
            ]
            says = [function_docs()[name] for name in dict.fromkeys(called) if name != "kernels"]
            found.append(
                (
                    node.name.removeprefix("test_").replace("_", " "),
                    " ".join(filter(None, [ast.get_docstring(node), *says])),
                )
            )
    return found


def functions(file: str) -> list[ast.FunctionDef]:
    return [node for node in ast.parse((CONTRACTS / file).read_text()).body if isinstance(node, ast.FunctionDef)]


def function_docs() -> dict[str, str]:
    return {node.name: " ".join((ast.get_docstring(node) or "").split()) for node in functions("contracts.py")}


def tests_of(pattern: str) -> str:
    """Links to the test files in which a pattern occurs."""
    files = [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(pattern, path.read_text(), re.M) and path.name != "test_variants_doc.py"
    ]
    return ", ".join(map(link, files)) or "NONE"


# what the code says


def formula_and_source(entry: Any) -> tuple[str, str]:
    """The two halves of "Formula. Source." or "Formula (source)." in the first paragraph of a docstring.

    Where it has no such halves: no formula, and every paper that the docstring names.
    """
    whole = own_doc(entry)
    said = " ".join(whole.split("\n\n")[0].split()).rstrip(".")
    for halves in (
        re.fullmatch(r"(.*?\S)\. (.*)", said),
        re.fullmatch(r"(.*) \(([^()]*(?:\([^()]*\))?[^()]*)\)", said),
    ):
        if halves and re.search(SOURCE, halves[2]):
            return halves[1], linked(halves[2])
    return "", linked(", ".join(re.findall(ARXIV, whole)))


ARXIV = r"arXiv \d{4}\.\d{4,5}"
SOURCE = rf"{ARXIV}|karpathy/|modded-nanogpt|\b20\d\d\b"


def linked(text: str) -> str:
    return re.sub(ARXIV, lambda match: f"[{match[0]}](https://arxiv.org/abs/{match[0][6:]})", text)


def doc(entry: Any) -> str:
    """The first sentence of a docstring."""
    return own_doc(entry).split("\n\n")[0].replace("\n", " ").partition(". ")[0].rstrip(".")


def own_doc(entry: Any) -> str:
    """Its docstring and not, as inspect.getdoc, that of a class it inherits from: another entry's formula."""
    return inspect.cleandoc(entry.__doc__ or "")


def place(entry: Any) -> str:
    """A link to the line where it is written; "" where there is none."""
    try:
        return link(Path(inspect.getsourcefile(entry)), inspect.getsourcelines(entry)[1])
    except (OSError, TypeError):
        return ""


def line_of(module: Any, key: str) -> str:
    path = Path(module.__file__)
    return link(path, key_line(path, key))


def key_line(path: Path, key: str) -> int:
    return next(i for i, line in enumerate(path.read_text().splitlines(), 1) if line.strip().startswith(key))


def comment_above(module: Any, key: str) -> str:
    """The comment lines right above a key."""
    lines = Path(module.__file__).read_text().splitlines()[: key_line(Path(module.__file__), key) - 1]
    said = []
    while lines and lines[-1].strip().startswith("#"):
        said.insert(0, lines.pop().strip("# "))
    return " ".join(said)


def default(flag: str) -> str:
    return getattr(Architecture, flag)


# Markdown


def link(path: Path, line: int = 0) -> str:
    name = str(path.relative_to(ROOT))
    return f"[{name}:{line}](../{name}#L{line})" if line else f"[{name}](../{name})"


def dashed(flag: str) -> str:
    return "--" + flag.replace("_", "-")


def value_text(value: Any) -> str:
    return (
        ("on" if value else "off")
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value) or "none"
    )


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [head, ["---"] * len(head), *rows]
    )


def main() -> int:
    files = {FILE: text(), axes.ROWS: "".join(" ".join(row.values()) + "\n" for row in axes.rows()[0])}
    stale = [
        str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
        for path, new in files.items()
        if not path.exists() or path.read_text() != new
    ]
    if "--check" in sys.argv[1:]:
        print(
            f"{', '.join(stale)} is not what the code says; type: python dev/variants.py"
            if stale
            else "dev/VARIANTS.md and tests/contracts/rows.txt are current"
        )
        return bool(stale)
    for path, new in files.items():
        path.write_text(new)
    return 0


if __name__ == "__main__":
    run(main)

"""dev/VARIANTS.md is what the code and the contracts say; dev/variants.py writes it."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nanolab.cli import UserError, parse
from nanolab.model.config import Architecture, GPTConfig
from nanolab.model.gpt import GPT
from nanolab.model.kernels.choice import KERNELS
from nanolab.model.variants import mlp, tables
from nanolab.presets import PRESETS
from nanolab.stages.config import BaseTrainConfig
from nanolab.training.recipes import RECIPES, param_groups

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "dev" / "VARIANTS.md").read_text()


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("dev_variants", ROOT / "dev" / "variants.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(document: str, heading: str) -> dict[str, list[str]]:
    """First word in backquotes -> cells, of the table under a heading."""
    section = document.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in section.splitlines()
        if line.startswith("| `")
    ]
    return {re.match(r"`([^`]*)`", row[0])[1]: row for row in cells}


def test_it_is_current(tool):
    assert DOCUMENT == tool.text(), "type: python dev/variants.py"


def test_the_rows_of_pairs_are_all_written_down(tool):
    """So that the next entry leaves those of the last one as they are."""
    written = [line.split() for line in tool.axes.ROWS.read_text().splitlines()]
    assert written == [list(row.values()) for row in tool.axes.rows()[0]], "type: python dev/variants.py"


@pytest.mark.parametrize("flag", tables.AXES)
def test_every_entry_has_a_row_that_points_at_it(tool, flag):
    table, found = tables.AXES[flag], rows(DOCUMENT, "--" + flag.replace("_", "-"))
    assert list(found) == [tool.axes.shown(name) for name in table]
    for entry, (value, formula, source, place, contracts, _) in zip(table.values(), found.values()):
        assert len(formula) > 5, value
        assert re.search(r"arxiv\.org/abs/\d{4}\.\d{5}|karpathy/nanochat|Radford et al", source), (
            f"{value}: its docstring needs 'formula. Source.'"
        )
        assert line_at(place).startswith((f"class {entry.__name__}(", f"def {entry.__name__}("))
        assert contracts.startswith("all, in "), f"{value}: no contract runs on it"


def line_at(link: str) -> str:
    """The line that a link in a cell points at."""
    _, name, line = re.fullmatch(r"\[([^]]*)\]\(\.\./([^#]*)#L(\d+)\)", link).groups()
    return (ROOT / name).read_text().splitlines()[int(line) - 1].strip()


def test_every_other_flag_kernel_recipe_and_preset_has_a_row():
    flags = [f.name for f in dataclasses.fields(Architecture) if f.name not in tables.AXES]
    found = rows(DOCUMENT, "Numbers, patterns and switches")
    assert list(found) == ["--" + name.replace("_", "-") for name in flags]
    for row in found.values():
        assert re.match(r"(@dataclass|class |def )", line_at(row[5])), row
        assert row[6].startswith("all, with "), f"{row[0]}: no contract varies it"
    assert list(rows(DOCUMENT, "--attn-kernel")) == list(KERNELS)
    for heading, table in (("--recipe", RECIPES), ("--preset", PRESETS)):
        found = rows(DOCUMENT, heading)
        assert list(found) == list(table)
        assert all(line_at(row[-1]).startswith(f'"{name}": ') for name, row in found.items())


def test_what_it_says_of_some_entries():
    assert (
        rows(DOCUMENT, "--softmax")["softmax1"][1]
        == "p_i = exp(s_i) / (1 + sum_j exp(s_j)): a head may attend to nothing"
    )
    assert "[arXiv 2405.04434](https://arxiv.org/abs/2405.04434)" in rows(DOCUMENT, "--attention")["mla"][2]
    assert rows(DOCUMENT, "--attention")["mla"][5] == "`--qk-norm l2`, `--value-embeds on`"
    assert rows(DOCUMENT, "--qk-norm")["l2"][5] == "`--attention mla`"
    assert rows(DOCUMENT, "--positions")["rope"][5] == ""
    assert "(default)" in rows(DOCUMENT, "--mlp")["relu2"][0]
    assert rows(DOCUMENT, "--preset")["gpt2"][2] == "124,439,808"
    assert rows(DOCUMENT, "--preset")["odyssey16m"][3] == "16,025,856"
    assert rows(DOCUMENT, "--attn-kernel")["eager"][3:5] == ["all", "all"]
    assert "sink with window" in rows(DOCUMENT, "--attn-kernel")["fa3"][4]


@pytest.mark.fault("V5")
@pytest.mark.parametrize(
    "flag,doc,missing",
    [
        ("mlp", "W2 max(0, W1 x)^3, of no paper.", ["formula", "paper"]),
        ("mlp", None, ["formula", "paper"]),  # and not the formula of the class that it inherits from
        ("norm", "", ["formula", "paper"]),
        ("init", "N(0, 1) everywhere. Of nobody.", ["formula", "paper"]),
    ],
)
def test_an_entry_without_formula_or_paper_is_refused_by_name(tool, monkeypatch, flag, doc, missing):
    table = tables.AXES[flag]
    relative = list(table.values())[1]
    entry = (lambda model, g: None) if flag == "init" else type("Undocumented", (relative,), {})
    entry.__doc__ = doc
    monkeypatch.setitem(table, "undocumented", entry)
    monkeypatch.setattr(tool, "place", lambda entry: "somewhere")
    with pytest.raises(UserError) as error:
        tool.text()
    assert (error.value.code, error.value.values) == (
        "entry-undocumented",
        {"entry": f"--{flag} undocumented", "missing": missing},
    )


@pytest.mark.fault("V5")
def test_an_entry_that_is_in_no_file_is_refused_by_name(tool, monkeypatch):
    made: dict = {}
    exec('class Nowhere:\n    "x^2. Vaswani et al., arXiv 1706.03762."', made)
    monkeypatch.setitem(tables.AXES["norm"], "nowhere", made["Nowhere"])
    with pytest.raises(UserError) as error:
        tool.text()
    assert error.value.values == {"entry": "--norm nowhere", "missing": ["place"]}


TABLES = {"attn_kernel": KERNELS, "recipe": RECIPES}


@pytest.mark.fault("V6")
def test_help_readme_and_index_name_every_entry(capsys):
    """README's table has no kernels."""
    with pytest.raises(SystemExit):
        parse(BaseTrainConfig, ["--help"])
    helped, readme = re.sub(r"[│\s]+", " ", capsys.readouterr().out), (ROOT / "README.md").read_text()
    missing = []
    for flag, table in (tables.AXES | TABLES).items():
        dashed = "--" + flag.replace("_", "-")
        places = {
            "--help": re.findall(rf"{dashed} STR .*?(?= --[a-z]|$)", helped),
            "README.md": re.findall(rf"^\|[^|]*\|[^|]*`{dashed}`[^|]*\|.*", readme, re.M),
            "dev/VARIANTS.md": re.findall(rf"^## {dashed}\n.*?(?=^## |\Z)", DOCUMENT, re.M | re.S),
        }
        for name in table:
            named = re.compile(rf"(?<![\w-]){name}(?![\w-])")
            missing += [
                f"{where}: {dashed} {name}" for where, found in places.items() if not any(map(named.search, found))
            ]
    assert [entry for entry in missing if not entry.startswith("README.md: --attn-kernel")] == []


@pytest.fixture
def guide(monkeypatch):
    """(text of the guide to a new variant, the class that it writes), with its entry in the table."""
    said = (ROOT / "dev" / "guides" / "a-new-variant.md").read_text()
    (code,) = re.findall(r"<<'EOF'\n(.*?)^EOF$", said, re.M | re.S)
    monkeypatch.setitem(mlp.MLPS, "centred", None)
    exec(code, dict(vars(mlp)))
    return said, mlp.MLPS["centred"]


def test_the_guide_names_every_table(guide):
    for table in (tables.AXES | TABLES | {"preset": PRESETS}).values():
        (name, path), *_ = [
            (name, path)
            for path in (ROOT / "nanolab").rglob("*.py")
            for name in re.findall(r"^([A-Z_]+)\b.*= \{", path.read_text(), re.M)
            if getattr(sys.modules.get(".".join(path.relative_to(ROOT).with_suffix("").parts)), name, None) is table
        ]
        assert re.search(rf"^\|.*`{name}`.*{re.escape(str(path.relative_to(ROOT)))}", guide[0], re.M), (
            f"the guide does not name {name} of {path}"
        )


@pytest.mark.fault("V6")
def test_the_guide_says_which_optimizer_group_its_parameters_get(guide):
    table = re.findall(r"^\| `(h\.0\.\S+)` \| `(\w+)` \| `(\w+)` \| `(\w+)` \|$", guide[0], re.M)
    config = GPTConfig(sequence_len=16, vocab_size=64, n_layer=1, n_head=2, n_embd=32, mlp="centred")
    with torch.device("meta"):
        model = GPT(config)
    assert {name for name, *_ in table} == {name for name, _ in model.named_parameters() if ".mlp." in name}
    for i, recipe in enumerate(("dial", "adamw_cosine", "adam_constant")):
        plan = SimpleNamespace(
            recipe=recipe, batch_scale=1.0, weight_decay=0.1 if RECIPES[recipe].decays else 0.0, model=config
        )
        groups = param_groups(model, BaseTrainConfig(), plan)
        group_of = {name: group for group in groups for name, _ in group["params"]}
        for name, *said in table:
            group = group_of[name]
            assert group["name"] == said[i] and group["kind"] == ("muon" if said[i].startswith("muon") else "adamw"), (
                recipe,
                name,
            )
            assert bool(group["weight_decay"]) == (
                said[i].startswith("muon") or (said[i] == "matrices" and recipe == "adamw_cosine")
            )
    assert group_of.keys() == dict(model.named_parameters()).keys()


@pytest.mark.fault("V5")
def test_the_guides_example_has_formula_and_paper(guide, tool):
    formula, source = tool.formula_and_source(guide[1])
    assert formula.startswith("W2 silu(") and "arxiv.org/abs/1607.06450" in source


class Cubed(nn.Module):
    """W2 max(0, W1 x)^3. Nobody et al., arXiv 9901.00001."""


def test_a_new_entry_is_picked_up(tool, monkeypatch):
    monkeypatch.setitem(tables.AXES["mlp"], "cubed", Cubed)
    value, formula, source, place, contracts, refused = rows(tool.text(), "--mlp")["cubed"]
    assert (formula, source) == (
        "W2 max(0, W1 x)^3",
        "Nobody et al., [arXiv 9901.00001](https://arxiv.org/abs/9901.00001)",
    )
    assert line_at(place) == "class Cubed(nn.Module):"
    assert (contracts, refused) == ("all, in 1 setting", "")


@pytest.mark.slow
def test_a_stale_file_is_noticed(tool, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tool, "FILE", tmp_path / "VARIANTS.md")
    monkeypatch.setattr(tool.axes, "ROWS", tmp_path / "rows.txt")
    monkeypatch.setattr("sys.argv", ["variants.py", "--check"])
    assert tool.main() == 1
    monkeypatch.setattr("sys.argv", ["variants.py"])
    assert tool.main() == 0
    monkeypatch.setattr("sys.argv", ["variants.py", "--check"])
    assert tool.main() == 0
    tool.FILE.write_text(tool.FILE.read_text().replace("positions.py:", "positions.py:9", 1))
    assert tool.main() == 1
    assert "type: python dev/variants.py" in capsys.readouterr().out

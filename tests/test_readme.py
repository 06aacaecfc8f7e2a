"""README.md and dev/guides/*.md are true: their commands run, their flags and files exist, their tests exist.

A bash block runs as it stands, in the order of the file, at toy size. An HTML comment before it may say

  <!-- not run: REASON -->                 it does not run here, and why
  <!-- toy: --depth 4 => --depth 2; ... -->  what is replaced to make it small; every left side has to occur
"""

import ast
import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import configs

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "dev" / "PROMISES.md",
    ROOT / "dev" / "READING.md",
    *sorted((ROOT / "dev" / "guides").glob("*.md")),
]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
VARIANT = "dev/guides/a-new-variant.md"
SHELL = [str(path.relative_to(ROOT)) for folder in ("runs", "dev") for path in sorted((ROOT / folder).rglob("*.sh"))]
BLOCK = re.compile(r"(?P<comments>(?:^<!--(?:(?!-->).)*-->\s*\n)*)^```bash\n(?P<code>.*?)^```", re.M | re.S)


class Block(NamedTuple):
    where: str  # file:line
    code: str
    reason: str  # why it does not run; "" if it does
    toy: list[tuple[str, str]]

    def small(self) -> str:
        code = self.code
        for old, new in self.toy:
            assert old in code, f"{self.where}: the toy comment replaces {old!r}, which the block does not contain"
            code = code.replace(old, new)
        return code


def blocks(name: str, text: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(text):
        comments = dict(re.findall(r"<!--\s*(not run|toy):\s*(.*?)\s*-->", match["comments"], re.S))
        pairs = [
            tuple(part.strip() for part in pair.split("=>"))
            for pair in comments.get("toy", "").split(";")
            if pair.strip()
        ]
        line = text[: match.start("code")].count("\n") + 1
        found.append(Block(f"{name}:{line}", match["code"], comments.get("not run", ""), pairs))
    return found


def commands(code: str) -> list[list[str]]:
    """The commands of a block as words; continuation lines joined, comments dropped."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := _words(line))]


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # inside a here-document
        return []


@pytest.mark.parametrize("name", NAMES)
def test_every_bash_block_is_found(name):
    """A fence that the pattern above misses would silently not be tested."""
    text = (ROOT / name).read_text()
    assert len(blocks(name, text)) == len(re.findall(r"^\s*```(?:bash|sh|shell|console)\b", text, re.M))


@pytest.mark.parametrize("name", [*NAMES, *SHELL])
def test_flags_and_scripts_exist(name):
    """Also in blocks that do not run, and in runs/*.sh: every script is there and knows every flag that it is given."""
    text = (ROOT / name).read_text()
    for block in [Block(name, text, "", [])] if name in SHELL else blocks(name, text):
        block.small()
        for words in commands(block.code):
            for script in [w for w in words if re.fullmatch(r"(runs|dev)/\S+\.(sh|py)", w)]:
                assert (ROOT / script).exists(), f"{block.where}: {script} does not exist"
            for module in [w for w in words if re.fullmatch(r"scripts\.\w+", w)]:
                if module == "scripts.lm_eval":
                    continue  # its flags are the harness's
                typed = [w for w in words[words.index(module) + 1 :] if w.startswith("--") and w != "--"]
                flags = [w.split("=")[0] for w in typed if " " not in w]  # not a value that is flags
                unknown = [f for f in flags if f[2:].replace("-", "_") not in flags_of(module)]
                assert not unknown, f"{block.where}: {module} does not know {unknown}"


def flags_of(module: str) -> set[str]:
    """The flags of a script: the fields of the config that it parses, switches also with no_ in front."""
    path = ROOT / (module.replace(".", "/") + ".py")
    assert path.exists(), f"{path} does not exist"
    calls = [
        n
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "parse"
    ]
    fields = [f for call in calls for f in dataclasses.fields(configs()[call.args[0].id])]
    return {f.name for f in fields} | {f"no_{f.name}" for f in fields if f.type is bool} | {"help"}


@pytest.mark.parametrize("name", NAMES)
def test_links_and_named_tests_exist(name):
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert ((ROOT / name).parent / target).exists(), f"{name}: the link to {target} leads nowhere"
    for path, function in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert (ROOT / path).exists(), f"{name}: {path} does not exist"
        if function:
            names = {n.name for n in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(n, ast.FunctionDef)}
            assert function in names, f"{name}: {path} has no {function}"


def test_the_dial_is_what_the_plan_says():
    from nanolab.model.accounting import n_params
    from nanolab.stages.config import BaseTrainConfig
    from nanolab.training.schedule import make_plan

    rows = re.findall(r"^\| (\d+) \|(.*)\|$", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) >= 5
    for depth, rest in rows:
        plan = make_plan(BaseTrainConfig(depth=int(depth)), 32768, 1)
        m = plan.model
        facts = [str(m.n_embd), str(m.n_head), f"{n_params(m)['total'] / 1e6:,.0f} M", f"{plan.tokens / 1e9:.2f} G"]
        facts += [f"{plan.total_batch_size:,}", f"{plan.num_iterations:,}", f"{plan.flops:.1e}"]
        assert [cell.strip() for cell in rest.split("|")] == facts


def test_reading_order_is_current():
    """Every file of the reading order exists and has about the lines that dev/READING.md says."""
    done = subprocess.run([sys.executable, "dev/reading_order.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(2400)  # all commands of a page
@pytest.mark.parametrize("name", [name for name in NAMES if name != VARIANT])
def test_bash_blocks_run(name, in_checkout, corpora):
    share(corpora, in_checkout.base)
    run_blocks(name, in_checkout)


@pytest.mark.slow
@pytest.mark.fault("V7")
def test_the_guides_variant_keeps_every_contract(in_checkout):
    """Its blocks as they stand run the contracts on what uses the new entry (-k centred); the models that do not are
    those of before, as test_covering.py says, here with the entry in its table and its rows written down."""
    run_blocks(VARIANT, in_checkout)
    done = in_checkout(
        "python dev/variants.py && python dev/variants.py --check"
        " && python -m pytest -m 'not gpu' tests/contracts/test_covering.py"
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    path = Path("tests") / "contracts" / "rows.txt"
    before, after = ((root / path).read_text().splitlines() for root in (ROOT, in_checkout.path))
    assert (
        after[: len(before)] == before
        and all("mlp:centred" in row for row in after[len(before) :])
        and len(after) > len(before)
    )
    done = in_checkout("python -m pytest -m 'not gpu' tests/contracts/test_pairs.py --collect-only -q -k centred")
    assert f"test_pairs.py: {len(after) - len(before)}\n" in done.stdout, done.stdout


def share(corpora, base):
    """The corpus pydocs is built by whatever command comes to it first, and test_pydocs.py looks at it."""
    if not (base / "corpora").exists():
        base.mkdir(exist_ok=True)
        (base / "corpora").symlink_to(corpora)


def run_blocks(name, in_checkout):
    for block in blocks(name, (ROOT / name).read_text()):
        if block.reason:
            continue
        done = in_checkout(block.small())
        assert done.returncode == 0, (
            f"{block.where} failed\n{block.small()}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
        if block.code.strip() == "bash runs/quickstart.sh":
            check_quickstart(done, in_checkout)


def check_quickstart(first, in_checkout):
    """What it has made and shown, and that it makes nothing again."""
    runs = [in_checkout.base / "runs" / f"quickstart-toy{suffix}" for suffix in ("", "-sft", "-rl")]
    report = (in_checkout.path / "report.md").read_text()
    assert report == (runs[-1] / "report.md").read_text()
    assert report in first.stdout

    # The card's numbers are those of the runs' records.
    text, chat = (
        [json.loads((run / file).read_text()) for run in runs] for file in ("eval_base.json", "eval_chat.json")
    )
    row = re.search(r"^\| bits per byte .*", report, re.M)[0]
    assert [float(x) for x in re.findall(r"\| (\d\.\d{4})", row)] == [round(one["val"]["bpb"], 4) for one in text]
    for name in ("gzip -9", "bz2 -9", "xz -9e"):
        assert f"| {name} | {text[-1]['compressors'][name]:.4f} |" in report
    assert all(set(one["tasks"]) == set(chat[0]["tasks"]) and len(one["tasks"]) == 9 for one in chat)
    assert len(re.findall(r"^```bash$", report, re.M)) == 3

    # The replies that chat_cli writes after each of the three stages.
    def replies(shown):
        return re.findall(
            r"^> (This function returns|What is 37 \+ 58\?|Who are you\?)\n(.+?)\n(?=\n==)", shown, re.M | re.S
        )

    assert [question for question, _ in replies(first.stdout)] == [
        "This function returns",
        "What is 37 + 58?",
        "Who are you?",
    ]

    weights = sorted((in_checkout.base / "runs").rglob("model.safetensors"))
    before = [path.stat().st_mtime_ns for path in weights]
    second = in_checkout("bash runs/quickstart.sh")
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    assert "there already" in second.stdout and "finished already" in second.stdout
    assert [path.stat().st_mtime_ns for path in weights] == before
    assert replies(second.stdout) == replies(first.stdout)  # the same seed, the same words


def test_the_page_and_the_glossary_are_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
    assert len(re.findall(r"^\| (?!word |---)", (ROOT / "dev" / "GLOSSARY.md").read_text(), re.M)) <= 40


@pytest.mark.fault("core D5")
def test_equal_to_the_bit_is_said_of_cpus_only():
    """Of what is computed: training, and logits. GPT-2's weights are copied, on any device."""
    lines = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "dev/PROMISES.md")).splitlines()
    words = re.compile(r"to the (last )?bit|bit[- ](for bit|identical)", re.I)
    said = [line for line in lines if words.search(line) and "import and export" not in line]
    assert len(said) >= 4 and not [line for line in said if "CPUs" not in line]


def test_blocks_are_read_as_written():
    text = (
        "a\n<!-- toy: --depth 4 => --depth 2; x=>y -->\n```bash\nx --depth 4\n```\n\n<!-- not run: no GPU"
        " -->\n```bash\nnvidia-smi\n```\n"
    )
    first, second = blocks("f.md", text)
    assert (first.small(), first.reason, first.where) == ("y --depth 2\n", "", "f.md:4")
    assert (second.code, second.reason) == ("nvidia-smi\n", "no GPU")
    with pytest.raises(AssertionError, match="does not contain"):
        blocks("f.md", text.replace("x --depth 4", "x"))[0].small()

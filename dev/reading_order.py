"""Write or check the table of dev/READING.md: python dev/reading_order.py [--check]

Line counts are rounded to tens. The check allows a quarter more or less, so that not every change has to touch it.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
START, END = "<!-- reading order: written by dev/reading_order.py -->", "<!-- end of reading order -->"
ORDER = """
nanolab/cli.py nanolab/presets.py nanolab/runtime.py nanolab/model/config.py
nanolab/data/tokenizer.py nanolab/data/corpus.py nanolab/data/tokenizer_training.py nanolab/data/packing.py
nanolab/data/turn.py nanolab/data/chat.py nanolab/data/chat_files.py
nanolab/data/conversations.py
nanolab/model/gpt.py nanolab/model/context.py nanolab/model/cpu.py
nanolab/model/kernels/spec.py nanolab/model/kernels/reference.py nanolab/model/kernels/banded.py
nanolab/model/kernels/choice.py
nanolab/model/variants/tables.py nanolab/model/variants/positions.py nanolab/model/variants/mlp.py
nanolab/model/variants/parts.py nanolab/model/variants/latent.py nanolab/model/accounting.py
nanolab/training/schedule.py nanolab/training/recipes.py nanolab/training/optim.py nanolab/training/fit.py
nanolab/records/checkpoint.py nanolab/records/run.py
nanolab/training/policy.py
nanolab/inference/sampling.py nanolab/inference/tools.py nanolab/inference/cache.py
nanolab/inference/request.py nanolab/inference/prefill.py
nanolab/inference/prefix.py nanolab/inference/engine.py nanolab/inference/prepare.py
nanolab/inference/recorded.py nanolab/inference/sandbox.py
nanolab/inference/dialogue.py nanolab/inference/commands.py
nanolab/evals/bpb.py nanolab/evals/score.py nanolab/evals/chat.py nanolab/evals/card.py
nanolab/evals/likelihood.py nanolab/evals/icl.py nanolab/evals/bundle.py nanolab/evals/core.py
nanolab/evals/contamination.py
nanolab/interop/gpt2.py nanolab/interop/one_file.py nanolab/interop/export.py
nanolab/serving/worker.py nanolab/serving/schemas.py nanolab/serving/reply.py nanolab/serving/stream.py
nanolab/serving/api.py nanolab/serving/server.py
nanolab/stages/session.py nanolab/stages/pretrain.py nanolab/stages/base_run.py nanolab/stages/sft_plan.py
nanolab/stages/sft.py nanolab/stages/rollout.py nanolab/stages/rl.py
scripts/base_train.py scripts/chat_cli.py scripts/chat_web.py
""".split()


def lines(path: str) -> int:
    return len((ROOT / path).read_text().splitlines())


def tens(n: int) -> int:
    return max(10, round(n / 10) * 10)


def summary(path: str) -> str:
    """The first sentence of the module's docstring."""
    first = (ast.get_docstring(ast.parse((ROOT / path).read_text())) or "").split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=[\w)])\.(?:\s|$)", first)[0].strip().replace("|", "\\|")


def table() -> str:
    rows = [f"| [{path}](../{path}) | {tens(lines(path))} | {summary(path)} |" for path in ORDER]
    total = sum(
        lines(str(p.relative_to(ROOT)))
        for folder in ("nanolab", "scripts", "tasks")
        for p in (ROOT / folder).rglob("*.py")
    )
    body = "\n".join(["| file | lines | what it is |", "|---|---|---|", *rows])
    return f"{START}\n{body}\n\nAll of `nanolab/`, `scripts/` and `tasks/` together: {tens(total)} lines.\n{END}"


def check(text: str) -> list[str]:
    """What is wrong with the table in `text`, one line each."""
    rows = re.findall(r"^\| \[(\S+)\]\(\S+\) \| (\d+) \|", text, re.M)
    wrong = [f"{path} is listed but does not exist" for path, _ in rows if not (ROOT / path).exists()]
    wrong += [f"{path} is not listed" for path in ORDER if path not in dict(rows)]
    wrong += [
        f"{path} has {lines(path)} lines, dev/READING.md says {said}"
        for path, said in rows
        if (ROOT / path).exists() and abs(lines(path) - int(said)) > max(20, 0.25 * int(said))
    ]
    return wrong


def main() -> int:
    page = ROOT / "dev" / "READING.md"
    text = page.read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    if not rest or not after:
        print(f"dev/READING.md lacks the line {START!r} or {END!r}; put both where the table belongs", file=sys.stderr)
        return 1
    if "--check" in sys.argv[1:]:
        wrong = check(text)
        print("\n".join([*wrong, "type: python dev/reading_order.py"] if wrong else ["the reading order is current"]))
        return bool(wrong)
    page.write_text(before + table() + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())

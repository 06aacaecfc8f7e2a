"""HumanEval: write a Python function from its head and docstring; hidden tests are run on it.
https://arxiv.org/abs/2107.03374
"""

import ast
import re
from typing import Any, NamedTuple

from nanolab.data.chat import text_of
from tasks.common import Content, Dataset, Example, Published, RowReader

SOURCES = {
    "humaneval": Dataset(
        {"test": "humaneval/HumanEval.jsonl"},
        "openai/openai_humaneval",
        "",
        "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        {"test": "test"},
    )
}
FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.S | re.M)  # a block that was cut off counts


class Problem(NamedTuple):
    prompt: str  # imports, helpers, head and docstring of the function
    name: str  # of the function
    checks: str  # code that raises where the function is wrong


class HumanEval(Published):
    sources = SOURCES
    kind = "generate"
    splits = ("test",)
    runs_code = True

    def read(self, row: RowReader) -> Example:
        prompt, name = row.get("prompt", str), row.get("entry_point", str)
        solution, test = row.get("canonical_solution", str), row.get("test", str)
        helpers = prompt[
            : prompt.rindex(f"def {name}(")
        ]  # the checks use the prompt's own: a reply may have replaced them
        problem = Problem(prompt, name, f"{helpers}\n\n{test}\n\ncheck({name})\n")
        question = f"Complete this Python function. Reply with the whole function.\n\n```python\n{prompt.strip()}\n```"
        reply = f"```python\n{(prompt + solution).strip()}\n```"
        return Example([{"role": "user", "content": question}, {"role": "assistant", "content": reply}], problem)

    def correct(self, example: Example, content: Content) -> bool:
        """Runs the reply in the sandbox: passed only with proof that every check was reached and held."""
        from nanolab.inference.sandbox import check_program

        return check_program(program_of(example.answer, content), example.answer.checks).passed

    def rewards(self, example: Example, content: Content) -> dict[str, float]:
        """correct; format: the code of the reply parses and defines the function."""
        tree = syntax_tree(code_of(content))
        return {
            "correct": float(self.correct(example, content)),
            "format": float(tree is not None and defines(tree, example.answer.name)),
        }


def code_of(content: Content) -> str:
    """The first fenced block of the reply, or all of its text."""
    text = text_of(content)
    block = FENCE.search(text)
    return block[1] if block else text


def program_of(problem: Problem, content: Content) -> str:
    """The program to check: the prompt, so that its imports and helpers are there, and the reply's function in place of
    its stub.

    A reply that does not define the function is taken for the rest of the prompt's.
    """
    code = code_of(content)
    tree = syntax_tree(code)
    if tree is not None and defines(tree, problem.name):
        return f"{problem.prompt}\n    pass\n\n\n{code}\n"
    return problem.prompt + code + "\n"


def syntax_tree(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (
        SyntaxError,
        ValueError,
        RecursionError,
        MemoryError,
    ):  # ValueError: a null byte; the others: nested too deep
        return None


def defines(tree: ast.Module, name: str) -> bool:
    """Whether `name` is bound by a statement of the module itself."""

    def binds(node: Any) -> bool:
        targets = node.targets if isinstance(node, ast.Assign) else []
        return getattr(node, "name", "") == name or any(isinstance(t, ast.Name) and t.id == name for t in targets)

    return any(binds(node) for node in tree.body)

"""Tools that a model calls inside its reply: the calculator, Python, and the protocol of special tokens around them.

A call is <|python_start|> code <|python_end|>; the answer is put into the reply as <|output_start|> result
<|output_end|>.
Imports no torch.
"""

import logging
from collections.abc import Callable, Sequence

from nanolab.cli import UserError, nearest
from nanolab.data.tokenizer import Tokenizer
from nanolab.data.turn import PARTS, Event
from nanolab.inference.calculator import calculator
from nanolab.inference.sandbox import run_python

log = logging.getLogger(__name__)

SHOWN = 1000  # characters of a program's output that the model gets to see


def python(code: str) -> str:
    """What a program prints, run in the sandbox, or "error: " and the last line of its complaint."""
    outcome = run_python(code)
    if outcome.status == "ok":
        return outcome.stdout.strip()[:SHOWN]
    if outcome.status == "error":
        complaint = outcome.stderr.strip().splitlines() or ["the program gave up"]
        return f"error: {complaint[-1]}"[:SHOWN]
    return f"error: stopped, {outcome.status} limit"


TOOLS: dict[str, Callable[[str], str]] = {"calculator": calculator, "python": python}


def find_tool(name: str) -> Callable[[str], str] | None:
    """The tool of that name; None for "". Raises UserError for one that is not there."""
    if name and name not in TOOLS:
        raise UserError(
            f"tool {name!r} is unknown; expected one of {', '.join(TOOLS)}, or"
            f" nothing{nearest(name, list(TOOLS), prefix='--tool ')}"
        )
    return TOOLS[name] if name else None


class ToolUse:
    """One row's tool: knows the end of a call, and answers it with the tokens to put in next."""

    def __init__(self, tokenizer: Tokenizer, tool: Callable[[str], str]):
        self.tokenizer, self.tool = tokenizer, tool
        self.end = tokenizer.special(PARTS["python"].end)

    def ends(self, token: int, events: Sequence[Event]) -> bool:
        """Whether this token, which the parser made these events of, ends a call: the first event is the call's. A call
        that another mark breaks off is none.
        """
        return token == self.end and bool(events)

    def answer(self, code: str) -> list[int]:
        """Run the tool. Whatever it raises is logged and its result, not the end of the engine."""
        try:
            return self._written(self.tokenizer.encode(self.tool(code)))
        except (Exception, SystemExit) as error:
            return self.failed(error)

    def failed(self, error: BaseException) -> list[int]:
        """The answer of a tool that failed."""
        log.warning("a tool failed: %s: %s", type(error).__name__, error, exc_info=error)
        return self._written(self.tokenizer.encode(f"error: {type(error).__name__}"))

    def _written(self, ids: list[int]) -> list[int]:
        start, end, _ = PARTS["python_output"]
        return [self.tokenizer.special(start), *ids, self.tokenizer.special(end)]

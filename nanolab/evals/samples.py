"""What a base model writes: fixed prompts continued greedily, and texts from nothing. For eyes, not for a score."""

from typing import NamedTuple

from nanolab.data.tokenizer import Tokenizer
from nanolab.inference.engine import Engine, Request
from nanolab.model.gpt import GPT
from nanolab.runtime import Runtime, Stop

# One thing a small model picks up early or late, each: grammar, copying, enumeration, facts, arithmetic.
PROMPTS = (
    "The largest planet in the solar system is",
    "Water freezes when the temperature",
    "Monday, Tuesday, Wednesday,",
    "She opened the door and saw",
    "The opposite of left is",
    "Two plus three equals",
    "Returns the number of",
)
SEPARATOR = " ..."  # between a prompt and its continuation in print


class Continuation(NamedTuple):
    prompt: str
    text: str  # the continuation, without what ended it


def continue_prompts(
    model: GPT, tokenizer: Tokenizer, runtime: Runtime, max_tokens: int = 16, stop: Stop = lambda: False
) -> list[Continuation]:
    """Greedy continuations of PROMPTS, those that leave the model's sequence length room for a token; cut where `stop`
    says so.
    """
    ids = {prompt: [tokenizer.bos, *tokenizer.encode(prompt)] for prompt in PROMPTS}
    fitting = [prompt for prompt in PROMPTS if len(ids[prompt]) < model.config.sequence_len]
    replies = Engine(model, tokenizer, runtime).complete(
        [ids[p] for p in fitting], Request(max_tokens=max_tokens, temperature=0.0), stop=stop
    )
    return [Continuation(prompt, tokenizer.decode(reply)) for prompt, reply in zip(fitting, replies)]


def unconditioned(
    model: GPT, tokenizer: Tokenizer, runtime: Runtime, rows: int = 4, max_tokens: int = 128, seed: int = 42
) -> list[str]:
    """Texts that begin after nothing but <|bos|>, at temperature 1: draws from what the model takes for its corpus."""
    engine = Engine(model, tokenizer, runtime)
    return [
        tokenizer.decode(reply)
        for reply in engine.complete([[tokenizer.bos]] * rows, Request(max_tokens=max_tokens, seed=seed))
    ]


def print_samples(model: GPT, tokenizer: Tokenizer, runtime: Runtime, stop: Stop = lambda: False) -> None:
    """Print the greedy continuations, one line each, from rank 0; for a look while training. Nothing where `stop` said
    so on the way.
    """
    if runtime.is_main:
        samples = continue_prompts(model, tokenizer, runtime, stop=stop)
        for sample in [] if stop() else samples:
            print(one_line(sample), flush=True)


def one_line(sample: Continuation) -> str:
    """`prompt ... continuation`; line ends and control characters, which a young model writes too, as escapes."""
    text = f"{sample.prompt}{SEPARATOR}{sample.text}"
    return "  " + "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

"""Talk to a model in the terminal: python -m scripts.chat_cli [--model NAME] [-p "one prompt"].

Replies go to stdout as they grow, everything else to stderr. A chat model answers and remembers the conversation, its calls
of a tool are shown as [12*34 = 408]; a base model continues the text that it is given. Ctrl-C stops a reply, Ctrl-D leaves.
"""

import contextlib
import os
import sys

from nanolab.config import ChatConfig, UserError, main, parse

# A terminal obeys control characters, and a young model writes any byte: all but tab and line end are shown as U+FFFD.
CONTROL = {i: 0xFFFD for i in (*range(32), 127, *range(128, 160)) if chr(i) not in "\t\n"}
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
BASE = "this is a base model: it continues your text instead of answering it. Ctrl-C stops a reply, Ctrl-D leaves."
CHAT = "the model remembers the conversation as far as it can read. Ctrl-C stops a reply, Ctrl-D leaves."


def run(cfg: ChatConfig) -> int:
    from nanolab import runtime
    from nanolab.inference.engine import Engine
    from nanolab.inference.sampling import check_settings
    from nanolab.inference.tools import find_tool
    from nanolab.training.run import load_model

    check_settings(cfg.temperature, cfg.top_k, cfg.top_p)
    tool = find_tool(cfg.tool)
    if cfg.chat and cfg.raw:
        raise UserError("--chat and --raw at once; expected one of them, or neither: then it goes by how the model was trained")
    sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows ? instead of ending the talk
    sys.stdin.reconfigure(errors="replace")
    rt = runtime.start(cfg.device_type, seed=cfg.seed)
    with contextlib.redirect_stdout(sys.stderr):  # which model it is; stdout is for the reply
        model, tokenizer, meta = load_model(cfg.model, rt)
    engine = Engine(model, tokenizer, rt)
    answers = cfg.chat or not cfg.raw and meta.get("kind", "base") != "base"
    turns = Conversation(engine, cfg, tool) if answers else Continuation(engine, cfg)
    if cfg.prompt:
        turns.reply(cfg.prompt, cfg.seed)
    else:
        tell(CHAT if answers else BASE)
        talk(turns, cfg)
    return 0


def talk(turns, cfg: ChatConfig) -> None:
    """Read a line, reply to it, until the input ends. Each turn has a seed of its own."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    turn = 0
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            tell("")
            return
        if not text.strip():
            continue
        try:
            if turns.reply(text, cfg.seed + turn) == "length":
                tell(f"(cut: --max-tokens {cfg.max_tokens}, and the model reads {turns.engine.limit} in all)")
        except KeyboardInterrupt:
            tell("\n(stopped)")
        except UserError as error:  # a line that is too long for this model: the next may fit
            tell(f"error: {error}")
        turn += 1


class Continuation:
    """A base model: each text stands alone and is continued."""

    def __init__(self, engine, cfg: ChatConfig):
        self.engine, self.cfg = engine, cfg

    def reply(self, text: str, seed: int) -> str:
        """Stream the continuation of `text` to stdout, with a line end after it; returns how it ended."""
        return stream(generate(self.engine, self.cfg, prompt_ids(self.engine.tokenizer, text), seed), self.engine.tokenizer, {}, [])


class Conversation:
    """A chat model: it reads as many of the turns so far as fit it, the newest ones."""

    def __init__(self, engine, cfg: ChatConfig, tool):
        self.engine, self.cfg, self.tool = engine, cfg, tool
        self.messages: list[dict] = []

    def reply(self, text: str, seed: int) -> str:
        """Stream the answer to `text` to stdout, with a line end after it; returns how it ended.

        Both become part of the conversation, an answer that was stopped as far as it went. A text that does not fit leaves
        the conversation as it was.
        """
        from nanolab.data.chat import parse_reply

        prompt, kept = self.fitting([*self.messages, {"role": "user", "content": text}])
        steps = generate(self.engine, self.cfg, prompt, seed, self.tool)
        if left_out := len(self.messages) + 1 - len(kept):
            n = left_out // 2
            tell(f"(the oldest {'turn is' if n == 1 else f'{n} turns are'} forgotten: the model reads {self.engine.limit} tokens in all)")
            self.messages = kept[:-1]
        ids: list[int] = []
        try:
            return stream(steps, self.engine.tokenizer, call_marks(self.engine.tokenizer, self.tool), ids)
        finally:
            if ids:
                self.messages = [*kept, {"role": "assistant", "content": parse_reply(self.engine.tokenizer, ids)}]

    def fitting(self, messages: list[dict]) -> tuple[list[int], list[dict]]:
        """The prompt of the newest messages that leave room for a reply, and these messages; the last one is always there."""
        from nanolab.data.chat import render_prompt

        room = self.engine.limit - min(self.cfg.max_tokens, self.engine.limit // 2)
        while len(prompt := render_prompt(self.engine.tokenizer, messages)) > room and len(messages) > 1:
            messages = messages[2:]
        return prompt, messages


def generate(engine, cfg: ChatConfig, prompt: list[int], seed: int, tool=None):
    return engine.generate(
        [prompt], max_tokens=cfg.max_tokens, temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, seed=seed, tools=tool
    )


def stream(steps, tokenizer, marks: dict[int, str], ids: list[int]) -> str:
    """Show a reply as it grows, with a line end after it; returns how it ended. ids: gets its tokens."""
    from nanolab.inference.text import TextStream

    text = TextStream(tokenizer)
    try:
        for (new,) in steps:
            ids.append(new.token)
            if new.token in marks:
                show(text.flush())
                write(marks[new.token])
            show(text.push(new.token))
        if new.finish == "stop":  # a text that was cut short may end inside a character, which is cut with it
            show(text.flush())
    finally:
        if DIM in "".join(marks.values()):  # it may have ended inside a call
            write(PLAIN)
    write("\n")
    return new.finish


def call_marks(tokenizer, tool) -> dict[int, str]:
    """What is shown for the special tokens around a call and its output: [call = output], dimmed on a terminal."""
    dim, plain = (DIM, PLAIN) if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" else ("", "")
    shown = {"python_start": dim + "[", "python_end": "" if tool else "]" + plain, "output_start": " = ", "output_end": "]" + plain}
    return {tokenizer.special(f"<|{name}|>"): text for name, text in shown.items()}


def prompt_ids(tokenizer, text: str) -> list[int]:
    """What a base model reads: the text as the beginning of a document."""
    return [tokenizer.bos, *tokenizer.encode(text)]


def show(piece: str) -> None:
    """Write text of the model's."""
    write(piece.translate(CONTROL) if sys.stdout.isatty() else piece)


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(lambda: run(parse(ChatConfig)))

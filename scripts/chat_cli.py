"""Talk to a model in the terminal: python -m scripts.chat_cli [--model NAME] [-p "one prompt"].

Replies go to stdout as they grow, everything else to stderr. A base model continues the text that it is given; Ctrl-C
stops a reply, Ctrl-D leaves.
"""

import contextlib
import sys

from nanolab.config import ChatConfig, UserError, main, parse

# A terminal obeys control characters, and a young model writes any byte: all but tab and line end are shown as U+FFFD.
CONTROL = {i: 0xFFFD for i in (*range(32), 127, *range(128, 160)) if chr(i) not in "\t\n"}


def run(cfg: ChatConfig) -> int:
    from nanolab import runtime
    from nanolab.inference.engine import Engine
    from nanolab.inference.sampling import check_settings
    from nanolab.training.run import load_model

    check_settings(cfg.temperature, cfg.top_k, cfg.top_p)
    sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows ? instead of ending the talk
    sys.stdin.reconfigure(errors="replace")
    rt = runtime.start(cfg.device_type, seed=cfg.seed)
    with contextlib.redirect_stdout(sys.stderr):  # which model it is; stdout is for the reply
        model, tokenizer, _ = load_model(cfg.model, rt)
    engine = Engine(model, tokenizer, rt)
    if cfg.prompt:
        reply(engine, cfg, cfg.prompt, cfg.seed)
    else:
        talk(engine, cfg)
    return 0


def talk(engine, cfg: ChatConfig) -> None:
    """Read a line, continue it, until the input ends. Each turn stands alone and has a seed of its own."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    tell("this is a base model: it continues your text instead of answering it. Ctrl-C stops a reply, Ctrl-D leaves.")
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
            if reply(engine, cfg, text, cfg.seed + turn) == "length":
                tell(f"(cut: --max-tokens {cfg.max_tokens}, and the model reads {engine.limit} in all)")
        except KeyboardInterrupt:
            tell("\n(stopped)")
        except UserError as error:  # a line that is too long for this model: the next may fit
            tell(f"error: {error}")
        turn += 1


def reply(engine, cfg: ChatConfig, text: str, seed: int) -> str:
    """Stream the continuation of `text` to stdout, with a line end after it; returns how it ended."""
    from nanolab.inference.text import TextStream

    steps = engine.generate(
        [prompt_ids(engine.tokenizer, text)],
        max_tokens=cfg.max_tokens, temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, seed=seed,
    )  # fmt: skip
    stream = TextStream(engine.tokenizer)
    for (new,) in steps:
        show(stream.push(new.token))
    if new.finish == "stop":  # a text that was cut short may end inside a character, which is cut with it
        show(stream.flush())
    show("\n")
    return new.finish


def prompt_ids(tokenizer, text: str) -> list[int]:
    """What the model reads for one turn. This is the place for a chat model's template; a base model gets the text itself."""
    return [tokenizer.bos, *tokenizer.encode(text)]


def show(piece: str) -> None:
    sys.stdout.write(piece.translate(CONTROL) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(lambda: run(parse(ChatConfig)))

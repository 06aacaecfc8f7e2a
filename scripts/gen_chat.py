"""Have another model write conversations: python -m scripts.gen_chat --spec runs/gen_chat.toml --output chats.jsonl
--model NAME.

Any endpoint that speaks OpenAI's chat API will do (--url); its key is read from the environment. The same command
continues where an earlier one was stopped. Train on the file with the task jsonl=chats.jsonl."""

import os

from nanolab.cli import UserError, as_json, main, parse
from nanolab.data.config import GenChatConfig
from nanolab.terminal import harmless


def run(cfg: GenChatConfig) -> int:
    from nanolab.data.endpoint import Endpoint, exposed_to
    from nanolab.data.synthesis import Collection, generate, read_spec

    if not cfg.spec or not cfg.output:
        raise UserError(
            "--spec or --output is not given; expected a TOML file and a JSONL file; type --spec runs/gen_chat.toml"
            " --output chats.jsonl"
        )
    if cfg.num < 1 or cfg.workers < 1:
        raise UserError(
            f"--num {cfg.num} --workers {cfg.workers}; expected at least 1 of each; try --num 100 --workers 4"
        )
    spec = read_spec(cfg.spec)
    key = os.environ.get(cfg.api_key_env, "")
    endpoint = Endpoint(
        cfg.url,
        cfg.model,
        key,
        temperature=cfg.temperature,
        max_tokens=cfg.max_tokens,
        response_format=cfg.response_format,
        timeout=cfg.timeout,
    )
    collection = Collection(cfg.output, spec, cfg.seed)
    combinations = " x ".join(f"{len(entries)} {name}s" for name, entries in spec.axes.items())
    before = sum(i < cfg.num for i in collection.done)
    tell(
        f"{cfg.num} conversations of {cfg.model} at {endpoint.url}, {before} of them in {cfg.output} already;"
        f" {combinations}"
    )
    if key and (host := exposed_to(cfg.url)):
        tell(
            f"warning: the key goes to {host} over plain http, where everybody on the way can read it; type --url"
            " https://... if the endpoint has it"
        )
    if not key:
        tell(f"note: no key is sent: {cfg.api_key_env or '--api-key-env'} is not set")
    counts, tokens = {"kept": 0, "again": 0, "given up": 0}, 0
    try:
        for event in generate(spec, collection, endpoint, num=cfg.num, workers=cfg.workers, seed=cfg.seed):
            counts[event.kind] += 1
            tokens += event.tokens
            what = f"{event.messages} messages" if event.kind == "kept" else event.reason
            tell(
                f"conversation {event.index:05d} | {event.kind:<8} | {before + counts['kept']:5d}/{cfg.num} |"
                f" {tokens:9,} tokens | {what}"
            )
    finally:
        collection.close()
        found = before + counts["kept"]
        tell(
            f"{found} of {cfg.num} conversations are in"
            f" {cfg.output}{'; the same command continues' if found < cfg.num else ''}"
        )
    if cfg.json:
        print(
            as_json(
                {"output": cfg.output, "conversations": before + counts["kept"], "tokens": tokens, **counts},
                "the result",
            )
        )
    return 0


def tell(line: str) -> None:
    print(harmless(line), flush=True)  # some of it is the endpoint's


if __name__ == "__main__":
    main(lambda: run(parse(GenChatConfig)))

"""Have another model write conversations: python -m scripts.gen_chat --spec runs/gen_chat.toml --output chats.jsonl
--model NAME.

Any endpoint that speaks OpenAI's chat API will do (--url); its key is read from the environment. The same command
continues where an earlier one was stopped. Train on the file with the task jsonl=chats.jsonl."""

from nanolab.cli import as_json, main, parse
from nanolab.data.config import GenChatConfig


def run(cfg: GenChatConfig) -> int:
    from nanolab.data.synthesis import write_conversations

    document = write_conversations(cfg)
    if cfg.json:
        print(as_json(document, "the result"))
    return 0


if __name__ == "__main__":
    main(lambda: run(parse(GenChatConfig)))

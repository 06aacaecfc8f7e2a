"""Talk to a model in the terminal: python -m scripts.chat_cli [--model NAME] [-p "one prompt"].

Replies go to stdout as they grow, everything else to stderr. A chat model answers and remembers the conversation, its
calls of a tool are shown as [12*34 = 408]; a base model continues the text that it is given. /help lists the commands;
Ctrl-C stops a reply, Ctrl-D leaves."""

from nanolab.cli import main, parse
from nanolab.inference.config import ChatConfig
from scripts import GENERATING, spin


def run(cfg: ChatConfig) -> int:
    spin(GENERATING)
    from nanolab.inference.commands import converse

    converse(cfg)
    return 0


if __name__ == "__main__":
    main(lambda: run(parse(ChatConfig)))

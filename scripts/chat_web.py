"""Serve a model: python -m scripts.chat_web [--model NAME[,NAME...]] [--port 8000]. A chat page in the browser,
OpenAI's API under /v1.
"""

from nanolab.cli import main, parse
from nanolab.serving.config import ServeConfig
from scripts import GENERATING, spin


def run(cfg: ServeConfig) -> int:
    spin(GENERATING)
    from nanolab.serving.server import serve

    serve(cfg)
    return 0


if __name__ == "__main__":
    main(lambda: run(parse(ServeConfig)))

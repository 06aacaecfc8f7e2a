"""Tokens as the engine would give them, for replies of which a test knows every token."""

from collections.abc import Iterator, Sequence

import torch

from nanolab.data.tokenizer import Tokenizer
from nanolab.inference.request import Request, Row, TokenOutput
from nanolab.inference.sampling import Choice
from nanolab.serving.reply import ResponseBuilder


def outputs(tok: Tokenizer, answer: ResponseBuilder, ids: Sequence[int], finish: str | None) -> Iterator[TokenOutput]:
    """The row of the answer's first choice, which takes `ids` and ends with the last of them as `finish` says."""
    asked, echo = answer.asked, answer.echoes[0]
    request = Request(
        (tok.bos,),
        stop=tuple(asked.stop),
        stop_ids=(),
        parse="turn" if asked.chat else "text",
        begun=echo.unfinished if echo else b"",
    )
    row = Row(0, request, tok, tok.vocab_size, 10**9, torch.device("cpu"))
    for at, token in enumerate(ids):
        if at == len(ids) - 1 and finish == "stop":
            row.stop_ids = frozenset([token])
        elif at == len(ids) - 1 and finish == "length":
            row.end = len(row.tokens) + 1
        yield row.take(Choice(token, -1.0, ((token, -1.0),)))

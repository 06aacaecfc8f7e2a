"""The adapter for lm-evaluation-harness: nanolab's runs as its model "nanolab".

    bash runs/setup.sh lm_eval
    python -m scripts.lm_eval --model nanolab --model_args path=NAME --tasks hellaswag,lambada_openai --limit 100
    python -m scripts.lm_eval --model nanolab --model_args path=NAME-sft --tasks gsm8k --apply_chat_template

The harness knows models by name and looks for none outside itself, so that the name exists once this module is
imported: that is all scripts.lm_eval does before it hands the command line over. In Python: `import
nanolab.interop.lm_eval`, then `lm_eval.simple_evaluate("nanolab", "path=NAME", tasks=[...])`. --model_args, joined by
commas:

    path=NAME[@STEP|best]   a run, or the folder of one
    add_bos_token=False     begin texts with nothing, as the harness's own models do; otherwise they begin as in
                            training
    device=cpu              cuda, mps or cpu; wins over --device, whose default cuda:0 means the machine's device
    dtype=float32           default: as NANOLAB_DTYPE or the device says
    max_gen_toks=256        tokens of a reply where the task does not say
    max_rows=64             replies that are generated at once
    tool=calculator         calculator | python | none: what answers the calls in the replies of a conversation
                            (--apply_chat_template)
    allow_unsandboxed=True  with tool=python: run its code even where the sandbox lacks landlock or seccomp

--batch_size changes nothing: texts are packed by tokens. One process reads everything. A text longer than the model
reads loses its beginning; how many did is `cut_texts` in the results' config. `unscored_texts` are those without a
token to score, such as an empty choice: they count as the harness's own models count them, 0 nats and greedy.
--use_cache takes answers of the same weights and settings only.

A task's text never becomes a special token, whatever it spells. A conversation is text for the harness too; it says of
itself where its special tokens are (see `Nanolab.apply_chat_template`)."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from nanolab.cli import UserError, nearest
from nanolab.data.chat import render, template_of
from nanolab.data.turn import TurnParser
from nanolab.evals.checkpoints import weights_of
from nanolab.evals.icl import Text, common
from nanolab.evals.likelihood import GPTReader, score
from nanolab.inference.engine import Engine, Request
from nanolab.inference.prepare import prepare_for_inference
from nanolab.inference.sandbox import walls
from nanolab.inference.tools import TOOLS, find_tool
from nanolab.interop.lm_eval_arguments import checked, find_run, kind_of
from nanolab.model.accounting import n_params
from nanolab.records.models import load_model
from nanolab.runtime import start
from nanolab.terminal import progress

try:
    import lm_eval.models  # noqa: F401  it names its own models only in a registry that is still empty
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
except ImportError as error:
    raise UserError(
        f"lm-evaluation-harness cannot be imported ({error}); expected it for evaluations by its tasks; type: bash"
        " runs/setup.sh lm_eval"
    ) from None

# of a task's generation_kwargs
SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "seed"}
CONVERSATION = re.compile(r"\[conversation ((?:[0-9]+:[0-9]+,?)+) ([0-9a-f]{16})\]")
ANSWERED_BY = "nanolab: answered by"  # the entry of an answer cache that says by what


@register_model("nanolab")
class Nanolab(TemplateLM):
    """One model on one device. Its arguments are explained above."""

    def __init__(
        self,
        path: str,
        add_bos_token: bool = True,
        device: str = "",
        dtype: str = "",
        max_gen_toks: int = 256,
        max_rows: int = 64,
        tool: str = "calculator",
        allow_unsandboxed: bool = False,
    ):
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "lm_eval runs on several ranks; expected one process, which is what --model nanolab can use; start it"
                " without torchrun or accelerate",
                "several-ranks",
            )
        for name, value in (("max_gen_toks", max_gen_toks), ("max_rows", max_rows)):
            if value < 1:
                raise UserError(
                    f"--model_args has {name}={value}; expected at least 1; leave it out",
                    "model-args-value",
                    name=name,
                    value=value,
                )
        if tool not in (*TOOLS, "none"):
            hint = nearest(tool, [*TOOLS, "none"], prefix="tool=")
            raise UserError(
                f"--model_args has tool={tool}; expected one of {', '.join(TOOLS)}, none{hint}",
                "model-args-value",
                name="tool",
                value=tool,
            )
        found = find_run(path)
        try:
            said = walls(SimpleNamespace(allow_unsandboxed=allow_unsandboxed), tool == "python")
        except UserError as error:
            raise UserError(
                f"{error} (of --model_args: allow_unsandboxed=True, tool=python)", error.code, **error.values
            ) from None
        print(*said, sep="\n", end="\n" if said else "")
        try:
            self.runtime = start(kind_of(device, "device="), dtype)
        except UserError as error:
            if not dtype:
                raise
            raise UserError(
                f"--model_args has dtype={dtype}: {error}; of --model_args: dtype=float32",
                "model-args-value",
                name="dtype",
                value=dtype,
            ) from None
        model, self.tokenizer, _ = load_model(found, self.runtime)
        self.name, self.weights = f"{found.name}@{found.step}", weights_of(found.checkpoint)
        self.parameters = n_params(model.config)["total"]
        self.model = prepare_for_inference(model)
        self.add_bos_token, self.max_gen_toks, self.max_rows = add_bos_token, max_gen_toks, max_rows
        self.tool_name, self.tool = tool, find_tool("" if tool == "none" else tool)
        self.reader = GPTReader(self.model, self.runtime)
        self.max_length = model.config.sequence_len
        self.reader.limit = self.max_length + 1  # a text's last token is scored, not read
        self.cut_texts = self.unscored_texts = 0
        self._device = self.runtime.device

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "Nanolab":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict | None = None) -> "Nanolab":
        """Raises UserError for what is missing, unknown or of another type."""
        return cls(**checked(arg_dict, additional_config or {}))

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.bos

    @property
    def tokenizer_name(self) -> str:
        """Of the tokenizer and of how conversations are written: the harness keeps prompts under this name
        (--cache_requests).
        """
        return f"nanolab-2-{self.tokenizer.hash[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """What the results' config says beside the harness's own."""
        about = {
            "nanolab_model": self.name,
            "weights": self.weights,
            "model_num_parameters": self.parameters,
            "model_dtype": self.runtime.dtype_name,
        }
        return about | {"tool": self.tool_name, "cut_texts": self.cut_texts, "unscored_texts": self.unscored_texts}

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Called when the harness has opened an answer cache (--use_cache), which it reads by the request alone. Raises
        UserError for one of other weights.
        """
        if (answers := cache_hook.dbdict) is not None:
            by = {
                "weights": self.weights,
                "tokenizer": self.tokenizer.hash,
                "bos": self.add_bos_token,
                "dtype": self.runtime.dtype_name,
            }
            by |= {"max_gen_toks": self.max_gen_toks, "tool": self.tool_name}
            then = json.loads(answers[ANSWERED_BY]) if ANSWERED_BY in answers else None
            if then != by and len(answers):
                differ = [name for name in by if then is None or then.get(name) != by[name]]
                seen = (
                    "does not say by which weights"
                    if then is None
                    else "was answered with another " + ", ".join(differ)
                )
                raise UserError(
                    f"the answer cache {answers.filename} {seen}; expected answers of {self.name} with these settings;"
                    " type --use_cache with another path, or delete the file",
                    "answer-cache",
                    path=answers.filename,
                    differ=differ,
                )
            answers[ANSWERED_BY] = json.dumps(by)
        super().set_cache_hook(cache_hook)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return template_of(self.tokenizer) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, up to where the assistant goes on, behind a bracket that says where in it the special
        tokens are.

        The harness adds text to it and hands the whole to `tok_encode`. The bracket holds a hash, so that no other text
        is taken for one."""
        ids = render(self.tokenizer, chat_history).ids
        ids = [*ids, self.tokenizer.special("<|assistant_start|>")] if add_generation_prompt else ids[:-1]
        text, places, begun = "", [], 0
        for i, token in enumerate(ids):
            if token in self.tokenizer.specials.values():
                text += self.tokenizer.decode(ids[begun:i])
                places.append(f"{len(text)}:{token}")
                text, begun = text + self.tokenizer.decode([token]), i + 1
        where = ",".join(places)
        return f"[conversation {where} {self.digest(where, text)}]{text}{self.tokenizer.decode(ids[begun:])}"

    def digest(self, where: str, text: str) -> str:
        """Of a conversation up to its last special token."""
        return hashlib.sha256(f"{self.tokenizer.hash} {where} {text}".encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def conversation(self, string: str) -> list[int] | None:
        """The ids of a text that begins with what apply_chat_template gave; None for any other."""
        if not (head := CONVERSATION.match(string)):
            return None
        ids, at, text = [], 0, string[head.end() :]
        for place, token in (map(int, pair.split(":")) for pair in head[1].split(",") if pair):
            if token not in self.tokenizer.specials.values():
                return None
            ids += [*self.tokenizer.encode(text[at:place]), token]
            at = place + len(self.tokenizer.decode([token]))
        return ids + self.tokenizer.encode(text[at:]) if self.digest(head[1], text[:at]) == head[2] else None

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Special tokens are the ones that apply_chat_template put in and the beginning of a text; no other text gives
        any.
        """
        if (ids := self.conversation(string)) is not None:
            return ids
        begins = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return [self.tokenizer.bos] * begins + self.tokenizer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of continuations; what a tokenizer joins across the seam is scored with them, as in the own evaluations
        (evals/icl.py).
        """
        return self._loglikelihood_tokens(
            [(request.args, *self.split(*request.args)) for request in requests], disable_tqdm
        )

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens that are read, and those that are scored: from the first one that the continuation changes. Blanks at
        the seam belong to it.
        """
        bare = context.rstrip()
        alone, whole = self.tok_encode(bare), self.tok_encode(context + continuation)
        start = common([alone, whole])
        return (whole[:start], whole[start:]) if start else ([self.prefix_token_id], whole)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """requests: (texts or None, context, continuation), in tokens. The choices of one context share its reading."""
        groups: dict[tuple[int, ...], list[tuple[int, Text]]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            rows = self.rows([*context, *continuation], len(context))
            groups.setdefault(tuple(context), []).extend((i, row) for row in rows)
            self.cut_texts += len(context) + len(continuation) > self.reader.limit
            self.unscored_texts += not continuation
        nats, greedy = [0.0] * len(requests), [True] * len(requests)
        groups = {context: members for context, members in groups.items() if members}
        scores = score(
            self.reader,
            [[row for _, row in members] for members in groups.values()],
            label="" if disable_tqdm else "lm_eval",
        )
        for members, of_group in zip(groups.values(), scores):
            for (i, _), found in zip(members, of_group):
                nats[i], greedy[i] = nats[i] - found.nats, greedy[i] and found.greedy
        answers = list(zip(nats, greedy))
        for (asked, _, _), answer in zip(requests, answers):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return answers

    def rows(self, ids: list[int], start: int) -> list[Text]:
        """What scores each token from `start` on once: one text, or as many full ones as a continuation takes that is
        longer than the model reads.
        """
        rows, end = [], len(ids)
        while end > start:
            first = max(0, end - self.reader.limit)
            at = max(start, first + 1)
            rows.append(Text(ids[first:end], at - first))
            end = at
        return rows

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: each token once, behind the beginning or a full row of those before it."""
        windows = [
            [
                (None, *make_disjoint_window(pair))
                for pair in get_rolling_token_windows(
                    self.tokenizer.encode(r.args[0]), self.prefix_token_id, self.max_length, 1
                )
            ]
            for r in requests
        ]
        answers = iter(self._loglikelihood_tokens([window for text in windows for window in text], disable_tqdm))
        totals = [sum(next(answers)[0] for _ in text) for text in windows]
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Replies, greedy unless the task says otherwise, up to a stop string or the model's own end of text or
        turn.
        """
        asked = [self.request(*request.args, seed=i) for i, request in enumerate(requests)]
        replies = dict(progress(self.replies(asked), "" if disable_tqdm else "lm_eval", len(asked)))
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, replies[i])
        return [replies[i] for i in range(len(requests))]

    def replies(self, asked: list[Request]) -> Iterator[tuple[int, str]]:
        """(number, text) of every request, whichever is finished first. In a conversation the text of calls and their
        outputs is left out, as by the server.
        """
        engine = Engine(self.model, self.tokenizer, self.runtime, max_rows=self.max_rows)
        rows = {engine.add(replace(request, stop=(), parse="")): request for request in asked}
        parsers = {row: TurnParser(self.tokenizer, marks=request.parse == "turn") for row, request in rows.items()}
        texts = dict.fromkeys(rows, "")
        while not engine.idle:
            for row, token, _, finish, *_ in (new for new in engine.step() if new.row in parsers):
                # the harness shows a character that was cut, and finds stop strings in all the text: before a call and
                # after it
                events = (*parsers[row].push(token), *(parsers[row].end() if finish else ()))
                texts[row] += "".join(event.text for event in events if event.kind == "text")
                ends = [(at + len(stop), at) for stop in rows[row].stop if (at := texts[row].find(stop)) >= 0]
                if finish or ends:
                    engine.cancel(row)
                    del parsers[row]
                    yield row, texts[row][: min(ends)[1]] if ends else texts[row]
            engine.check()

    def request(self, context: str, wanted: dict[str, Any], seed: int) -> Request:
        """One of generate_until, for the engine. seed: added to the task's. Raises
        UserError for settings that nobody here knows.
        """
        if (
            unknown := wanted.keys()
            - SETTINGS
            - {"max_new_tokens", "max_tokens", "max_completion_tokens"}
            - ({"num_beams"} if wanted.get("num_beams") == 1 else set())
        ):
            name = min(unknown)
            expected = f"expected some of {', '.join(sorted(SETTINGS))}; leave it out of the task or --gen_kwargs"
            raise UserError(
                f"generation setting {name}={wanted[name]!r}; {expected}",
                "gen-kwargs-unknown",
                name=name,
                value=wanted[name],
            )
        settings = normalize_gen_kwargs(wanted, self.max_gen_toks)
        n, ids = settings["max_gen_toks"], self.conversation(context)
        if not 0 < n < self.max_length:
            expected = (
                f"expected at least 1 and room for a question; type --gen_kwargs max_gen_toks={self.max_length // 2}"
            )
            raise UserError(
                f"replies of {n} tokens from a model that reads {self.max_length}; {expected}",
                "gen-kwargs-length",
                tokens=n,
                limit=self.max_length,
            )
        prompt = ids or self.tok_encode(context) or [self.prefix_token_id]
        self.cut_texts += len(prompt) > self.max_length - n
        return Request(
            tuple(prompt[n - self.max_length :]),
            n,
            settings.get("temperature", float(settings["do_sample"])),
            settings.get("top_k", 0),
            settings.get("top_p", 1.0),
            settings.get("repetition_penalty", 1.0),
            settings.get("seed", 42) + seed,
            stop=tuple(filter(None, settings["until"])),
            tools=self.tool if ids else None,
            parse="turn" if ids else "text",
        )

"""The adapter for lm-evaluation-harness: nanolab's runs as its model "nanolab".

    bash runs/setup.sh lm_eval
    python -m scripts.lm_eval --model nanolab --model_args path=NAME --tasks hellaswag,lambada_openai --limit 100
    python -m scripts.lm_eval --model nanolab --model_args path=NAME-sft --tasks gsm8k --apply_chat_template

The harness knows models by name and looks for none outside itself, so that the name exists once this module is imported: that is all
scripts.lm_eval does before it hands the command line over. In Python: `import nanolab.interop.lm_eval`, then
`lm_eval.simple_evaluate("nanolab", "path=NAME", tasks=[...])`. --model_args, joined by commas:

    path=NAME[@STEP|best]   a run, or the folder of one
    add_bos_token=False     begin texts with nothing, as the harness's own models do; otherwise they begin as in training
    dtype=float32           default: as NANOLAB_DTYPE or the device says
    max_gen_toks=256        tokens of a reply where the task does not say
    max_rows=64             replies that are generated at once

--batch_size changes nothing: texts are packed by tokens. One process reads everything. A text longer than the model reads loses its
beginning; how many did is `cut_texts` in the results' config.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanolab.config import UserError, nearest
from nanolab.data.chat import render, template_of
from nanolab.data.tokenizer import SPECIAL_TOKENS
from nanolab.evals.likelihood import GPTReader, Text, score
from nanolab.inference.engine import Engine, Request
from nanolab.inference.served import served
from nanolab.inference.text import TextStream
from nanolab.model.accounting import n_params
from nanolab.runtime import progress, start
from nanolab.training import checkpoint
from nanolab.training.models import WEIGHTS_ONLY, ModelRef, find_model, load_model

try:
    import lm_eval.models  # noqa: F401  it names its own models only in a registry that is still empty
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
except ImportError as error:
    raise UserError(f"lm-evaluation-harness cannot be imported ({error}); expected it for evaluations by its tasks; type: bash runs/setup.sh lm_eval") from None

ARGUMENTS = {"path": str, "add_bos_token": bool, "dtype": str, "max_gen_toks": int, "max_rows": int, "device": str}
SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "seed"}  # of a task's generation_kwargs


@register_model("nanolab")
class Nanolab(TemplateLM):
    """One model on one device. Its arguments are explained above; `device` is cuda, mps or cpu, the harness's --device."""

    def __init__(self, path: str, add_bos_token: bool = True, dtype: str = "", max_gen_toks: int = 256, max_rows: int = 64, device: str = ""):
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("lm_eval runs on several ranks; expected one process, which is what --model nanolab can use; start it without torchrun or accelerate")
        found = find_run(path)
        self.runtime = start(device.removesuffix(":0"), dtype)
        model, self.tokenizer, _ = load_model(found, self.runtime)
        self.name, self.parameters = f"{found.name}@{found.step}", n_params(model.config)["total"]
        self.model, self.add_bos_token, self.max_gen_toks, self.max_rows = served(model), add_bos_token, max_gen_toks, max_rows
        self.reader = GPTReader(self.model, self.runtime)
        self.max_length = model.config.sequence_len
        self.reader.limit = self.max_length + 1  # a text's last token is scored, not read
        self.cut_texts = 0
        self.marks = re.compile("|".join(re.escape(name) for name in {*SPECIAL_TOKENS, self.beginning}))
        self._device = self.runtime.device

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "Nanolab":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict | None = None) -> "Nanolab":
        """From --model_args and the harness's flags, of which --device counts. Raises UserError for what is missing, unknown or of another type."""
        arguments = {name: str(value) if name == "path" else value for name, value in arg_dict.items()}  # a run may be called 12
        if device := (additional_config or {}).get("device"):
            arguments["device"] = device
        for name, value in arguments.items():
            if name not in ARGUMENTS:
                raise UserError(f"--model_args has {name!r}; expected some of {', '.join(ARGUMENTS)}{nearest(name, list(ARGUMENTS))}")
            if type(value) is not ARGUMENTS[name]:
                raise UserError(f"--model_args has {name}={value}; expected {ARGUMENTS[name].__name__}; see nanolab/interop/lm_eval.py")
        if "path" not in arguments:
            raise UserError("--model_args has no path; expected the name or the folder of a run; type --model_args path=NAME")
        return cls(**arguments)

    @property
    def beginning(self) -> str:
        """The token that a text begins with, by name."""
        return self.tokenizer.decode([self.tokenizer.bos])

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.bos

    @property
    def tokenizer_name(self) -> str:
        return f"nanolab-{self.tokenizer.hash[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """What the results' config says beside the harness's own."""
        return {"nanolab_model": self.name, "model_num_parameters": self.parameters, "model_dtype": self.runtime.dtype_name, "cut_texts": self.cut_texts}

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return template_of(self.tokenizer) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, special tokens by name, up to where the assistant goes on."""
        ids = render(self.tokenizer, chat_history).ids
        return self.tokenizer.decode([*ids, self.tokenizer.special("<|assistant_start|>")] if add_generation_prompt else ids[:-1])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Names of special tokens mean these only in a text that begins with one: it comes from the chat template."""
        if string.startswith(self.beginning):
            ids, at = [], 0
            for mark in self.marks.finditer(string):
                ids += [*self.tokenizer.encode(string[at : mark.start()]), self.tokenizer.special(mark[0])]
                at = mark.end()
            return ids + self.tokenizer.encode(string[at:])
        begins = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return [self.tokenizer.bos] * begins + self.tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """requests: (texts or None, context, continuation), in tokens. The choices of one context share its reading."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, _) in enumerate(requests):
            groups.setdefault(tuple(context), []).append(i)
        texts = [[Text([*context, *requests[i][2]], len(context)) for i in members] for context, members in groups.items()]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for members, scores in zip(groups.values(), score(self.reader, texts, label="" if disable_tqdm else "lm_eval")):
            for i, found in zip(members, scores):
                answers[i] = (-found.nats, found.greedy)
                self.cut_texts += found.cut > 0
        for (asked, _, _), answer in zip(requests, answers):
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: each token once, behind the beginning or a full row of those before it."""
        windows = [
            [(None, *make_disjoint_window(pair)) for pair in get_rolling_token_windows(self.tok_encode(r.args[0], False), self.prefix_token_id, self.max_length, 1)]
            for r in requests
        ]
        answers = iter(self._loglikelihood_tokens([window for text in windows for window in text], disable_tqdm))
        totals = [sum(next(answers)[0] for _ in text) for text in windows]
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Replies, greedy unless the task says otherwise, up to a stop string or the model's own end of text or turn."""
        asked = [self.request(*request.args, seed=i) for i, request in enumerate(requests)]
        replies = dict(progress(self.replies(asked), "" if disable_tqdm else "lm_eval", len(asked)))
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, replies[i])
        return [replies[i] for i in range(len(requests))]

    def replies(self, asked: list[Request]) -> Iterator[tuple[int, str]]:
        """(number, text) of every request, whichever is finished first."""
        engine = Engine(self.model, self.tokenizer, self.runtime, max_rows=self.max_rows)
        streams = {engine.add(request): TextStream(self.tokenizer, request.stop) for request in asked}
        pieces: dict[int, str] = dict.fromkeys(streams, "")
        while not engine.idle:
            for new in engine.step():
                pieces[new.row] += streams[new.row].push(new.token)
                if new.finish:
                    yield new.row, pieces[new.row] + streams[new.row].flush()

    def request(self, context: str, wanted: dict[str, Any], seed: int) -> Request:
        """One of generate_until, for the engine. seed: added to the task's. Raises UserError for settings that nobody here knows."""
        if unknown := wanted.keys() - SETTINGS - {"max_new_tokens", "max_tokens", "max_completion_tokens"} - ({"num_beams"} if wanted.get("num_beams") == 1 else set()):
            name = min(unknown)
            raise UserError(f"generation setting {name}={wanted[name]!r}; expected some of {', '.join(sorted(SETTINGS))}; leave it out of the task or --gen_kwargs")
        settings = normalize_gen_kwargs(wanted, self.max_gen_toks)
        n, prompt = settings["max_gen_toks"], self.tok_encode(context) or [self.prefix_token_id]
        if n >= self.max_length:
            raise UserError(f"replies of {n} tokens from a model that reads {self.max_length}; expected room for a question; type --gen_kwargs max_gen_toks={self.max_length // 2}")
        self.cut_texts += len(prompt) > self.max_length - n
        return Request(
            tuple(prompt[n - self.max_length :]), n, settings.get("temperature", float(settings["do_sample"])), settings.get("top_k", 0), settings.get("top_p", 1.0),
            settings.get("repetition_penalty", 1.0), settings.get("seed", 42) + seed, stop=tuple(settings["until"]),
        )  # fmt: skip


def find_run(path: str) -> ModelRef:
    """The checkpoint that NAME[@STEP|best] means, or the newest whole one in the folder of a run. Raises UserError where there is none."""
    folder = Path(path).expanduser()
    if not (folder / "checkpoints").is_dir():
        if len(folder.parts) > 1:
            raise UserError(f"{path} is no run: it has no folder checkpoints; expected the name or the folder of a run; type path=NAME or path=BASE/runs/NAME")
        return find_model(path)
    newest = checkpoint.newest_valid(folder / "checkpoints", WEIGHTS_ONLY)
    if newest is None:
        raise UserError(f"{folder} has no whole checkpoint; expected one in its folder checkpoints; train it again, or name another run")
    return ModelRef(folder.resolve().name, folder, newest, int(newest.name[5:]))

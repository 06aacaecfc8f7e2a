"""The likelihood tasks of base_eval by name: CORE, HellaSwag, LAMBADA. What they need is opened before a model is
loaded.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanolab.cli import UserError
from nanolab.evals.bundle import TaskSpec, fingerprint, open_bundle, read_items
from nanolab.evals.config import BaseEvalConfig
from nanolab.evals.core import Core
from nanolab.evals.hellaswag import hellaswag, hellaswag_table, lambada, lambada_table
from nanolab.evals.icl import Encoder
from nanolab.evals.likelihood import Scorer
from nanolab.evals.modes import MODES
from nanolab.evals.published import ensure_bundle
from nanolab.files import sha256_file
from nanolab.runtime import Runtime, print0
from tasks.hellaswag import HellaSwag

VERSION = 1  # of prompts, tokens and decisions: raised by a change that makes other results of the same model and data
Keep = Callable[[dict[str, Any]], None]


class Suite:
    """`suite(mode, reader, tokenizer, dtype)` is the result of one of `modes`, JSON-ready, the same on every rank; its
    table is printed.
    """

    def __init__(self, cfg: BaseEvalConfig, modes: list[str], runtime: Runtime):
        """Raises UserError where the bundle or the file that they need is not there."""
        if "hellaswag" in modes and cfg.hellaswag and not Path(cfg.hellaswag).is_file():
            raise UserError(
                f"--hellaswag {cfg.hellaswag} is not a file; expected jsonl with ctx, endings and label; name another,"
                " or leave it out for the bundle's"
            )
        self.cfg, self.runtime, self.modes = cfg, runtime, [mode for mode in modes if MODES[mode].questions]
        self._core: tuple[Any, Core] | None = None  # of the tokenizer that was last asked for
        if set(self.modes) - ({"hellaswag"} if cfg.hellaswag else set()):
            self.bundle = open_bundle(
                ensure_bundle(cfg.eval_bundle), ("core.yaml", "extra.yaml") if cfg.extra else ("core.yaml",)
            )

    def __call__(
        self, mode: str, reader: Scorer, tokenizer: Encoder, dtype: str, keep: Keep = lambda result: None
    ) -> dict[str, Any]:
        """dtype: that the model computes in. keep: gets unfinished results of CORE, after each task.

        Raises UserError, on every rank, where the mode's data or a text cannot be read; a task of CORE that fails is in
        its `failed`."""
        said = {"settings": self.settings(mode, dtype), "device": self.runtime.device_name}
        return getattr(self, mode)(reader, tokenizer, lambda result: keep(result | said)) | said

    def settings(self, mode: str, dtype: str) -> dict[str, Any]:
        """All that shapes a result, beside the model."""
        cfg, shared = self.cfg, {"version": VERSION, "max_per_task": self.cfg.max_per_task, "dtype": dtype}
        if mode == "core":
            return shared | {"bundle": fingerprint(self.bundle)}
        if mode == "lambada":
            return shared | {"data": sha256_file(self.task("lambada_openai").path)}
        path = Path(cfg.hellaswag) if cfg.hellaswag else self.task("hellaswag_zeroshot").path
        return shared | {"data": sha256_file(path), "original": bool(cfg.hellaswag), "bos": cfg.hellaswag_bos}

    def task(self, label: str) -> TaskSpec:
        if label not in self.bundle.tasks:
            why = self.bundle.broken.get(label, "no list names it")
            raise UserError(
                f"task {label} of {self.bundle.folder}: {why}; expected its data; name another --eval-bundle, or leave"
                " this mode out"
            )
        return self.bundle.tasks[label]

    def core(self, reader: Scorer, tokenizer: Encoder, keep: Keep) -> dict[str, Any]:
        key = getattr(tokenizer, "hash", tokenizer)  # the checkpoints of a run have equal tokenizers, each its own
        if self._core is None or self._core[0] != key:
            self._core = key, Core(self.bundle, tokenizer, self.runtime, self.cfg.max_per_task)
        return self._core[1].evaluate(reader, print0, lambda found: keep(found.to_json())).to_json()

    def hellaswag(self, reader: Scorer, tokenizer: Encoder, keep: Keep) -> dict[str, Any]:
        path, limit = self.cfg.hellaswag, self.cfg.max_per_task
        items = HellaSwag.questions(Path(path), limit) if path else read_items(self.task("hellaswag_zeroshot"), limit)
        found = hellaswag(reader, tokenizer, items, self.runtime, bos=self.cfg.hellaswag_bos)
        print0(*hellaswag_table(found), sep="\n")
        return found

    def lambada(self, reader: Scorer, tokenizer: Encoder, keep: Keep) -> dict[str, Any]:
        found = lambada(reader, tokenizer, self.task("lambada_openai"), self.runtime, self.cfg.max_per_task)
        print0(*lambada_table(found), sep="\n")
        return found

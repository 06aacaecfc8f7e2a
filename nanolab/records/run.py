"""A run's directory, written: what was asked, on what machine, what was measured, what came out (models.py reads it).

  <base>/runs/<name>/
    config.json      every flag, resolved
    env.json         versions, hardware, commit, command line; "resumes" lists those of later starts
    metrics.jsonl    one object per logged step, flushed line by line
    tokenizer/       the run's own copy
  data/            names and sha256 of the files it was trained on, and the validation text that was drawn from them
    checkpoints/     see checkpoint.py
    result.json      written last: a run that has it is finished
A directory that holds a checkpoint, a metric or a result is never overwritten: the person resumes it, names another or
removes it. One process group at a time works in it (a lock on .lock).
"""

import errno
import fcntl
import json
import os
import re
import secrets
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import IO, Any, TypeVar

from nanolab.cli import UserError, as_json, current_names, not_read, to_json
from nanolab.data import kept
from nanolab.data.corpus import Data
from nanolab.data.tokenizer import Tokenizer
from nanolab.files import write_text
from nanolab.records import checkpoint
from nanolab.records.environment import environment
from nanolab.records.models import best_step, read_json, read_metrics, recorded, runs_dir
from nanolab.records.sink import MetricSink, open_sinks
from nanolab.runtime import Runtime, print0

T = TypeVar("T")

# Flags that a resumed run may change: they do not shape its result. Paths may move, because fingerprints are compared.
MAY_CHANGE = set(
    "run resume dry_run plan_for device_type data_dir val_data tokenizer eval_every eval_tokens stages sample_every "
    "save_every keep log_every log_grad_norm wandb device_batch_size threads core_metric_every "
    "core_metric_max_per_task eval_bundle allow_unsandboxed activation_checkpointing attn_kernel eval_text "
    "chatcore_every chatcore_tasks chatcore_max_cat chatcore_max_sample eval_split eval_examples eval_samples "
    "rollout_batch_size eval_first probes probe_tokens profile trackio".split()
)
HOLD_PATHS = {"data", "tasks", "task"}  # flags whose paths may change, and nothing else
# Facts of the machine that a resumed run keeps, and the way to type them.
MUST_KEEP = {
    "device": "--device-type {}",
    "dtype": "NANOLAB_DTYPE={}",
    "threads": "--threads {}",
    "kind": "another --run than this {} run",
}
# Flags and facts of the machine that change rounding only: a resumed run that finds others says so and goes on.
NOTED = ("world_size", "device_batch_size", "attn_kernel", "deterministic", "commit", "torch", "device_name")


class Run:
    """One run on every rank; only rank 0 touches files. Make it with `Run.start`."""

    def __init__(self, name: str, cfg: Any, runtime: Runtime, kind: str):
        self.name, self.runtime, self.kind = name, runtime, kind
        self.flags, self.config = type(cfg), to_json(cfg)
        self.dir = runs_dir() / name
        self.checkpoints = self.dir / "checkpoints"
        self.env: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}  # tokenizer_hash, data_fingerprint, ...: kept in every checkpoint
        self.resume_from: Path | None = None  # the checkpoint that `fit` continues from
        self._sinks: list[MetricSink] = []
        self._metrics: FileIO | None = None
        self._lock: IO[str] | None = None

    @classmethod
    def start(
        cls,
        name: str,
        cfg: Any,
        runtime: Runtime,
        resume: bool = False,
        kind: str = "base",
        env: dict[str, Any] | None = None,
    ) -> "Run":
        """Open the directory for writing. Called by every rank.

        cfg: the dataclass of all flags. env: facts beyond `environment` (attn_kernel). resume: continue from the newest
        valid checkpoint; without one the run begins at the beginning and says so. Raises UserError when the directory
        is in use, holds another run, or was made with flags that would give another result.
        """
        check_name(name.replace(",", "") if resume else name)  # a run of an earlier version may have a comma
        run = cls(name, cfg, runtime, kind)
        facts = {**environment(runtime), "kind": kind, **(env or {})}
        run.env, run.resume_from = run._on_main(lambda: run._open(resume, facts))
        return run

    @property
    def finished(self) -> bool:
        return (self.dir / "result.json").exists()

    def pin_tokenizer(self, load: Callable[[], Tokenizer]) -> Tokenizer:
        """The run's own tokenizer: its copy when resuming, otherwise `load()`, copied. Called by every rank.

        Where another was typed it is said that it is not read.
        """
        folder, typed = self.dir / "tokenizer", self.config.get("tokenizer")
        if self.resume_from is None:
            self._on_main(lambda: str(load().save(folder)))
        elif typed and (
            not (there := Path(typed).expanduser().exists())
            or Tokenizer.load(typed, checked=True).hash != Tokenizer.load(folder, checked=True).hash
        ):
            print0(
                f"note: --tokenizer {typed} {'is another one now' if there else 'is not there'}: the run goes on with"
                f" its own copy, {folder}"
            )
        tokenizer = Tokenizer.load(folder, checked=True)
        self.identify(tokenizer_hash=tokenizer.hash)
        return tokenizer

    def pinned(self) -> kept.Pinned:
        """The validation text that a resumed run began with."""
        return (
            kept.Pinned.of(self.dir, checkpoint.load_meta(self.resume_from).get("val_fingerprint", ""))
            if self.resume_from
            else kept.Pinned()
        )

    def keep_data(self, data: Data) -> None:
        """Record the data by fingerprint, and its files and validation text in the directory. A resumed run must find
        the same. Called by every rank.
        """
        folder = self.dir / "data"
        if self.resume_from and (folder / "files.json").exists():
            kept.check_same(data, folder)
        self.identify(data_fingerprint=data.fingerprint, val_fingerprint=data.val_fingerprint)
        self._on_main(lambda: kept.keep(data, folder))

    def identify(self, **facts: Any) -> None:
        """Record what the run stands on (data_fingerprint, val_fingerprint, ...). A resumed run must find the same."""
        self.facts |= facts
        then = checkpoint.load_meta(self.resume_from) if self.resume_from else {}
        for key, value in facts.items():
            if without_paths(then.get(key, value)) != without_paths(value):
                raise UserError(
                    f"run {self.name} was trained with {key} {then[key]} and finds {value} now: the files behind it"
                    " have changed. Put the old ones back, or start another run with --run NAME",
                    "fingerprint-differs",
                    fact=key,
                    then=then[key],
                    now=value,
                )

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, flushed, and send the same to wandb. Values that are not finite become
        null.
        """
        if self._metrics is None:
            return
        finite = {k: None if isinstance(v, float) and v - v != 0 else v for k, v in metrics.items()}
        line = (json.dumps({"step": step, **finite}, allow_nan=False) + "\n").encode()
        try:
            if self._metrics.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(
                f"{self.dir / 'metrics.jsonl'} could not be written: {error.strerror}; make room there, then type the"
                " same command with --resume"
            ) from error
        for sink in self._sinks:
            sink.log(step, finite)

    def sync(self) -> None:
        """Flush metrics.jsonl to the disk, so that a checkpoint never outlives the lines before it."""
        if self._metrics:
            os.fsync(self._metrics.fileno())

    def drop_from(self, step: int) -> None:
        """Rewrite metrics.jsonl without the lines of `step` and later: a run resumed at `step` makes them again."""
        lines = [row for row in read_metrics(self.dir) if row["step"] < step]
        write_text(self.dir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in lines))

    def best_step(self) -> int | None:
        """The saved step with the lowest val/bpb so far, or None."""
        return best_step(self.dir)

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json in one step and close. Called by every rank."""
        path = self.dir / "result.json"
        self._on_main(lambda: write_text(path, as_json(result, path.name, indent=1) + "\n"))
        self.close(result)

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """Close the files, wandb and the lock."""
        for sink in self._sinks:
            sink.finish(summary or {})
        for file in (self._metrics, self._lock):
            if file:
                file.close()
        self._sinks, self._metrics, self._lock = [], None, None

    def _on_main(self, work: Callable[[], T]) -> T:
        """`work()` on rank 0; its result, or its error, on every rank."""
        return checkpoint.agreed(self.runtime, work, self.runtime.is_main)[0]

    def _open(self, resume: bool, env: dict[str, Any]) -> tuple[dict[str, Any], Path | None]:
        """Rank 0: lock, check, and write the records. Returns (env, checkpoint to resume from)."""
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.dir / ".lock", "a+")
        except OSError as error:
            raise UserError(
                f"run directory {self.dir} cannot be written: {error.strerror}; try another NANOLAB_BASE_DIR"
            ) from None
        self._take_lock()
        saved = bool(checkpoint.steps(self.checkpoints)) or self.finished
        if not resume and (saved or read_metrics(self.dir)):
            raise UserError(
                f"run {self.name!r} exists already in {self.dir}. Type --resume to continue it, --run NAME for a new"
                f" one, or remove it first: rm -r {self.dir}"
            )
        before = recorded(self.name) if saved else {}
        if saved:
            self._compare(current_names(self.flags, read_json(self.dir / "config.json")), before, env)
        if self.finished:
            return before, None
        source = checkpoint.newest_valid(self.checkpoints) if resume else None
        if resume and source is None:
            print0(f"nothing to resume in {self.dir}: starting from the beginning")
        if source:
            env = {**before, "resumes": [*before.get("resumes", []), env]}
            self.drop_from(checkpoint.load_meta(source)["step"])
        else:
            env = {**env, "wandb_id": secrets.token_hex(4), "resumes": []}
            self.drop_from(-1)
        write_text(self.dir / "env.json", json.dumps(env, indent=1) + "\n")
        write_text(self.dir / "config.json", json.dumps(self.config, indent=1) + "\n")
        made = read_metrics(self.dir)
        self._sinks = open_sinks(self.name, env["wandb_id"], self.dir, self.config, made, source is not None)
        self._metrics = open(self.dir / "metrics.jsonl", "ab", buffering=0)
        return env, source

    def _take_lock(self) -> None:
        assert self._lock is not None
        try:  # a record lock: it ends with this process, however it dies, and children do not inherit it
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            owner = self._lock.read().strip()
            raise UserError(
                f"run {self.name!r} is being worked on by another process ({owner}) in {self.dir}; wait for it, stop"
                " it, or type --run NAME"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"pid {os.getpid()} on {os.uname().nodename}")
        self._lock.flush()

    def _not_read(self, config: dict[str, Any]) -> set[str]:
        """The flags that nothing reads in such a run."""
        values = to_json(self.flags()) | config
        # whose model was pretrained by a recipe
        saved = checkpoint.newest_valid(self.checkpoints) if self.kind != "base" else None
        recipe = checkpoint.load_meta(saved).get("plan", {}).get("recipe") if saved else None
        conditions = getattr(self.flags, "BY_RECIPE", ())
        rates = not_read(self.flags, values | {"recipe": recipe}, conditions) if recipe and conditions else {}
        return {*not_read(self.flags, values), *rates}

    def _compare(self, old: dict[str, Any], old_env: dict[str, Any], env: dict[str, Any]) -> None:
        """Refuse, by name and with both values, what would give another result; mention what changes rounding only."""
        may_change = MAY_CHANGE | ({"data"} if self.kind in ("sft", "rl") else set())  # there it is a folder
        # a run that began without has promised nothing
        may_change |= set() if old.get("deterministic") else {"deterministic"}
        flags = {k: (old[k], self.config[k]) for k in old if k in self.config and k not in may_change}
        flags = {
            k: (a, b)
            for k, (a, b) in flags.items()
            if (without_paths(a) != without_paths(b) if k in HOLD_PATHS else a != b)
        }
        # an older version took flags that nothing read
        ignored = self._not_read(old) & self._not_read(self.config) if flags else set()
        wrong = [f"--{k.replace('_', '-')} was {a!r}, now {b!r}" for k, (a, b) in flags.items() if k not in ignored]
        for key, flag in MUST_KEEP.items():
            if (
                key in env
                and old_env.get(key, env[key]) != env[key]
                and not (key == "threads" and env["device"] != "cpu")
            ):
                wrong.append(f"{key} was {old_env[key]}, now {env[key]} (type {flag.format(old_env[key])})")
        if wrong:
            raise UserError(
                f"run {self.name!r} cannot go on with what would change its result: {'; '.join(wrong)}. Type the values"
                " it was started with, or start a new run with --run NAME"
            )
        then, now = {**old, **old_env}, {**self.config, **env}  # of the kernel, that which was chosen
        for key in NOTED:
            if key in now and then.get(key, now[key]) != now[key]:
                print0(
                    f"note: {key} was {then[key]}, now {now[key]}: the same batches, but losses may differ in the last"
                    " digits"
                )


def without_paths(value: Any) -> Any:
    """A flag or fact without the paths in it: of "jsonl=/a/b.jsonl@9:2,gsm8k" and "/a/texts:0.3,pydocs:0.7". What lies
    there is compared by fingerprint.
    """
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, dict):
        return {k: without_paths(v) if k == "tasks" else v for k, v in value.items()}
    if not isinstance(value, str):
        return value
    after = r"((?:@\d+)?(?::[\d.eE+-]+)?)$"  # a count and a weight
    parts = [re.sub(rf"=.*?{after}", r"=\1", part.strip()) for part in value.split(",")]
    return ",".join(re.sub(rf"^[^=:]*?[/.][^=]*?{after}", r"PATH\1", part) for part in parts)


def check_name(name: str) -> None:
    """Raise UserError unless `name` can be a folder and the NAME of NAME@STEP."""
    if not name or name.startswith(".") or set(name) & set("/\\@:,") or name != name.strip():
        raise UserError(
            f"run name {name!r} cannot be a folder name here; expected letters, digits, - _ . without / \\ @ : ,; try"
            " --run my-run",
            "run-name",
            name=name,
        )

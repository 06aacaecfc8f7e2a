"""Checkpoints on disk: one that can be seen is whole, and a damaged one is never loaded.

A checkpoint is a folder step_000123/ with
  model.safetensors          weights
  optim_rank0.safetensors    one per rank: that rank's optimizer shards and random-number state
  meta.json                  step, configs, data position, loop state, versions: enough to go on, or to say what it was
  manifest.json              format version, and size and sha256 of every other file; written last
It is written in a hidden sibling folder, every file and the folder are flushed to disk, and then it is renamed. A kill
at any moment leaves a hidden folder, which the next save removes. Training saves through a `Writer`: the step waits for
a copy of the state in the host's memory alone, a thread does the rest. A folder of checkpoints has one writer at a time
(the run directory's lock sees to that) and is shared by all ranks."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from nanolab.cli import UserError
from nanolab.files import sha256_file, sync
from nanolab.runtime import Runtime, print0

T = TypeVar("T")
FORMAT = 1
RNG = "__rng__/"  # keys of a rank's file that hold generator states, not optimizer shards


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, half-written or of another format."""


def save(
    root: Path,
    step: int,
    *,
    weights: dict[str, torch.Tensor],
    optimizer: dict[str, torch.Tensor] | None,
    meta: dict[str, Any],
    runtime: Runtime,
) -> Path:
    """Write step_<step>/ under `root` and return it. Called by every rank; `weights` and `meta` are taken from rank 0.

    optimizer: this rank's shards (None: weights only). Raises UserError on every rank if a file cannot be written; what
    was saved before is untouched and nothing half-written stays.
    """
    return _save(
        root, step, weights, None if optimizer is None else {**optimizer, **_rng_state(runtime)}, meta, runtime
    )


class Writer:
    """Saves one checkpoint at a time in a thread, beside the next steps. Every rank has one and calls each method when
    the others do.
    """

    def __init__(self, runtime: Runtime):
        # messages of the threads have a group of their own: those of the step may not come between
        self._runtime = replace(runtime, group=dist.new_group(backend="gloo")) if runtime.world_size > 1 else runtime
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._future: Future[Path] | None = None

    def save(
        self,
        root: Path,
        step: int,
        *,
        weights: dict[str, torch.Tensor],
        optimizer: dict[str, torch.Tensor],
        meta: dict[str, Any],
    ) -> None:
        """Copy the state to the host's memory, and return; `save` above, of the copy, is under way then. The one before
        it must have been waited for.
        """
        mine = weights if self._runtime.is_main else {}
        copies = [{k: t.detach().to("cpu", copy=True) for k, t in tensors.items()} for tensors in (mine, optimizer)]
        shards = copies[1] | _rng_state(self._runtime)
        self._future = self._thread.submit(_save, root, step, copies[0], shards, meta, self._runtime)

    @property
    def busy(self) -> bool:
        """Whether a save has not been waited for."""
        return self._future is not None

    def done(self) -> bool:
        """Whether it is over on all ranks, well or not."""
        return not self._runtime.any(not self._future.done())

    def wait(self) -> None:
        """Until it is over. Raises its UserError, on every rank."""
        future, self._future = self._future, None
        if future is not None:
            future.result()

    def close(self) -> None:
        """Wait for what is under way, when something else has gone wrong; say so if it fails, too."""
        self._thread.shutdown()
        if self._future is not None and (error := self._future.exception()):
            print0(f"note: {error}")


def _save(
    root: Path,
    step: int,
    weights: dict[str, torch.Tensor],
    shards: dict[str, torch.Tensor] | None,
    meta: dict[str, Any],
    runtime: Runtime,
) -> Path:
    final = root / f"step_{step:06d}"
    temp = root / f".tmp-{final.name}"
    tensors = [*(weights.values() if runtime.is_main else ()), *(shards or {}).values()]
    need = sum(runtime.gather_objects(sum(t.nbytes for t in tensors)))

    def open_folder() -> None:
        remove_stale(root)
        temp.mkdir(parents=True)

    def write_files() -> dict[str, dict[str, Any]]:
        files = {}
        if runtime.is_main:
            files["model.safetensors"] = _write(temp / "model.safetensors", weights)
            files["meta.json"] = _write(temp / "meta.json", {**meta, "step": step, "format": FORMAT})
        if shards is not None:
            name = f"optim_rank{runtime.rank}.safetensors"
            files[name] = _write(temp / name, shards)
        return files

    def publish() -> None:
        _write(
            temp / "manifest.json",
            {"format": FORMAT, "step": step, "files": {k: v for part in parts for k, v in part.items()}},
        )
        sync(temp)
        if final.exists():  # a damaged one of the same step, or the same step once more
            final.rename(root / f".tmp-replaced-{final.name}")
        temp.rename(final)
        sync(root)

    try:
        agreed(runtime, open_folder, runtime.is_main)
        parts = agreed(runtime, write_files)
        agreed(runtime, publish, runtime.is_main)
    except OSError as error:
        free = shutil.disk_usage(root).free if root.exists() else 0
        if runtime.is_main:
            shutil.rmtree(temp, ignore_errors=True)
        raise UserError(
            f"the checkpoint of step {step} could not be written to {root}: {error}. It needs {need / 1e6:.1f} MB; the"
            f" disk has {free / 1e6:.1f} MB free. Checkpoints saved before are untouched. Make room (or raise the file"
            " size limit), then type the same command with --resume; --keep 1 keeps fewer checkpoints",
            "checkpoint-not-written",
            step=step,
            need=need,
            free=free,
        ) from error
    if runtime.is_main:
        remove_stale(root)
    return final


def steps(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every visible checkpoint, oldest first, whole or not."""
    found = [(int(p.name[5:]), p) for p in root.glob("step_*") if p.name[5:].isdigit()] if root.exists() else []
    return sorted(found)


def verify(path: Path, only: Iterable[str] | None = None, deep: bool = True) -> None:
    """Raise CheckpointError, naming what is wrong, unless every file (or those in `only`) is what the manifest says.

    deep: compare sha256; otherwise only the presence and size of the files.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        records = {name: (r["bytes"], r["sha256"]) for name, r in manifest["files"].items()}
        found = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {path} is half-written or damaged: no readable manifest.json ({error})"
        ) from None
    if found != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {found}; this nanolab reads format {FORMAT}")
    for name in {"model.safetensors", "meta.json", *records} if only is None else only:
        size, digest = records.get(name, (-1, ""))
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"checkpoint {path} is damaged: {name} has {file.stat().st_size} bytes, expected {size}"
            )
        if deep and sha256_file(file) != digest:
            raise CheckpointError(
                f"checkpoint {path} is damaged: the content of {name} is not what was saved (sha256 differs)"
            )


def newest_valid(root: Path, only: Iterable[str] | None = None) -> Path | None:
    """The newest checkpoint that verifies, or None. Every newer one that does not is named on the way."""
    for _, path in reversed(steps(root)):
        try:
            verify(path, only)
            return path
        except CheckpointError as error:
            print(f"skipped: {error}", flush=True)
    return None


def load_meta(path: Path) -> dict[str, Any]:
    return json.loads((path / "meta.json").read_text())


def load_weights(path: Path, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """Weights by parameter name. The caller has verified `path`."""
    return load_file(path / "model.safetensors", device=str(device))


def load_optimizer(path: Path) -> Mapping[str, torch.Tensor]:
    """The optimizer shards of every rank that saved, read when asked for."""
    return Shards(sorted(path.glob("optim_rank*.safetensors")))


def restore_rng(path: Path, runtime: Runtime) -> None:
    """Put torch's generators where this rank had them at the save. A rank that did not exist then keeps its seed."""
    file = path / f"optim_rank{runtime.rank}.safetensors"
    if not file.exists():
        return
    with safe_open(file, "pt") as f:
        torch.set_rng_state(f.get_tensor(RNG + "cpu"))
        if RNG + "cuda" in f.keys() and runtime.device.type == "cuda":
            torch.cuda.set_rng_state(f.get_tensor(RNG + "cuda"), runtime.device)


class Shards(Mapping[str, torch.Tensor]):
    """Tensors of several safetensors files under one roof; each is read from disk on access."""

    def __init__(self, files: Iterable[Path]):
        handles = [safe_open(f, "pt") for f in files]
        self._handles = {key: h for h in handles for key in h.keys() if not key.startswith(RNG)}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._handles[key].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)


def retain(root: Path, keep: int | str, best: int | None = None) -> None:
    """Remove checkpoints, except the newest `keep` ("all": every one), step `best`, and damaged ones, which stay to be
    seen.
    """
    if keep == "all":
        return
    whole = []
    for step, path in steps(root):
        try:
            verify(path, deep=False)
            whole.append((step, path))
        except CheckpointError:
            continue
    for step, path in whole[: -int(keep)]:
        if step != best:
            path.rename(root / f".tmp-removed-{path.name}")  # hidden at once: never seen half-removed
    remove_stale(root)


def remove_stale(root: Path) -> None:
    """Remove hidden folders that a killed process left."""
    for path in root.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def agreed(runtime: Runtime, work: Callable[[], T], mine: bool = True) -> list[T | None]:
    """`work()` on the ranks where `mine`. Every rank gets all results (None of the others), or raises the first
    UserError or OSError of one of them. A collective call.
    """
    result, error = None, None
    try:
        result = work() if mine else None
    except UserError as e:
        error = e
    except (OSError, SafetensorError) as e:
        said = e.strerror or str(e) if isinstance(e, OSError) else f"{type(e).__name__}: {e}"
        error = OSError(said + (f" (rank {runtime.rank})" if runtime.world_size > 1 else ""))
    both = runtime.gather_objects((result, error))
    for _, error in both:
        if error:
            raise error
    return [result for result, _ in both]


def _write(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write one file (tensors or JSON by its suffix), flush it to disk and return its manifest record."""
    if path.suffix == ".json":
        path.write_text(json.dumps(content, indent=1))
    else:
        path.touch()
        mode = path.stat().st_mode
        save_file({k: t.detach().cpu().contiguous() for k, t in content.items()}, path)
        path.chmod(mode)  # safetensors would keep the file to its owner
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _rng_state(runtime: Runtime) -> dict[str, torch.Tensor]:
    state = {RNG + "cpu": torch.get_rng_state()}
    if runtime.device.type == "cuda":
        state[RNG + "cuda"] = torch.cuda.get_rng_state(runtime.device)
    return state

"""Corpora on the Hugging Face hub: files at a pinned revision, downloaded in parallel, resumed, and checked by sha256.

The first use lists the repository once and writes the revision, sizes and hashes into manifest.json, so that a later
push to the repository changes nothing here. A file gets its name only when size and hash agree; what arrives before
that lies in .partial/ and is continued. The declared validation file comes first, and nothing ever stands in for it.
"""

import fnmatch
import http.client
import json
import os
import shutil
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from nanolab.cli import UserError
from nanolab.data.formats import index_file
from nanolab.files import locked, sha256_file, write_text
from nanolab.runtime import base_dir, print0
from nanolab.terminal import progress

DEFAULT_SHARDS = 8  # training files of a first use without --num-shards
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 5  # in a row that bring nothing new
BACK_OFF = 1.0  # seconds before the second attempt; doubles


@dataclass(frozen=True)
class HubCorpus:
    repo: str
    revision: str  # commit; empty: the newest at the first use, then pinned in the manifest
    train: str  # pattern of the training files
    val: str  # pattern of the one validation file; it is never trained on
    n_train: int  # files that `train` must match, `val` excluded; 0: any number


CORPORA = {
    # 250M characters per shard in row groups of 1,024; the last shard is the validation file by its author's convention
    "climbmix": HubCorpus(
        "karpathy/climbmix-400b-shuffle",
        "915333b4f8b8684f39aeaafea600fea6f43fb703",
        "shard_*.parquet",
        "shard_06542.parquet",
        6542,
    ),
    "fineweb-edu": HubCorpus("karpathy/fineweb-edu-100b-shuffle", "", "shard_*.parquet", "shard_01822.parquet", 1822),
    "openwebtext": HubCorpus(
        "Skylion007/openwebtext",
        "b4325f019c648b1641a1784748667e8b74e5e064",
        "plain_text/train-*.parquet",
        "plain_text/train-00079-of-00080.parquet",
        79,
    ),
    "tinystories": HubCorpus(
        "roneneldan/TinyStories",
        "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        "data/train-*.parquet",
        "data/validation-*.parquet",
        4,
    ),
}


def _pin(name: str, corpus: HubCorpus, folder: Path) -> dict:
    """The manifest of `corpus`, made from one listing. Raises UserError without a network or when files are not as
    declared.
    """
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        revision = api.dataset_info(corpus.repo, revision=corpus.revision or None, timeout=TIMEOUT).sha
        listing = list(api.list_repo_tree(corpus.repo, repo_type="dataset", revision=revision, recursive=True))
    except (OSError, HTTPError) as error:
        why = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{name} is not downloaded and {api.endpoint} cannot be asked for {corpus.repo} ({why}); expected a"
            " network; try --data pydocs, which needs none, or --data-dir with your own text"
        ) from error
    files = {f.path: {"size": f.size, "sha256": f.lfs.sha256} for f in listing if getattr(f, "lfs", None)}
    val = fnmatch.filter(files, corpus.val)
    train = sorted(set(fnmatch.filter(files, corpus.train)) - set(val))
    if len(val) != 1 or not train or corpus.n_train not in (0, len(train)):
        raise UserError(
            f"{corpus.repo} at {revision} has {len(train)} training files like {corpus.train} and {len(val)} validation"
            f" files like {corpus.val}; expected {corpus.n_train or 'some'} and 1; pin another revision in"
            " nanolab/data/hub.py"
        )
    print0(
        f"{name}: {corpus.repo} at revision {revision}"
        + ", the newest today, which this machine keeps to from now on" * (not corpus.revision)
    )
    manifest = {
        "repo": corpus.repo,
        "revision": revision,
        "val": val[0],
        "train": train,
        "files": {f: files[f] for f in train + val},
    }
    write_text(folder / "manifest.json", json.dumps(manifest))
    return manifest


def _transfer(url: str, partial: Path, size: int, stop: threading.Event, token: str | None) -> None:
    """Append to `partial` what it lacks of `size` bytes. Raises OSError or HTTPException when the connection fails."""
    have = partial.stat().st_size if partial.exists() else 0
    if have >= size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", "User-Agent": "nanolab"})
    if token:
        # not for the storage host behind a redirect
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response, open(partial, "ab") as file:
        if have and response.status != 206:  # the server sends everything again
            file.truncate(0)
        while not stop.is_set() and (chunk := response.read(1 << 20)):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def fetch(
    url: str, target: Path, size: int, sha256: str, partial: Path, stop: threading.Event, token: str | None = None
) -> None:
    """Download `url` to `target`, continuing `partial`. Raises OSError naming the reason after ATTEMPTS fruitless
    attempts.

    sha256: of all of it; empty where nobody knows it, and the caller checks the content. token: the hub's, for its host
    alone."""
    failures = 0
    partial.parent.mkdir(parents=True, exist_ok=True)
    while not stop.is_set():
        before = partial.stat().st_size if partial.exists() else 0
        try:
            _transfer(url, partial, size, stop, token)
            reason = "the connection closed early"
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code}"
            if error.code < 500 and error.code not in (408, 416, 429):
                raise OSError(reason) from error
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        have = partial.stat().st_size if partial.exists() else 0
        if have >= size:
            if have == size and sha256 in ("", sha256_file(partial)):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial, target)
                return
            partial.unlink()
            reason = "the bytes received do not have the expected sha256"
        failures = 0 if before < have < size else failures + 1
        if failures == ATTEMPTS:
            raise OSError(reason)
        stop.wait(BACK_OFF * 2 ** max(failures - 1, 0))
    raise OSError("stopped")


def _download(manifest: dict, folder: Path, names: list[str], workers: int) -> None:
    """Fetch files of the manifest in parallel. Raises UserError naming those that failed; the others are kept."""
    import huggingface_hub

    endpoint, token = os.environ.get("HF_ENDPOINT"), huggingface_hub.get_token()
    stop, failed = threading.Event(), {}
    pool = ThreadPoolExecutor(workers)

    def start(name: str):
        url = huggingface_hub.hf_hub_url(
            manifest["repo"], name, repo_type="dataset", revision=manifest["revision"], endpoint=endpoint
        )
        entry = manifest["files"][name]
        return pool.submit(
            fetch, url, folder / name, **entry, partial=folder / ".partial" / entry["sha256"], stop=stop, token=token
        )

    try:
        futures = {start(name): name for name in names}
        for future in progress(as_completed(futures), f"downloading {manifest['repo']}", total=len(names)):
            if error := future.exception():
                if not isinstance(error, OSError):
                    raise error
                failed[futures[future]] = error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    if failed:
        lines = "".join(f"\n  {name}: {failed[name]}" for name in sorted(failed))
        raise UserError(
            f"{len(failed)} of {len(names)} files of {manifest['repo']} could not be downloaded:{lines}\n"
            "expected all of them; type the same command again, which continues where this one stopped"
        )


def _complete(name: str, manifest: dict, folder: Path, wanted: list[str], workers: int) -> None:
    """Download those of the `wanted` files that are not there; the validation file first."""
    import huggingface_hub.constants

    missing = [f for f in wanted if not (folder / f).exists()]
    if not missing:  # another process was faster
        return
    size = sum(manifest["files"][f]["size"] for f in missing)
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        seen = f"{len(missing)} files of {name} are not downloaded and HF_HUB_OFFLINE is set"
        raise UserError(f"{seen}; expected a network; unset it, or use fewer with --num-shards")
    if size > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"{name} needs {size / 1e9:.1f} GB more and {free / 1e9:.1f} GB are free; try a smaller --num-shards"
        )
    print0(f"downloading {len(missing)} files ({size / 1e9:.2f} GB) of {manifest['repo']} to {folder}")
    for names in ([manifest["val"]], [f for f in missing if f != manifest["val"]]):  # validation first
        if set(names) & set(missing):
            _download(manifest, folder, names, workers)


def ensure_corpus(name: str, num_shards: int, workers: int) -> tuple[list[Path], list[Path]]:
    """Training and validation files of a hub corpus, downloading what is missing.

    num_shards: the first so many training files; -1: those that are there, at least the first DEFAULT_SHARDS. Raises
    UserError."""
    folder = base_dir() / "corpora" / name
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) if path.exists() else _pin(name, CORPORA[name], folder)
    present = [f for f in manifest["train"] if (folder / f).exists()]
    train = manifest["train"][: DEFAULT_SHARDS if num_shards == -1 else num_shards]
    if num_shards == -1:
        train = sorted({*train, *present})
    wanted = [manifest["val"], *train]
    if not all(
        (folder / f).exists() for f in wanted
    ):  # a command that has all it wants does not wait for a larger download
        with locked(folder):
            _complete(name, manifest, folder, wanted, workers)
    for f in wanted:
        if index_file(folder / f)[0] != manifest["files"][f]["sha256"]:
            expected = f"expected sha256 {manifest['files'][f]['sha256']}"
            raise UserError(
                f"{folder / f} is not the file that was downloaded; {expected}; delete it and type the same command"
                " again"
            )
    return [folder / f for f in train], [folder / manifest["val"]]

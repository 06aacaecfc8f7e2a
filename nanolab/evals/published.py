"""The published evaluation bundle: downloaded once, checked, unpacked into the base directory, and pinned there.

Its publisher names no checksum. So the first download's sha256, and those of its files, are kept in manifest.json
beside them: a bundle that changes later, here or there, is not taken for this one. Every file of the archive is read
against the checksum that it has there."""

import json
import os
import shutil
import stat
import threading
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from nanolab.cli import UserError
from nanolab.data.hub import TIMEOUT, fetch
from nanolab.files import locked, sha256_file
from nanolab.runtime import base_dir, print0

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
MOST_BYTES, MOST_FILES = 4 << 30, 10_000  # of the unpacked archive, many times what it holds
ELSE = "type --eval-bundle DIR with a copy of it"


def ensure_bundle(where: str = "") -> Path:
    """The folder of the bundle: `where`, or eval_bundle in the base directory, downloaded if it is not there. Raises
    UserError.
    """
    if where:
        if not (folder := Path(where).expanduser()).is_dir():
            raise UserError(
                f"--eval-bundle {where} is not a folder; expected core.yaml, eval_meta_data.csv and eval_data/ in it;"
                " name another, or leave it out to download them"
            )
        return folder
    folder = base_dir() / "eval_bundle"
    if not folder.exists():
        with locked(folder):  # ranks of one job take turns: the first does the work
            if not folder.exists():
                _download(folder)
    _check_pinned(folder)
    return folder


def _download(folder: Path) -> None:
    archive, partial, fresh = (folder.with_name(f".eval_bundle.{end}") for end in ("zip", "partial", "new"))
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        with urllib.request.urlopen(urllib.request.Request(URL, method="HEAD"), timeout=TIMEOUT) as response:
            size = int(response.headers["Content-Length"])
        print0(f"downloading the evaluation bundle ({size / 1e6:.1f} MB) from {URL}")
        fetch(URL, archive, size, "", partial, threading.Event())
    except (OSError, TypeError, ValueError) as error:
        why = str(error).strip() or type(error).__name__
        raise UserError(
            f"the evaluation bundle is not in {folder}, and {URL} cannot be downloaded ({why}); expected a network;"
            f" {ELSE}"
        ) from None
    sha256 = sha256_file(archive)
    try:
        root = unpack_bundle(archive, fresh)
    finally:
        archive.unlink()
    files = {path.relative_to(root).as_posix(): sha256_file(path) for path in sorted(root.rglob("*")) if path.is_file()}
    (root / "manifest.json").write_text(
        json.dumps({"url": URL, "bytes": size, "sha256": sha256, "files": files}, indent=1) + "\n"
    )
    os.replace(root, folder)
    shutil.rmtree(fresh, ignore_errors=True)
    print0(
        f"evaluation bundle: {folder}, {len(files)} files; pinned as sha256 {sha256} of the archive, for which its"
        " publisher names none"
    )


def unpack_bundle(archive: Path, folder: Path) -> Path:
    """Write the archive's files under `folder`; returns the folder of them that is the bundle. Raises UserError, and
    leaves nothing, where a file is damaged, is a link or would lie elsewhere."""
    try:
        with zipfile.ZipFile(archive) as content:
            # no more than what is declared is ever unpacked
            size, n = (sum(info.file_size for info in content.infolist()), len(content.infolist()))
            if size > MOST_BYTES or n > MOST_FILES:
                expected = f"expected at most {MOST_BYTES:,} in {MOST_FILES:,}"
                raise UserError(
                    f"the archive of {URL} would unpack to {size:,} bytes in {n:,} files; {expected}; {ELSE}",
                    "archive-too-large",
                    bytes=size,
                    files=n,
                )
            for info in content.infolist():
                path = PurePosixPath(info.filename)
                if (
                    path.is_absolute()
                    or ".." in path.parts
                    or "\\" in info.filename
                    or stat.S_ISLNK(info.external_attr >> 16)
                ):
                    raise UserError(
                        f"the archive of {URL} holds {info.filename!r}, which is a link or lies outside of it; expected"
                        f" plain files; {ELSE}"
                    )
                if not info.is_dir():
                    target = folder / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with (
                        content.open(info) as source,
                        open(target, "wb") as file,
                    ):  # raises BadZipFile where a checksum differs
                        shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"what {URL} sent is damaged ({error}); expected a whole zip archive; type the same command again, or"
            f" {ELSE}"
        ) from None
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    root = folder / "eval_bundle"
    return root if root.is_dir() else folder


def _check_pinned(folder: Path) -> None:
    """Raises UserError where a file is not the one that was downloaded."""
    manifest = folder / "manifest.json"
    for name, sha256 in json.loads(manifest.read_text())["files"].items() if manifest.exists() else ():
        path = folder / name
        if not path.exists() or sha256_file(path) != sha256:
            raise UserError(
                f"{path} is not the file that was downloaded; expected sha256 {sha256}; type rm -r {folder} to download"
                " it again"
            )

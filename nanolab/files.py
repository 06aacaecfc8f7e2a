"""Files: written whole or not at all, checked by sha256, locked; and seeds from a key. Imports no torch."""

import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nanolab.cli import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path`, for a file or a folder. When the block ends without an error, what was written there is
    flushed to disk and takes the place of `path` in one step: after a crash `path` holds the old or the new, never a
    part. A folder replaces only an empty one. OSErrors are the caller's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".tmp-{os.getpid()}-{threading.get_ident()}-{path.name}")  # the suffix stays
    try:
        yield fresh
        sync(fresh)
        fresh.replace(path)
    finally:
        if fresh.is_dir():
            shutil.rmtree(fresh, ignore_errors=True)
        else:
            fresh.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step (UTF-8). Raises UserError where that fails."""
    try:
        with replacing(path) as fresh:
            fresh.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path} could not be written: {error.strerror}; make room there, then type the same command again"
        ) from error


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256_file(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(buffer):
            digest.update(buffer[:n])
    return digest.hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the others wait here. The lock is the file `path`.lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def key_seed(*key: Any, bits: int = 62) -> int:
    """A number below 2^bits, bits <= 64, that depends on the key alone and looks random."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> (64 - bits)


def key_shuffler(*key: Any) -> np.random.RandomState:
    """A generator that depends on the key alone; its stream is frozen (NEP 19), unlike that of numpy's Generator."""
    return np.random.RandomState(np.frombuffer(hashlib.blake2b(repr(key).encode(), digest_size=16).digest(), "<u4"))

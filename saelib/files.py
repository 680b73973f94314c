"""Files that are either whole or absent: atomic writes, hashes, keys."""

import errno
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path


class DiskFull(OSError):
    """The disk filled up during a write. Nothing half-written is left under the final name."""


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key(spec: dict) -> str:
    """Sixteen hexadecimal digits that stand for a JSON-able `spec`; equal specs give equal keys."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def atomic(path: Path):
    """Yield a temporary path beside `path`; rename it to `path` on success and delete it on any failure.

    Raises `DiskFull` instead of the bare OSError when the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so that what a killed run left is overwritten
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise DiskFull(
                errno.ENOSPC,
                f"disk full while writing {path}: free some space and run the same command again; "
                "what was finished before is kept and is not computed twice",
            ) from error
        raise


@contextmanager
def atomic_folder(path: Path):
    """Yield a temporary folder beside `path`; put it in the place of `path` on success and delete it on any failure."""
    temporary, old = (path.with_name(f".{path.name}.{ending}") for ending in ("tmp", "old"))
    for left in (temporary, old):
        shutil.rmtree(left, ignore_errors=True)  # what a killed run left
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            os.replace(path, old)  # a full folder cannot be replaced in one step
        os.replace(temporary, path)
    finally:
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)


def write_json(path: Path, content: dict) -> None:
    """Write `content` atomically, readable, with a final newline."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict:
    """Read a JSON object."""
    return json.loads(path.read_text())

"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bridle.errors import MistakeError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a path to write to; on success it is flushed to disk and renamed to `path`, on any error removed.

    Raises:
        OSError: a full disk is said in one line that names the file.
    """
    aside = _aside(path)
    try:
        with clear_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            _flush(aside)
            aside.replace(path)
            _flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder: what is written into the one given appears at `path` at once, replacing what was there."""
    aside = _aside(path)
    old = aside.with_suffix(".old")
    try:
        with clear_disk_errors(path):
            aside.mkdir(parents=True)
            yield aside
            # As the umask has it: safetensors lets only the owner read.
            readers = stat.S_IMODE(aside.stat().st_mode) & 0o666
            for file in aside.rglob("*"):
                if file.is_file():
                    file.chmod(readers)
                    _flush(file)
            if path.exists():
                path.rename(old)
            aside.rename(path)
            _flush(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Turns "no space left", "read-only" and "permission denied" into a line that names the path and what to do."""
    advice = {
        errno.ENOSPC: "the disk is full; free some space or choose another folder, then start again: nothing is lost",
        errno.EDQUOT: "the disk quota is used up; free some space or choose another folder, then start again",
        errno.EFBIG: "the file grew over this process's size limit (ulimit -f); raise it, then start again",
        errno.EROFS: "the file system is read-only; choose another folder",
        errno.EACCES: "no permission to write there; choose another folder",
    }
    try:
        yield
    except OSError as error:
        if error.errno in advice:
            raise OSError(f"cannot write {path}: {advice[error.errno]}") from error
        raise
    except Exception as error:  # safetensors reports a full disk as its own kind of error, with the text inside
        if "No space left" in str(error) or "File too large" in str(error):
            raise OSError(f"cannot write {path}: {advice[errno.ENOSPC]}") from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    with whole_file(path) as aside:
        aside.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        ValueError: not valid JSON; names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MistakeError(f"{path}: not valid JSON ({error}); the file is damaged or not what it should be") from None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _aside(path: Path) -> Path:
    """A name of its own, also for several threads, and for several machines on one file system."""
    return path.with_name(f".{path.name[:80]}.{uuid.uuid4().hex}.partial")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

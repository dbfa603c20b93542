"""What a folder holds, with a hash of every file: a byte that changed since it was written is found on reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bridle.errors import MistakeError
from bridle.files import clear_disk_errors, read_json, sha256, write_json

NAME = "manifest.json"
FORMAT = 1


class CheckpointError(MistakeError):
    """A checkpoint that is damaged, of another version, or that does not fit the recipe's model."""


def write_manifest(folder: Path) -> None:
    """Writes a folder's ``manifest.json``: ``{"format": 1, "files": {NAME: {"bytes": int, "sha256": hex}}}``."""
    files = {path.name: _entry(path) for path in sorted(folder.iterdir()) if path.name != NAME}
    with clear_disk_errors(folder):
        write_json(folder / NAME, {"format": FORMAT, "files": files})


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The files that a folder must hold, by name.

    Raises:
        CheckpointError: no manifest, or a damaged one.
    """
    path = folder / NAME
    try:
        found = read_json(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except MistakeError as error:
        raise CheckpointError(str(error)) from None
    files = found.get("files") if isinstance(found, dict) and found.get("format") == FORMAT else None
    entries = files.values() if isinstance(files, dict) else [None]
    if not all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in entries):
        raise CheckpointError(f"{path}: not a manifest of format {FORMAT}; it is damaged, or of another bridle")
    assert isinstance(files, dict)
    return files


def check_folder(folder: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        CheckpointError: names the first file that is missing, superfluous or not the one that was written.
    """
    wanted = read_manifest(folder)
    there = {path.name for path in folder.iterdir()} - {NAME}
    for name in sorted(wanted.keys() | there):
        if name not in there:
            raise CheckpointError(f"{folder / name}: missing, though {NAME} lists it")
        if name not in wanted:
            raise CheckpointError(f"{folder / name}: not in {NAME}")
        try:
            found = _entry(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read ({error.strerror or error})") from None
        for key in ("bytes", "sha256"):
            if found[key] != wanted[name][key]:
                raise CheckpointError(
                    f"{folder / name}: damaged: {key} {found[key]}, but {NAME} says {wanted[name][key]}"
                )


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}

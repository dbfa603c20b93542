"""What a folder of shards was built from, kept beside them, so that no other source ever takes their place unasked."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bridle.data.errors import ShardError
from bridle.data.index import SUFFIX
from bridle.files import read_json, write_json

NAME = "source.json"
HELDOUT = "heldout"
"""Folder of the held-out shards, beside the others."""
OURS = re.compile(r"shard-\d{6}\.tar")


@dataclass(frozen=True)
class Origin:
    """kind, folder (absolute), split, table: of the data set. heldout: share held out; 0 for none. samples: in all."""

    kind: str = ""
    folder: str = ""
    split: str | None = None
    table: str | None = None
    heldout: float = 0.0
    samples: int = 0

    def __str__(self) -> str:
        parts = [f"{self.kind} {self.folder}"]
        parts += [f"--split {self.split}"] if self.split else []
        parts += [f"--table {self.table}"] if self.table else []
        parts += [f"--heldout {self.heldout:g}"] if self.heldout else []
        return " ".join(parts)


def refuse_another(destination: Path, origin: Origin, *, overwrite: bool) -> None:
    """Sees that the folder is not another source's; with `overwrite`, removes that one's shards.

    Raises:
        ShardError: it holds another source's shards, or more samples than the source has now.
    """
    old = _read(destination / NAME)
    fault = None if old is None else _fault(destination, old, origin)
    if fault and not overwrite:
        raise ShardError(f"{fault}; choose an empty folder, or replace them with --overwrite")
    if fault:
        remove_shards(destination)


def record(destination: Path, origin: Origin) -> None:
    """Writes down what the shards in the folder are built from."""
    write_json(destination / NAME, asdict(origin))


def _fault(destination: Path, old: Origin, new: Origin) -> str | None:
    if not any(destination.glob("*.tar")):
        return None
    if replace(old, samples=0) != replace(new, samples=0):
        return f"{destination}: holds shards of another source ({old}) than this one ({new})"
    if new.samples < old.samples:
        now = f"{new.folder} now holds only {new.samples}"
        return f"{destination}: was built of {old.samples} samples, but {now}: is a disk or a folder of it away?"
    return None


def refuse_unknown(destination: Path, why: str, *, overwrite: bool) -> None:
    """For shards without a record that are not what would be written in their place."""
    if not overwrite:
        raise ShardError(
            f"{destination}: holds shards of a source that is not known ({why}), and this build would replace them;"
            " choose an empty folder, or replace them with --overwrite"
        )
    remove_shards(destination)


def remove_shards(destination: Path, keep: Collection[Path] = ()) -> list[Path]:
    """Removes shards that a build has made, and their indexes; returns those that some other program made."""
    others = []
    for folder in (destination, destination / HELDOUT):
        for shard in sorted(set(folder.glob("*.tar")) - set(keep)):
            if OURS.fullmatch(shard.name):
                shard.with_name(f"{shard.name}{SUFFIX}").unlink(missing_ok=True)
                shard.unlink()
            else:
                others.append(shard)
    return others


def _read(path: Path) -> Origin | None:
    """None where there is no record."""
    try:
        return Origin(**read_json(path))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise ShardError(
            f"{path}: not what `bridle shards build` wrote there; delete it if you know the shards"
        ) from None

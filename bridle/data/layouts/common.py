"""What every layout needs: files, tables, splits, and the plan they fill."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bridle.data.errors import ShardError
from bridle.data.origin import Origin
from bridle.data.writer import Planned
from bridle.modalities.clip import EXTENSIONS
from bridle.settings import nearest

AUDIO, IMAGE, VIDEO = (frozenset(EXTENSIONS[modality]) for modality in ("audio", "image", "video"))
MEDIA = AUDIO | IMAGE | VIDEO
SPLITS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validate": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""What data sets call their splits, and what that means."""


@dataclass
class Plan:
    """samples to write; missing: named by the data set but not there, or empty; ignored: files it does not name;
    unread: how many of these have which extension, where no modality reads it.

    origin: what it is a plan of.
    """

    samples: list[Planned] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ignored: int = 0
    unread: Counter[str] = field(default_factory=Counter)
    origin: Origin = field(default_factory=Origin)

    def add(self, key: str, path: Path, about: dict[str, Any], group: str = "") -> None:
        """One more sample, or one more that is missing; the key's characters that no shard should hold become ``_``."""
        size = size_of(path)
        if size:
            clean = re.sub(r"[^A-Za-z0-9_/-]", "_", key)
            self.samples.append(Planned(clean, path, extension(path), size, about, group))
        else:
            self.missing.append(about["source"])

    def leave_out(self, path: Path) -> None:
        """One more file that does not belong."""
        self.ignored += 1
        if extension(path) not in MEDIA:
            self.unread[extension(path) or "no extension"] += 1

    def group_by_folder(self) -> None:
        """Files of one folder below their label's are a group, if the label has several such folders."""
        folders: dict[str, set[Path]] = {}
        for sample in self.samples:
            folders.setdefault(sample.meta.get("label", ""), set()).add(sample.source.parent)
        self.samples = [
            replace(sample, group=str(sample.source.parent))
            if "label" in sample.meta and len(folders[sample.meta["label"]]) > 1
            else sample
            for sample in self.samples
        ]


@dataclass(frozen=True)
class RawDataSet:
    """folder: of the data set. table: file that names its samples or their labels. split: the part to take."""

    folder: Path
    table: Path | None = None
    split: str | None = None


def files(root: Path, besides: Path | None = None) -> Iterator[Path]:
    """All files below a folder in a stable order; hidden ones and the table `besides` are left out."""
    table = besides.resolve() if besides is not None else None
    for at, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(at) / name
            if not name.startswith(".") and not (table and name == table.name and path.resolve() == table):
                yield path


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none to read, as behind a broken link."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def extension(path: Path) -> str:
    """Lower case, without a dot."""
    return path.suffix[1:].lower()


def rows(table: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and fields of each row of a CSV with a header.

    Raises:
        ShardError: it cannot be read, or a column or a field is missing.
    """
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            absent = set(columns) - set(reader.fieldnames or [])
            if absent:
                found = ", ".join(reader.fieldnames or ["nothing"])
                raise ShardError(f"{table}: column '{min(absent)}' is missing; found: {found}")
            for row in reader:
                if None in row.values():
                    raise ShardError(
                        f"{table}: line {reader.line_num} has too few fields; expected {', '.join(columns)}"
                    )
                yield reader.line_num, row
    except OSError as error:
        raise ShardError(f"{table}: {error.strerror}; is this the folder of the data set?") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ShardError(f"{table}: not a CSV in UTF-8: {error}") from None


def whole(text: str, table: Path, line: int, column: str) -> int:
    """A whole number of a table, also where it is written like ``41.0``.

    Raises:
        ShardError: it is none.
    """
    if not re.fullmatch(r"\s*-?\d+(\.0*)?\s*", text):
        raise ShardError(f"{table}: line {line}: {column} '{text}' is not a whole number")
    return int(float(text))


def split_folder(source: RawDataSet) -> Path | None:
    """The folder of the split that was asked for, or the data set's own where it has no splits; none if there is none.

    Raises:
        ShardError: several splits and none chosen, or an unknown one.
    """
    if source.split is not None and source.split not in SPLITS:
        raise ShardError(f"split '{source.split}' is unknown{nearest(source.split, SPLITS)}")
    below = sorted(path.name for path in source.folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    splits = [name for name in below if name.lower() in SPLITS]
    if source.split is not None:
        found = [name for name in splits if SPLITS[name.lower()] == SPLITS[source.split]]
        return source.folder / found[0] if found else None
    if len(splits) > 1:
        raise ShardError(f"{source.folder}: holds several splits ({', '.join(splits)}); choose one with --split")
    return source.folder / splits[0] if splits and splits == below else source.folder

"""Kinetics: a table of segments of videos, and files named after them in folders of labels or in one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridle.data.errors import ShardError
from bridle.data.layouts.common import (
    SPLITS,
    VIDEO,
    Plan,
    RawDataSet,
    extension,
    files,
    rows,
    size_of,
    split_folder,
    whole,
)

NAMED = re.compile(r"(?P<video>.{11})_(?P<start>\d+)_(?P<end>\d+)")


@dataclass(frozen=True)
class Segment:
    """One row of the table; label and split are empty where it has none. Times in seconds."""

    video: str
    start: int
    end: int
    label: str = ""
    split: str = ""

    @property
    def key(self) -> str:
        """The name that Kinetics' own crawler gives the file."""
        return f"{self.video}_{self.start:06d}_{self.end:06d}"

    @property
    def about(self) -> dict[str, Any]:
        """What KEY.json says."""
        known = {"label": self.label, "split": self.split}
        times = {"source": self.video, "start_s": self.start, "end_s": self.end}
        return {**times, **{name: text for name, text in known.items() if text}}


def kinetics(source: RawDataSet) -> Plan:
    """By the table where there is one (label, youtube_id, time_start, time_end, split), else by folders of labels.

    The table is `source.table`, or the one CSV in the folder or its ``annotations``. A segment's file is found anywhere
    in the split's folder as ``YTID_START_END``, also with six digits, or as ``YTID``, where that id stands once.
    """
    root = split_folder(source)
    table = _table(source)
    if table is not None:
        return _by_table(_chosen(table, source.split), table, root or source.folder)
    if root is None:
        raise ShardError(
            f"{source.folder}: no folder of split '{source.split}' and no CSV in it; name one with --table"
        )
    return _by_folders(root)


def _by_table(segments: list[tuple[int, Segment]], table: Path, root: Path) -> Plan:
    found = Plan()
    named: dict[str, list[Path]] = {}
    for path in files(root, besides=table):
        if extension(path) in VIDEO:
            named.setdefault(path.stem, []).append(path)
        else:
            found.leave_out(path)
    segments_of = Counter(video for video, _, _ in {(s.video, s.start, s.end) for _, s in segments})
    used: set[Path] = set()
    for line, segment in segments:
        names = [segment.key, f"{segment.video}_{segment.start}_{segment.end}"]
        if segments_of[segment.video] == 1:
            names.append(segment.video)
        paths = [path for name in names for path in named.get(name, [])]
        if not paths:
            found.missing.append(f"{segment.key} (line {line})")
            continue
        path = min(paths, key=lambda path: _preference(path, segment))
        used.add(path)
        found.add(segment.key, path, segment.about, segment.video)
    found.ignored += sum(len(paths) for paths in named.values()) - len(used)
    return found


def _preference(path: Path, segment: Segment) -> tuple[bool, bool]:
    """A file with content before an empty one, then one in its label's folder."""
    return size_of(path) == 0, _plain(path.parent.name) != _plain(segment.label)


def _plain(label: str) -> str:
    return re.sub(r"[^a-z0-9]", "", label.lower())


def _by_folders(root: Path) -> Plan:
    found = Plan()
    for path in files(root):
        if extension(path) not in VIDEO:
            found.leave_out(path)
            continue
        label = "" if path.parent == root else path.parent.name
        named = NAMED.fullmatch(path.stem)
        if named:
            segment = Segment(named["video"], int(named["start"]), int(named["end"]), label)
            found.add(segment.key, path, segment.about, segment.video)
        else:
            found.add(path.stem, path, {"source": path.stem, **({"label": label} if label else {})})
    return found


def _table(source: RawDataSet) -> Path | None:
    """The CSV to go by; none: the folders alone say what there is."""
    if source.table is not None:
        return source.table
    tables = sorted(path for place in (".", "annotations") for path in (source.folder / place).glob("*.csv"))
    if source.split is not None and len(tables) > 1:
        wanted = {name for name, meaning in SPLITS.items() if meaning == SPLITS[source.split]}
        tables = [path for path in tables if wanted & set(re.split(r"[^a-z]+", path.stem.lower()))]
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise ShardError(f"{source.folder}: holds several tables ({names}); choose one with --table FILE or --split")
    return tables[0] if tables else None


def _chosen(table: Path, split: str | None) -> list[tuple[int, Segment]]:
    """Line number and segment of each row of the split, each segment and label once.

    Raises:
        ShardError: several splits and none chosen, or none of the one that was.
    """
    once = {segment: line for line, segment in reversed(list(_segments(table)))}
    found = {_meaning(segment.split) for segment in once} - {""}
    if split is None and len(found) > 1:
        raise ShardError(f"{table}: holds several splits ({', '.join(sorted(found))}); choose one with --split")
    if split is not None and found and SPLITS[split] not in found:
        raise ShardError(f"{table}: holds no row of split '{split}', only of: {', '.join(sorted(found))}")
    return sorted(
        (line, segment)
        for segment, line in once.items()
        if split is None or not segment.split or _meaning(segment.split) == SPLITS[split]
    )


def _meaning(split: str) -> str:
    return SPLITS.get(split.lower(), split)


def _segments(table: Path) -> Iterator[tuple[int, Segment]]:
    for line, row in rows(table, ("youtube_id", "time_start", "time_end")):
        start, end = (whole(row[column], table, line, column) for column in ("time_start", "time_end"))
        yield line, Segment(row["youtube_id"], start, end, row.get("label", ""), row.get("split", ""))

"""From a data set's own layout to a list of samples to write. One function a kind, in `IMPORTERS`."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bridle.data.errors import ShardError
from bridle.data.writer import Planned
from bridle.settings import nearest

AUDIO = {"wav", "flac", "mp3", "ogg", "oga", "opus", "m4a", "aac", "webm"}
IMAGE = {"jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "tif", "tiff"}
VIDEO = {"mp4", "mkv", "avi", "mov", "webm", "m4v", "mpg", "mpeg"}
MEDIA = AUDIO | IMAGE | VIDEO


@dataclass
class Plan:
    """samples to write; missing: named by the data set but not there, or empty; ignored: files that are no media."""

    samples: list[Planned] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ignored: int = 0


@dataclass(frozen=True)
class Source:
    """folder: of the data set. segments: AudioSet's table, where the folder holds several."""

    folder: Path
    segments: Path | None = None


def plan(kind: str, source: Source) -> Plan:
    """All samples of a data set, with unique keys without dots that stay the same between runs, in a mixed order.

    The order is that of a hash of the keys, so that neighbours in a shard are not all of one label.

    Raises:
        ShardError: an unknown kind, a folder that is not laid out so, or no sample in it.
    """
    if kind not in IMPORTERS:
        raise ShardError(f"kind '{kind}' is unknown{nearest(kind, IMPORTERS)}")
    if not source.folder.is_dir():
        raise ShardError(f"{source.folder}: no such folder")
    found = IMPORTERS[kind](source)
    if not found.samples:
        wrong = f"{len(found.missing)} files are missing or empty, {found.ignored} are no media"
        raise ShardError(f"{source.folder}: no sample of kind {kind} found ({wrong}); check the folder and --kind")
    found.samples = sorted(_with_unique_keys(found.samples), key=lambda sample: _digest(sample.key))
    return found


def folder(source: Source) -> Plan:
    """Any tree of media files; the label is the first folder's name, and a file at the top has none."""
    found = Plan()
    for path in _files(source.folder):
        relative = path.relative_to(source.folder)
        if _extension(path) not in MEDIA:
            found.ignored += 1
            continue
        about: dict[str, Any] = {"source": relative.as_posix()}
        if len(relative.parts) > 1:
            about["label"] = relative.parts[0]
        _add(found, relative.with_suffix("").as_posix(), path, about)
    return found


def esc50(source: Source) -> Plan:
    """ESC-50: ``audio/*.wav`` and ``meta/esc50.csv`` (filename, fold, target, category)."""
    found = Plan()
    table = source.folder / "meta" / "esc50.csv"
    for number, row in _rows(table, ("filename", "fold", "target", "category")):
        path = source.folder / "audio" / row["filename"]
        about = {
            "label": row["category"],
            "target": _whole(row["target"], table, number, "target"),
            "fold": _whole(row["fold"], table, number, "fold"),
            "source": row["filename"],
        }
        _add(found, path.stem, path, about)
    return found


def audioset(source: Source) -> Plan:
    """AudioSet: a table of segments (YTID, start, end, labels) and a tree of files named after them.

    A file is found under the usual names: YTID, alone or followed by start, or start and end, in seconds or
    milliseconds, joined by ``_`` or ``-``, with or without a ``Y`` in front.
    """
    table = source.segments or _only_table(source.folder)
    files = {path.stem: path for path in _files(source.folder) if _extension(path) in MEDIA}
    found = Plan()
    for number, (video, start, end, labels) in _segments(table):
        path = next((files[name] for name in _audioset_names(video, start, end) if name in files), None)
        key = f"{video}_{round(start * 1000)}"
        if path is None:
            found.missing.append(f"{video} (line {number})")
            continue
        _add(found, key, path, {"labels": labels, "source": video, "start_s": start, "end_s": end})
    return found


IMPORTERS: dict[str, Callable[[Source], Plan]] = {"folder": folder, "esc50": esc50, "audioset": audioset}
"""Every kind of `bridle shards build`."""


def _add(found: Plan, key: str, path: Path, about: dict[str, Any]) -> None:
    if not path.is_file() or path.stat().st_size == 0:
        found.missing.append(about["source"])
    else:
        found.samples.append(Planned(re.sub(r"[^A-Za-z0-9_/-]", "_", key), path, _extension(path), about))


def _with_unique_keys(samples: list[Planned]) -> Iterator[Planned]:
    """Keys that meet get a hash of what they stand for, whoever came first."""
    times = Counter(sample.key for sample in samples)
    seen: set[str] = set()
    for sample in samples:
        key = sample.key
        if times[key] > 1:
            identity = f"{sample.meta['source']} {sample.source.name} {sample.meta.get('end_s', '')}"
            key = f"{key}-{_digest(identity)[:8]}"
        if key in seen:
            raise ShardError(f"{sample.source}: stands twice in the data set (key '{key}'); remove one of them")
        seen.add(key)
        yield replace(sample, key=key)


def _files(root: Path) -> Iterator[Path]:
    for at, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(at) / name for name in sorted(names) if not name.startswith("."))


def _extension(path: Path) -> str:
    return path.suffix[1:].lower()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _rows(table: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and fields of each row of a CSV with a header."""
    try:
        with table.open(encoding="utf-8", newline="") as stream:
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


def _whole(text: str, table: Path, line: int, column: str) -> int:
    if not text.strip().lstrip("-").isdigit():
        raise ShardError(f"{table}: line {line}: {column} '{text}' is not a whole number")
    return int(text)


def _only_table(root: Path) -> Path:
    tables = sorted(root.glob("*.csv"))
    segments = [table for table in tables if "segments" in table.name] or tables
    if len(segments) != 1:
        names = ", ".join(table.name for table in segments) or "none"
        raise ShardError(f"{root}: expected one table of segments, found {names}; name it with --segments FILE.csv")
    return segments[0]


def _segments(table: Path) -> Iterator[tuple[int, tuple[str, float, float, list[str]]]]:
    try:
        with table.open(encoding="utf-8", newline="") as stream:
            reader = csv.reader(stream, skipinitialspace=True)
            for row in reader:
                if not row or row[0].startswith(("#", "YTID")):
                    continue
                try:
                    video, start, end, labels = row
                    yield reader.line_num, (video, float(start), float(end), labels.split(","))
                except ValueError:
                    expected = 'YTID, start_seconds, end_seconds, "labels"'
                    raise ShardError(f"{table}: line {reader.line_num}: found {row}, expected {expected}") from None
    except OSError as error:
        raise ShardError(f"{table}: {error.strerror}; name AudioSet's table with --segments FILE.csv") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ShardError(f"{table}: not a CSV in UTF-8: {error}") from None


def _audioset_names(video: str, start: float, end: float) -> Iterator[str]:
    times = [(start, end), (start * 1000, end * 1000)]
    for prefix in ("", "Y"):
        yield prefix + video
        for joint in "_-":
            for begin, stop in times:
                for digits in (0, 1, 2, 3):
                    yield f"{prefix}{video}{joint}{begin:.{digits}f}{joint}{stop:.{digits}f}"
                    yield f"{prefix}{video}{joint}{begin:.{digits}f}"

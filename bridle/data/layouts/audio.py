"""ESC-50 and AudioSet."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from bridle.data.errors import ShardError
from bridle.data.layouts.common import MEDIA, Plan, RawDataSet, extension, files, rows, whole


def esc50(source: RawDataSet) -> Plan:
    """ESC-50: ``audio/*.wav`` and ``meta/esc50.csv`` (filename, fold, target, category)."""
    found = Plan()
    table = source.folder / "meta" / "esc50.csv"
    for number, row in rows(table, ("filename", "fold", "target", "category")):
        path = source.folder / "audio" / row["filename"]
        about = {
            "label": row["category"],
            "target": whole(row["target"], table, number, "target"),
            "fold": whole(row["fold"], table, number, "fold"),
            "source": row["filename"],
        }
        recording = path.stem.split("-")[1:2]  # FOLD-RECORDING-TAKE-TARGET.wav
        found.add(path.stem, path, about, "".join(recording))
    return found


def audioset(source: RawDataSet) -> Plan:
    """AudioSet: a table of segments (YTID, start, end, labels) and a tree of files named after them.

    A file is found under the usual names: YTID, alone or followed by start, or start and end, in seconds or
    milliseconds, joined by ``_`` or ``-``, with or without a ``Y`` in front.
    """
    table = source.table or _only_table(source.folder)
    named = {path.stem: path for path in files(source.folder) if extension(path) in MEDIA}
    found = Plan()
    for number, (video, start, end, labels) in _segments(table):
        path = next((named[name] for name in _audioset_names(video, start, end) if name in named), None)
        key = f"{video}_{round(start * 1000)}"
        if path is None:
            found.missing.append(f"{video} (line {number})")
            continue
        found.add(key, path, {"labels": labels, "source": video, "start_s": start, "end_s": end}, video)
    return found


def _only_table(root: Path) -> Path:
    tables = sorted(root.glob("*.csv"))
    segments = [table for table in tables if "segments" in table.name] or tables
    if len(segments) != 1:
        names = ", ".join(table.name for table in segments) or "none"
        raise ShardError(f"{root}: expected one table of segments, found {names}; name it with --table FILE.csv")
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
        raise ShardError(f"{table}: {error.strerror}; name AudioSet's table with --table FILE.csv") from None
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

"""From a data set's own layout to a list of samples to write. Every kind stands in `IMPORTERS`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from bridle.data.errors import ShardError
from bridle.data.layouts.audio import audioset, esc50
from bridle.data.layouts.common import MEDIA, Plan, RawDataSet, extension, files
from bridle.data.layouts.kinetics import kinetics
from bridle.data.layouts.pictures import imagefolder
from bridle.data.origin import Origin
from bridle.data.writer import Planned
from bridle.settings import nearest


def plan(kind: str, source: RawDataSet) -> Plan:
    """All samples of a data set, with unique keys without dots that stay the same between runs, in a mixed order.

    The order is that of a hash of the keys, so that neighbours in a shard are not all of one label.

    Raises:
        ShardError: an unknown kind, an option it has no use for, a folder that is not laid out so, or no sample in it.
    """
    if kind not in IMPORTERS:
        raise ShardError(f"kind '{kind}' is unknown{nearest(kind, IMPORTERS)}")
    if not source.folder.is_dir():
        raise ShardError(f"{source.folder}: no such folder")
    importer = IMPORTERS[kind]
    for option, value in (("table", source.table), ("split", source.split)):
        if value is not None and option not in importer.options:
            raise ShardError(f"--{option} means nothing to kind {kind}; leave it out")
    found = importer.read(source)
    if not found.samples:
        wrong = f"{len(found.missing)} files are missing or empty, {found.ignored} others do not belong to it"
        raise ShardError(f"{source.folder}: no sample of kind {kind} found ({wrong}); check the folder and --kind")
    table = None if source.table is None else str(source.table.resolve())
    found.origin = Origin(kind, str(source.folder.resolve()), source.split, table)
    found.samples = sorted(_with_unique_keys(found.samples), key=lambda sample: _digest(sample.key))
    return found


def folder(source: RawDataSet) -> Plan:
    """Any tree of media files; the label is the first folder's name, and a file at the top has none."""
    found = Plan()
    for path in files(source.folder):
        relative = path.relative_to(source.folder)
        if extension(path) not in MEDIA:
            found.leave_out(path)
            continue
        about: dict[str, Any] = {"source": relative.as_posix()}
        if len(relative.parts) > 1:
            about["label"] = relative.parts[0]
        found.add(relative.with_suffix("").as_posix(), path, about)
    found.group_by_folder()
    return found


@dataclass(frozen=True)
class Importer:
    """read: from a source to a plan. options: what it takes besides the folder, of `table` and `split`."""

    read: Callable[[RawDataSet], Plan]
    options: frozenset[str] = frozenset()


IMPORTERS: dict[str, Importer] = {
    "folder": Importer(folder),
    "esc50": Importer(esc50),
    "audioset": Importer(audioset, frozenset({"table"})),
    "imagefolder": Importer(imagefolder, frozenset({"table", "split"})),
    "kinetics": Importer(kinetics, frozenset({"table", "split"})),
}
"""Every kind of `bridle shards build`."""


def _with_unique_keys(samples: list[Planned]) -> Iterator[Planned]:
    """Keys that meet get a hash of what they stand for, whoever came first."""
    times = Counter(sample.key for sample in samples)
    seen: set[str] = set()
    for sample in samples:
        key = sample.key
        if times[key] > 1:
            identity = f"{sample.source.name} {sample.json.decode(errors='replace')}"
            key = f"{key}-{_digest(identity)[:8]}"
        if key in seen:
            raise ShardError(f"{sample.source}: stands twice in the data set (key '{key}'); remove one of them")
        seen.add(key)
        yield replace(sample, key=key)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()

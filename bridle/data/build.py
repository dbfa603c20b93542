"""From a plan to a folder of shards: whole shards or none, and a second run goes on where the first one stopped."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock, Timeout

from bridle.data import index
from bridle.data.errors import ShardError
from bridle.data.files import FULL, no_room, written_aside
from bridle.data.heldout import split
from bridle.data.layouts.common import Plan
from bridle.data.origin import HELDOUT, NAME, Origin, record, refuse_another, refuse_unknown, remove_shards
from bridle.data.writer import Planned, write_index, write_shard


@dataclass
class Built:
    """What stands in the folder, and of it what earlier runs had finished (`kept`); files that are not in it.

    planned: samples that this build, or this part of it, is for; listed: the file that names the missing ones.
    """

    planned: int = 0
    shards: int = 0
    samples: int = 0
    bytes: int = 0
    kept_shards: int = 0
    kept_samples: int = 0
    kept_bytes: int = 0
    missing: list[str] = field(default_factory=list)
    listed: Path = Path("missing.txt")


Progress = Callable[[Built], None]
"""Called after each shard with what is done so far."""


def build(
    plan: Plan,
    destination: Path,
    *,
    shard_bytes: int,
    samples_per_shard: int | None,
    jobs: int,
    progress: Progress,
    part: tuple[int, int] = (0, 1),
    heldout: float = 0.0,
    overwrite: bool = False,
) -> Built:
    """Writes ``shard-000000.tar``, … with their indexes, and ``missing.txt`` where files were missing.

    With a held-out share, ``heldout/`` has shards of its own. ``source.json`` says what the shards were built from. A
    shard that is there with just the planned keys, sizes and labels, and is younger than its files, is kept. Shards of
    another plan are never overwritten half: each is replaced whole. A file that cannot be read is left out, and the
    next run tries its shard again.

    Args:
        shard_bytes: a shard is closed before it passes this, unless one sample alone does.
        samples_per_shard: bound on samples as well.
        jobs: shards written at once, each by a thread: reading, hashing and writing leave Python's lock.
        part: (i, n): of n builds of one plan, side by side, the i-th writes shards i, i + n, i + 2n, …
            and ``missing-I-of-N.txt``.
        heldout: share of the samples, at most a half, that goes to shards of its own (see `heldout.split`).
        overwrite: remove another source's shards first.

    Raises:
        ShardError: another source's shards in the folder, or some that are not of this plan; no room on the disk; no
            file of a shard can be read; another build at work there.
    """
    if overwrite and part[1] > 1:
        raise ShardError(
            "--overwrite: one part would remove what another has written; empty the folder, then build in parts"
        )
    halves = {destination: plan.samples}
    if heldout:
        training, kept_back = split(plan.samples, heldout)
        halves = {destination: training, destination / HELDOUT: kept_back}
    origin = replace(plan.origin, heldout=heldout, samples=len(plan.samples))
    try:
        destination.mkdir(parents=True, exist_ok=True)
        suffix = "" if part[1] == 1 else f"-{part[0]}-of-{part[1]}"
        with FileLock(str(destination / f".build{suffix}.lock"), timeout=0):
            planned = {
                folder / f"shard-{number:06d}.tar": group
                for folder, samples in halves.items()
                for number, group in enumerate(_cut(samples, shard_bytes, samples_per_shard))
            }
            _claim(destination, planned, origin, overwrite)
            ours = dict(list(planned.items())[part[0] :: part[1]])
            missing = list(plan.missing) if part[0] == 0 else []
            listed = destination / f"missing{suffix}.txt"
            return _build(destination, ours, origin, missing, listed, jobs, progress)
    except Timeout:
        raise ShardError(f"{destination}: another `bridle shards build` is writing there; wait for it to end") from None
    except OSError as error:
        if error.errno in FULL:
            raise no_room(destination, error) from None
        raise ShardError(f"{error.filename or destination}: {error.strerror or error}") from None


def _claim(destination: Path, planned: dict[Path, list[Planned]], origin: Origin, overwrite: bool) -> None:
    """Sees that nothing is lost that nobody meant to lose."""
    standing = sorted([*destination.glob("*.tar"), *(destination / HELDOUT).glob("*.tar")])
    if standing and not (destination / NAME).exists():
        odd = next((path for path in standing if path in planned and _finished(path, planned[path]) is None), None)
        if odd is not None:
            refuse_unknown(destination, f"{odd.name} has other samples", overwrite=overwrite)
    refuse_another(destination, origin, overwrite=overwrite)
    strangers = [path.name for path in standing if path.exists() and path not in planned]
    if strangers and overwrite:
        strangers = [path.name for path in remove_shards(destination, keep=planned)]
    if strangers:
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        fix = "choose an empty folder, or delete them"
        raise ShardError(f"{destination}: holds shards that are not of this build ({strangers[0]}{more}); {fix}")


def _build(
    destination: Path,
    planned: dict[Path, list[Planned]],
    origin: Origin,
    missing: list[str],
    listed: Path,
    jobs: int,
    progress: Progress,
) -> Built:
    _sweep(planned, listed)
    built = Built(planned=sum(map(len, planned.values())), missing=missing, listed=listed)
    with ThreadPoolExecutor(jobs) as pool:
        begun = [pool.submit(_shard, path, group) for path, group in planned.items()]
        try:
            for done in as_completed(begun):
                _count(built, *done.result())
                if built.shards == 1:  # nothing is left behind where nothing could be written
                    record(destination, origin)
                progress(built)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if built.missing:
        with written_aside(listed) as stream:
            stream.write("".join(f"{name}\n" for name in built.missing).encode(errors="surrogateescape"))
    else:
        listed.unlink(missing_ok=True)
    return built


def _sweep(planned: dict[Path, list[Planned]], listed: Path) -> None:
    """Makes the folders, and removes what a killed build of the same part left half written."""
    lists = (f".{listed.name}.",) + ((f".{NAME}.",) if listed.name == "missing.txt" else ())  # parts share the record
    for folder in {path.parent for path in planned}:
        folder.mkdir(exist_ok=True)
        for leftover in folder.glob(".*.partial"):
            shard = folder / (leftover.name[1:].partition(".tar")[0] + ".tar")
            if shard in planned or leftover.name.startswith(lists):
                leftover.unlink()


def _shard(path: Path, group: list[Planned]) -> tuple[index.Header, bool, list[str]]:
    """Header of a shard, whether it was there, and files that could not be read."""
    header = _finished(path, group)
    if header is not None:
        return header, True, []
    header, unreadable = write_shard(path, group)
    return header, False, unreadable


def _count(built: Built, header: index.Header, kept: bool, unreadable: list[str]) -> None:
    built.shards += 1
    built.samples += header.samples
    built.bytes += header.bytes
    if kept:
        built.kept_shards += 1
        built.kept_samples += header.samples
        built.kept_bytes += header.bytes
    built.missing += sorted(unreadable)


def _cut(samples: list[Planned], shard_bytes: int, most: int | None) -> Iterator[list[Planned]]:
    group: list[Planned] = []
    size = 0
    for sample in samples:
        if group and (size + sample.tar_bytes > shard_bytes or len(group) == most):
            yield group
            group, size = [], 0
        group.append(sample)
        size += sample.tar_bytes
    if group:
        yield group


def _finished(path: Path, group: list[Planned]) -> index.Header | None:
    """The header of a shard that an earlier run wrote, if it holds just this group."""
    if not path.exists() or any(_changed(sample.source) > path.stat().st_mtime_ns for sample in group):
        return None
    with contextlib.suppress(ShardError):
        header, entries = index.scan(path)
        found = [(entry.key, {name: size for name, (_, size) in entry.members.items()}) for entry in entries]
        planned = [(sample.key, {sample.extension: sample.size, "json": len(sample.json)}) for sample in group]
        if found != planned or not _told(path, entries, group):
            return None
        with contextlib.suppress(ShardError, OSError):
            stored = index.read_header(path.with_name(path.name + index.SUFFIX))
            if (stored.bytes, stored.kinds) == (header.bytes, header.kinds) and stored.sha256:
                return stored
        return write_index(path)
    return None


def _told(path: Path, entries: Sequence[index.Entry], group: Sequence[Planned]) -> bool:
    """Whether each KEY.json says what is planned: a label put right in a table need change neither sizes nor files."""
    with path.open("rb") as tar:
        for entry, sample in zip(entries, group, strict=True):
            offset, size = entry.members["json"]
            if os.pread(tar.fileno(), size, offset) != sample.json:
                return False
    return True


def _changed(file: Path) -> int:
    """When a file was last written, in nanoseconds; 0 where that cannot be known."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0

"""What is known of each output: counts, hashes, skipped samples; the manifest of them all; the check against both."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from bridle.errors import MistakeError
from bridle.tokens.engine import Finished
from bridle.tokens.formats import DATA, Written
from bridle.tokens.records import utf8
from bridle.tokens.sources import Inputs, Unit
from bridle.tokens.store import Store

PARTS = "parts"
MANIFEST = "manifest.json"
JOB = "job.json"
READ_AT_ONCE = 16


@dataclass(frozen=True)
class Part:
    """One output.

    source, source_bytes, source_sha256: what it was made of. samples: written; without: samples of the shard that hold
    nothing of the modality; skipped: key and reason of each that could not be read. windows: inputs of the model.
    positions, codes (positions times codebooks), tokens (ids of all documents), seconds (of content; none without
    time). files: bytes and sha256 of each, by name.
    """

    name: str
    source: str
    source_bytes: int
    source_sha256: str | None
    samples: int
    without: int
    skipped: list[dict[str, str]]
    windows: int
    positions: int
    codes: int
    tokens: int
    seconds: float | None
    files: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, unit: Unit, digest: str | None, finished: Finished, written: Written) -> Part:
        """The part of a unit that was just written."""
        durations = [record.duration_s for record in finished.records if record.duration_s is not None]
        return cls(
            name=unit.name,
            source=utf8(unit.source),
            source_bytes=unit.bytes,
            source_sha256=digest,
            samples=len(finished.records),
            without=unit.without,
            skipped=[{"key": utf8(skip.key), "reason": utf8(skip.reason)} for skip in finished.skipped],
            windows=finished.windows,
            positions=sum(len(record.codes) for record in finished.records),
            codes=sum(record.codes.size for record in finished.records),
            tokens=written.tokens,
            seconds=sum(durations) if durations else None,
            files=written.files,
        )

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def read_parts(store: Store, names: Sequence[str]) -> Iterator[Part | None]:
    """Parts by the names of their units; none where one is missing or damaged."""
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        yield from pool.map(lambda name: _read_part(store, name), names)


def _read_part(store: Store, name: str) -> Part | None:
    try:
        raw = store.read_json(f"{PARTS}/{name}.json")
        return None if raw is None else Part(**raw)
    except (ValueError, TypeError):
        return None


def whole(part: Part, sizes: dict[str, int]) -> bool:
    """Whether all files of a part are there, as long as they should be."""
    return all(sizes.get(name) == file["bytes"] for name, file in part.files.items())


def refuse_changed(store: Store, inputs: Inputs, number: int, part: Part) -> None:
    """Compares an input with what it was when its part was made: its size always, its hash where it was touched since.

    Raises:
        ValueError: it is another one now.
    """
    unit = inputs.units[number]
    changed = unit.bytes != part.source_bytes
    if not changed and part.source_sha256 is not None:
        modified = inputs.modified(number)
        made = store.modified(f"{PARTS}/{unit.name}.json")
        if modified is not None and made is not None and modified > made:
            changed = inputs.digest(number) != part.source_sha256
    if changed:
        raise MistakeError(
            f"{unit.source}: has changed since it was tokenized into {store.shown(f'{DATA}/{unit.name}')}.*; delete "
            f"{store.shown(f'{PARTS}/{unit.name}.json')} to have it done again, or choose another output"
        )


def manifest(job: dict[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
    """The manifest: what the job is, the sums, and every part."""
    seconds = [part.seconds for part in parts if part.seconds is not None]
    total = {
        name: sum(getattr(part, name) for part in parts)
        for name in ("samples", "without", "windows", "positions", "codes", "tokens")
    }
    summary = {
        "outputs": len(parts),
        **total,
        "skipped": sum(len(part.skipped) for part in parts),
        "bytes": sum(file["bytes"] for part in parts for file in part.files.values()),
        "seconds": sum(seconds) if seconds else None,
        "codes_per_second": total["codes"] / sum(seconds) if sum(seconds) else None,
        "tokens_per_second": total["tokens"] / sum(seconds) if sum(seconds) else None,
    }
    return {**job, "summary": summary, "parts": [part.as_json() for part in parts]}


def verify(store: Store, inputs: Inputs | None = None) -> list[str]:
    """Checks an output folder against its manifest and parts: one line for each fault, none when all is well.

    inputs: those that it was made of, if they are to be read and compared as well.

    Raises:
        OSError: it cannot be read.
        ValueError: there is no manifest, or it is damaged.
    """
    written = store.read_json(MANIFEST)
    if not isinstance(written, dict) or not isinstance(written.get("parts"), list):
        raise MistakeError(f"{store.shown(MANIFEST)}: not there or no manifest; let the same command finish first")
    faults, expected, sizes = [], {}, store.sizes(DATA)
    for raw in written["parts"]:
        part = Part(**raw)
        expected.update(part.files)
        (found,) = read_parts(store, [part.name])
        if found != part:
            faults.append(f"{store.shown(PARTS)}/{part.name}.json: not what the manifest says")
    for name, file in expected.items():
        path = f"{DATA}/{name}"
        if name not in sizes:
            faults.append(f"{store.shown(path)}: missing")
        elif sizes[name] != file["bytes"]:
            faults.append(f"{store.shown(path)}: {sizes[name]} bytes, the manifest says {file['bytes']}")
        elif (digest := store.sha256(path)) != file["sha256"]:
            faults.append(f"{store.shown(path)}: sha256 {digest[:16]}…, the manifest says {file['sha256'][:16]}…")
    known = expected.keys() | {f"{name}.index" for name in expected}  # who reads a tar as a shard leaves one beside it
    faults += [f"{store.shown(DATA)}/{name}: not in the manifest" for name in sorted(sizes.keys() - known)]
    if inputs is not None:
        faults += _changed_inputs(inputs, {raw["name"]: Part(**raw) for raw in written["parts"]})
    recomputed = manifest({}, [Part(**raw) for raw in written["parts"]])["summary"]
    if recomputed != written.get("summary"):
        faults.append(f"{store.shown(MANIFEST)}: its summary is not the sum of its parts")
    return faults


def _changed_inputs(inputs: Inputs, parts: dict[str, Part]) -> Iterator[str]:
    for number, unit in enumerate(inputs.units):
        part = parts.get(unit.name)
        if part is None:
            yield f"{unit.source}: not in the manifest; run the same command without --verify to tokenize it"
        elif unit.bytes != part.source_bytes or inputs.digest(number) not in (None, part.source_sha256):
            yield f"{unit.source}: has changed since it was tokenized"

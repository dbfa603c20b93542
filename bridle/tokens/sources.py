"""What bulk work reads: units (shards, or groups of files) of samples, each with its media and its other members."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from bridle.data.errors import SampleError, ShardError
from bridle.data.importers import plan
from bridle.data.layouts.common import AUDIO, IMAGE, MEDIA, VIDEO, RawDataSet, extension, files
from bridle.data.patterns import BUILTIN, is_remote
from bridle.data.shards import ShardSet, open_shards
from bridle.data.writer import Planned
from bridle.files import sha256
from bridle.modalities.clip import ClipError, Modality, TooLargeError
from bridle.remote.access import GLOB, shown
from bridle.settings import RecipeError

FILES_OF_A_UNIT = 1000


@dataclass(frozen=True)
class Unit:
    """What becomes one output. name: of the output; source: of the input, for people and the manifest.

    samples: to tokenize. without: samples of the shard that have no member of the modality. bytes: of the input.
    """

    name: str
    source: str
    samples: int
    without: int
    bytes: int


@dataclass(frozen=True)
class Raw:
    """A sample as it was read. fault: why it cannot be tokenized, if it cannot; then `data` may be empty."""

    key: str
    data: bytes
    members: dict[str, bytes]
    fault: str | None = None


class Inputs(Protocol):
    """A list of units. Picklable: decoding processes read samples themselves."""

    units: list[Unit]

    def read(self, unit: int, sample: int) -> Raw:
        """Sample of a unit.

        Raises:
            ShardError: the whole unit cannot be had.
        """
        ...

    def digest(self, unit: int) -> str | None:
        """SHA-256 of a unit's content; none where it is remote and its index has none. Reads all of it.

        Raises:
            OSError: it is gone.
        """
        ...

    def modified(self, unit: int) -> float | None:
        """Time of the last change, in seconds since 1970; none where it is remote."""
        ...


def open_inputs(words: Sequence[str], modality: Modality, *, files_per_unit: int = FILES_OF_A_UNIT) -> Inputs:
    """Shards (tars by path, glob or braces, local or remote, ``builtin:NAME``), or folders, files and globs of files.

    Raises:
        RecipeError: both kinds at once.
        ShardError: nothing found, or nothing of the modality in it.
    """
    kinds = {word: _means_shards(word) for word in words}
    if len(set(kinds.values())) > 1:
        one, other = (next(word for word, shards in kinds.items() if shards is kind) for kind in (True, False))
        raise RecipeError(f"inputs: '{one}' is a shard and '{other}' is not; tokenize them into separate folders")
    if all(kinds.values()):
        return ShardInputs(open_shards(words, extensions=modality.extensions))
    return FileInputs(_planned(words, modality), files_per_unit, modality.limits.max_bytes)


def _means_shards(word: str) -> bool:
    return (
        word.startswith(BUILTIN)
        or is_remote(word)
        or word.lower().endswith((".tar", ".tar}"))
        or word.endswith(".tar*")
    )


class ShardInputs:
    """One unit a shard. Its name comes from the shard's address, so that a list that grows changes no name."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards = shards
        self.units = [
            Unit(
                f"{_plain(Path(shown(shard.url)).name.removesuffix('.tar'))[:60]}-{_hash(shard.url)[:8]}",
                shown(shard.url),
                shard.count,
                shard.header.samples - shard.count,
                shard.header.bytes,
            )
            for shard in shards.shards
        ]
        self._firsts = [0, *accumulate(shards.counts)]

    def read(self, unit: int, sample: int) -> Raw:
        i = self._firsts[unit] + sample
        try:
            key, names, members = self.shards.members(i, besides=MEDIA)
            chosen = self.shards.wanted(names)
            twins = [name for name in names if chosen and name != chosen and _same_kind(name, chosen)]
            if twins:
                both = ", ".join(sorted([chosen or "", *twins]))
                return Raw(key, b"", members, f"has several media members of one kind: {both}; keep one of them")
            return Raw(key, self.shards.data(i), members)
        except SampleError as error:
            return Raw(self.shards.where(i)[1], b"", {}, str(error))

    def digest(self, unit: int) -> str | None:
        shard = self.shards.shards[unit]
        return shard.header.sha256 if shard.remote else sha256(Path(shard.url))

    def modified(self, unit: int) -> float | None:
        shard = self.shards.shards[unit]
        return None if shard.remote else Path(shard.url).stat().st_mtime


class FileInputs:
    """Groups of files: ``files-000000`` and so on, in a fixed order that mixes the folders."""

    def __init__(self, samples: list[Planned], per_unit: int, max_bytes: int) -> None:
        self.groups = [samples[i : i + per_unit] for i in range(0, len(samples), per_unit)]
        self.max_bytes = max_bytes
        self.units = [
            Unit(f"files-{number:06d}", f"{len(group)} files", len(group), 0, sum(sample.size for sample in group))
            for number, group in enumerate(self.groups)
        ]

    @property
    def listing(self) -> str:
        """SHA-256 over keys and sizes: another one means that files came, went or changed."""
        lines = (f"{s.key}\0{s.extension}\0{s.size}\n" for group in self.groups for s in group)
        digest = hashlib.sha256()
        for line in lines:
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()

    def read(self, unit: int, sample: int) -> Raw:
        found = self.groups[unit][sample]
        members = {"json": found.json}
        try:
            if found.source.stat().st_size > self.max_bytes:
                raise TooLargeError(f"{found.source.stat().st_size} bytes, above max_bytes = {self.max_bytes}")
            return Raw(found.key, found.source.read_bytes(), members)
        except OSError as error:
            return Raw(found.key, b"", members, f"{found.source}: {error.strerror}")
        except ClipError as error:
            return Raw(found.key, b"", members, f"{found.source}: {error}; split the file")

    def digest(self, unit: int) -> str | None:
        digest = hashlib.sha256()
        for found in self.groups[unit]:
            try:
                content = sha256(found.source)
            except OSError:
                content = "unreadable"
            digest.update(f"{found.key}\0{content}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def modified(self, unit: int) -> float | None:
        return max((s.source.stat().st_mtime for s in self.groups[unit] if s.source.exists()), default=0.0)


def _planned(words: Sequence[str], modality: Modality) -> list[Planned]:
    """All files of the modality, by their endings. Keys are unique, and stay what they are between runs."""
    found: list[Planned] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            if any(extension(file) in modality.extensions for file in files(path)):
                found += [s for s in plan("folder", RawDataSet(path)).samples if s.extension in modality.extensions]
            continue
        is_glob = bool(GLOB & set(word)) and not path.is_file()  # a shell gives names such as "a [1].wav" as they are
        paths = [Path(name) for name in sorted(glob(word, recursive=True))] if is_glob else [path]  # noqa: PTH207
        named = [file for file in paths if file.is_file()]
        if not named:
            raise ShardError(f"'{word}': no such file or folder, and no shard; check the path")
        found += [
            Planned(_plain(file.stem), file, extension(file), file.stat().st_size, {"source": file.name})
            for file in named
            if extension(file) in modality.extensions or not is_glob
        ]
    if not found:
        kinds = ", ".join(modality.extensions)
        raise ShardError(f"{' '.join(words)[:200]}: no file of modality {modality.name} there ({kinds})")
    return _with_unique_keys(found)


def _with_unique_keys(samples: list[Planned]) -> list[Planned]:
    """Keys that meet, from several folders or of names that differ in what a key leaves out, get a hash of the path."""
    times = Counter(sample.key for sample in samples)
    unique: dict[str, Planned] = {}
    for sample in samples:
        about = json.dumps(sample.meta, sort_keys=True)
        key = sample.key
        if times[key] > 1 or len(key) > 200:
            key = f"{key[:150]}-{_hash(f'{sample.source.name} {about}')[:8]}"
        if key in unique:
            key = f"{key}-{_hash(str(sample.source))[:8]}"
        if key in unique:
            raise ShardError(f"{sample.source}: is given twice; name each file or folder once")
        unique[key] = Planned(key, sample.source, sample.extension, sample.size, sample.meta)
    return sorted(unique.values(), key=lambda sample: _hash(sample.key))


def _same_kind(one: str, other: str) -> bool:
    """Whether two members are alternatives; a film beside a sound is another thing, though sound is read from films."""
    kinds = [next((kind for kind in (VIDEO, IMAGE, AUDIO) if name in kind), None) for name in (one, other)]
    return kinds[0] is kinds[1]


def _plain(name: str) -> str:
    """A name without what no key or file name should hold."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name) or "_"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()

"""Reading what bulk work wrote, in whatever format: codes and documents, one output after the other."""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bridle.errors import MistakeError
from bridle.tokens.bulk import VOCABULARY
from bridle.tokens.formats import DATA, INDEX_HEADER, MEGATRON_TYPES
from bridle.tokens.layouts import Ids, TokenError
from bridle.tokens.parts import MANIFEST, Part
from bridle.tokens.records import Record
from bridle.tokens.store import Store
from bridle.tokens.vocabulary import PARALLEL, IdSpace, ModalityTokens, id_space_from_json

_TOKEN = re.compile(r"<\|[^|]*\|>")


@dataclass(frozen=True)
class Row:
    """One sample: codes int64 ``[N, M]``; ids of its whole document, int64 ``[L]`` or ``[M, L]``, none in `jsonl`."""

    key: str
    codes: Ids
    ids: Ids | None
    grid: dict[str, int]
    duration_s: float | None
    labels: list[str]


class Corpus:
    """A finished output folder of bulk work.

    Raises:
        ValueError: it is none, or not finished.
        OSError: it cannot be reached.
    """

    def __init__(self, address: str) -> None:
        self.store = Store(address)
        self.manifest = self.store.read_json(MANIFEST)
        if not isinstance(self.manifest, dict) or "parts" not in self.manifest or "length" in self.manifest:
            raise MistakeError(
                f"{address}: no {MANIFEST} of bulk work there; give the --out of a `bridle tokenize` that has ended"
            )
        self.model: dict[str, Any] = self.manifest["model"]
        self.kind: str = self.manifest["settings"]["format"]
        self.parts = [Part(**raw) for raw in self.manifest["parts"]]

    @cached_property
    def space(self) -> IdSpace:
        """The id space of its documents."""
        return id_space_from_json(self.store.read_json(VOCABULARY), self.store.shown(VOCABULARY))

    @property
    def tokens(self) -> ModalityTokens:
        """How its codes are written."""
        return self.space.of(self.model["modality"])

    def rows(self, part: Part) -> Iterator[Row]:
        """The samples of one output, in their order.

        Raises:
            ValueError: a damaged file.
            OSError: a missing one.
        """
        read = {"parquet": self._parquet, "webdataset": self._tar, "megatron": self._megatron, "jsonl": self._jsonl}
        if part.samples:  # else it has no file
            yield from read[self.kind](part)

    def __iter__(self) -> Iterator[Row]:
        for part in self.parts:
            yield from self.rows(part)

    def _local(self, part: Part, ending: str) -> Any:
        return self.store.local(f"{DATA}/{part.name}.{ending}")

    def _parquet(self, part: Part) -> Iterator[Row]:
        import pyarrow.parquet as pq

        columns = ["key", "codes", "input_ids", "grid", "duration_s", "labels"]
        with self._local(part, "parquet") as path:
            for batch in pq.ParquetFile(path).iter_batches(1000, columns=columns):
                lists = [_rows_of(batch.column(name)) for name in ("codes", "input_ids")]
                plain = batch.select(["key", "grid", "duration_s", "labels"]).to_pylist()
                for about, codes, ids in zip(plain, *lists, strict=True):
                    yield Row(about["key"], codes.T, ids, about["grid"], about["duration_s"], about["labels"])

    def _tar(self, part: Part) -> Iterator[Row]:
        from bridle.data.shards import open_shards

        with self._local(part, "tar") as path:
            shards = open_shards([str(path)], extensions=["codes.npy"])
            for i in range(len(shards)):
                key, _, members = shards.members(i, besides=())
                about = json.loads(members["codes.json"])
                codes, ids = (
                    np.load(io.BytesIO(members[name]), allow_pickle=False).astype(np.int64)
                    for name in ("codes.npy", "ids.npy")
                )
                record = Record(key, codes.T, about["grid"], about.get("duration_s"), members)
                yield Row(key, record.codes, ids, record.grid, record.duration_s, record.labels)

    def _megatron(self, part: Part) -> Iterator[Row]:
        with self._local(part, "idx") as path:
            kind, lengths, offsets = read_index(path)
        with self._local(part, "samples.jsonl") as path:
            lines = path.read_text(encoding="utf-8").splitlines()
        with self._local(part, "bin") as path, path.open("rb") as stream:
            for line, length, offset in zip(lines, lengths.tolist(), offsets.tolist(), strict=True):
                stream.seek(offset)
                ids = np.frombuffer(stream.read(length * np.dtype(kind).itemsize), kind).astype(np.int64)
                yield self._row(json.loads(line), ids, ids)

    def _jsonl(self, part: Part) -> Iterator[Row]:
        number = {name: self.space.text + i for i, name in enumerate(self.space.added_tokens())}
        with self._local(part, "jsonl") as path, path.open(encoding="utf-8") as stream:
            for line in stream:
                written = json.loads(line)
                about = json.loads(written["about"])
                if "input_ids" in written:
                    ids = np.array(written["input_ids"], np.int64)
                    yield self._row(about, ids, ids)
                else:
                    found = [number[name] for name in _TOKEN.findall(written["text"]) if name in number]
                    yield self._row(about, np.array(found, np.int64), None)

    def _row(self, about: dict[str, Any], document: Ids, ids: Ids | None) -> Row:
        codes = self.tokens.decode(document if self.tokens.layout == PARALLEL else self._stream(document))
        return Row(about["key"], codes, ids, about["grid"], about.get("duration_s"), about.get("labels", []))

    def _stream(self, document: Ids) -> Ids:
        """The ids from begin to end."""
        begins, ends = (np.flatnonzero(document == token) for token in (self.tokens.ids.begin, self.tokens.ids.end))
        if len(begins) != 1 or len(ends) != 1:
            raise TokenError(f"a document with {len(begins)} begin and {len(ends)} end tokens; expected one of each")
        return document[begins[0] : ends[0] + 1]


def _rows_of(column: Any) -> list[Ids]:
    """A column of lists, or of lists of equally long lists, as arrays."""
    found = []
    for value in column:
        inner = value.values
        if hasattr(inner, "offsets"):
            flat = inner.flatten().to_numpy(zero_copy_only=False)
            found.append(flat.reshape(len(inner), -1).astype(np.int64))
        else:
            found.append(inner.to_numpy(zero_copy_only=False).astype(np.int64))
    return found


def read_index(path: Path) -> tuple[npt.DTypeLike, npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Type, lengths and offsets in bytes of the sequences of a Megatron ``.idx``.

    Raises:
        ValueError: it is none, or of a type that bulk work does not write.
    """
    content = path.read_bytes()
    head = len(INDEX_HEADER) + struct.calcsize("<QBQQ")
    if not content.startswith(INDEX_HEADER) or len(content) < head:
        raise MistakeError(f"{path}: not an index of Megatron's")
    _, code, count, _ = struct.unpack_from("<QBQQ", content, len(INDEX_HEADER))
    if code not in MEGATRON_TYPES or len(content) < head + 12 * count:
        raise MistakeError(f"{path}: type {code} of {count} sequences in {len(content)} bytes; it is damaged")
    lengths = np.frombuffer(content, np.int32, count, head)
    return MEGATRON_TYPES[code], lengths, np.frombuffer(content, np.int64, count, head + 4 * count)

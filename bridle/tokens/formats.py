"""The formats of bulk work. Each writes the samples of one unit to one or more files, whose bytes depend on them alone.

| format | files | for |
| --- | --- | --- |
| `parquet` | NAME.parquet | Hugging Face `datasets`, Spark, Ray Data |
| `webdataset` | NAME.tar | WebDataset pipelines, `bridle` itself |
| `megatron` | NAME.bin, NAME.idx, NAME.samples.jsonl | Megatron-LM, Megatron Core, NeMo |
| `jsonl` | NAME.jsonl | LLaMA-Factory, axolotl and whoever reads text |
"""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bridle.files import sha256
from bridle.settings import RecipeError
from bridle.tokens.documents import Documents
from bridle.tokens.layouts import Ids
from bridle.tokens.records import Record, code_type, utf8
from bridle.tokens.store import Store

DATA = "data"
INDEX_HEADER = b"MMIDIDX\x00\x00"
MEGATRON_TYPES: dict[int, npt.DTypeLike] = {8: np.uint16, 4: np.int32}
"""Megatron's codes of the types that are used here, the smaller one first."""
ROWS_OF_A_GROUP = 1000


@dataclass(frozen=True)
class Written:
    """files: bytes and sha256 of each, by name; tokens: ids of all documents."""

    files: dict[str, dict[str, Any]]
    tokens: int


Write = Callable[[Path, Sequence[Record], Sequence[Ids], Documents], None]


def write_unit(store: Store, name: str, kind: str, records: Sequence[Record], documents: Documents) -> Written:
    """Writes the files of one unit to ``data/``; each appears whole. A unit without records has none: many readers fail
    on files without rows (Parquet knows no type for its grid, `datasets` and Megatron refuse empty ones).

    Raises:
        OSError: see `Store.put`.
    """
    if not records:
        return Written({}, 0)
    rows = [documents.ids(record) for record in records] if needs_ids(kind, documents) else []
    files = {}
    for suffix, write in FORMATS[kind].items():
        with store.put(f"{DATA}/{name}.{suffix}") as path:
            write(path, records, rows, documents)
            files[f"{name}.{suffix}"] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    if rows:
        return Written(files, sum(row.size for row in rows))
    return Written(files, sum(documents.stream(record).size for record in records))


def needs_ids(kind: str, documents: Documents) -> bool:
    """Whether the format holds whole documents as ids, so that a template's text needs a tokenizer."""
    return kind != "jsonl" or not documents.flat


def check_format(kind: str, documents: Documents) -> None:
    """Whether such documents can be written so.

    Raises:
        RecipeError: several rows of ids in a format of flat documents, or text where there is no tokenizer.
    """
    if kind == "megatron" and not documents.flat:
        raise RecipeError("--format megatron holds flat documents; use another --layout, or another format")
    if needs_ids(kind, documents) and documents.template.has_text and documents.tokenizer is None:
        raise RecipeError(f"--template: format {kind} holds ids, and its text needs a tokenizer; name one: --tokenizer")


def describe(record: Record) -> dict[str, Any]:
    """What a sample is besides its codes, as plain data. Members that are not UTF-8 text are in base64."""
    found: dict[str, Any] = {"key": utf8(record.key), "grid": record.grid}
    if record.duration_s is not None:
        found["duration_s"] = record.duration_s
    if record.labels:
        found["labels"] = record.labels
    if record.caption is not None:
        found["caption"] = record.caption
    if record.members:
        found["members"] = {name: _as_text(content) for name, content in sorted(record.members.items())}
    return found


def _as_text(content: bytes) -> Any:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}


def _json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")


def _write_jsonl(path: Path, records: Sequence[Record], rows: Sequence[Ids], documents: Documents) -> None:
    """What a sample is stands in one string: `datasets` takes each column's type from the first rows of the first file,
    and fails on others that have other labels or members."""
    if documents.flat:
        contents: list[dict[str, Any]] = [{"text": documents.text(record)} for record in records]
    else:
        contents = [{"input_ids": ids.tolist()} for ids in rows]
    about = [{"key": utf8(record.key), "about": json.dumps(describe(record), ensure_ascii=False)} for record in records]
    _json_lines(path, [{**content, **one} for content, one in zip(contents, about, strict=True)])


def _write_tar(path: Path, records: Sequence[Record], rows: Sequence[Ids], documents: Documents) -> None:
    import webdataset

    kind = code_type(documents.tokens.ids.codebook_size)
    with path.open("wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0, user="", group="") as tar:
        for record, ids in zip(records, rows, strict=True):
            about = {name: value for name, value in describe(record).items() if name in ("grid", "duration_s")}
            tar.write(
                {
                    **record.members,
                    "__key__": record.key,
                    "codes.npy": _npy(record.codes.T.astype(kind)),
                    "codes.json": json.dumps(about).encode(),
                    "ids.npy": _npy(ids.astype(np.int32)),
                }
            )


def _npy(array: npt.NDArray[Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(array), allow_pickle=False)
    return out.getvalue()


def _write_parquet(path: Path, records: Sequence[Record], rows: Sequence[Ids], documents: Documents) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table_of(records, rows, documents), path, compression="zstd", row_group_size=ROWS_OF_A_GROUP)


def table_of(records: Sequence[Record], rows: Sequence[Ids], documents: Documents) -> Any:
    """An Arrow table, a row for each sample (at least one).

    codes: M lists of N integers. grid: a struct. input_ids: a list, or M lists. members: name and content.
    """
    import pyarrow as pa

    kind = pa.from_numpy_dtype(code_type(documents.tokens.ids.codebook_size))
    books = documents.tokens.ids.codebooks
    axes = list(records[0].grid)
    ids = _lists(pa, rows, pa.int32()) if documents.flat else _nested(pa, rows, books, pa.int32())
    members = [
        [{"name": name, "content": content} for name, content in sorted(record.members.items())] for record in records
    ]
    member = pa.struct([("name", pa.string()), ("content", pa.binary())])
    columns = {
        "key": pa.array([utf8(record.key) for record in records], pa.string()),
        "codes": _nested(pa, [record.codes.T for record in records], books, kind),
        "input_ids": ids,
        "grid": pa.array([record.grid for record in records], pa.struct([(axis, pa.int32()) for axis in axes])),
        "duration_s": pa.array([record.duration_s for record in records], pa.float64()),
        "labels": pa.array([record.labels for record in records], pa.list_(pa.string())),
        "caption": pa.array([record.caption for record in records], pa.string()),
        "members": pa.array(members, pa.list_(member)),
    }
    return pa.table(columns)


def _lists(pa: Any, rows: Sequence[npt.NDArray[Any]], kind: Any) -> Any:
    ends = np.cumsum([0, *(len(row) for row in rows)])
    values = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values.astype(kind.to_pandas_dtype()), kind))


def _nested(pa: Any, rows: Sequence[npt.NDArray[Any]], books: int, kind: Any) -> Any:
    inner = _lists(pa, [line for row in rows for line in row], kind)
    return pa.ListArray.from_arrays(pa.array(np.arange(len(rows) + 1) * books, pa.int32()), inner)


def _megatron_type(documents: Documents) -> int:
    return next(code for code, kind in MEGATRON_TYPES.items() if documents.space.size <= np.iinfo(kind).max + 1)


def _write_bin(path: Path, records: Sequence[Record], rows: Sequence[Ids], documents: Documents) -> None:
    kind = MEGATRON_TYPES[_megatron_type(documents)]
    with path.open("wb") as stream:
        for row in rows:
            stream.write(row.astype(kind).tobytes())


def _write_idx(path: Path, records: Sequence[Record], rows: Sequence[Ids], documents: Documents) -> None:
    """Header, version, type, numbers of sequences and of document ends; lengths, offsets in bytes, document ends."""
    code = _megatron_type(documents)
    lengths = np.array([len(row) for row in rows], np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64) * np.dtype(MEGATRON_TYPES[code]).itemsize])
    with path.open("wb") as stream:
        stream.write(INDEX_HEADER + struct.pack("<QBQQ", 1, code, len(rows), len(rows) + 1))
        stream.write(lengths.tobytes() + offsets[: len(rows)].astype(np.int64).tobytes())
        stream.write(np.arange(len(rows) + 1, dtype=np.int64).tobytes())


def _write_samples(path: Path, records: Sequence[Record], rows: Sequence[Ids], documents: Documents) -> None:
    """What a document is: one line each, since Megatron's own files hold nothing but ids."""
    _json_lines(path, [{**describe(record), "tokens": len(ids)} for record, ids in zip(records, rows, strict=True)])


FORMATS: dict[str, dict[str, Write]] = {
    "parquet": {"parquet": _write_parquet},
    "webdataset": {"tar": _write_tar},
    "megatron": {"bin": _write_bin, "idx": _write_idx, "samples.jsonl": _write_samples},
    "jsonl": {"jsonl": _write_jsonl},
}
"""Every format, and what writes each of its files, by ending."""

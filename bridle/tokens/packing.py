"""Documents to sequences of one length: best fit, whole documents together, boundaries kept.

Each row holds whole documents, and the end of it is padding. A document longer than a row is cut into rows' lengths;
nothing else is cut. Rows of one output come from one output, so that packing is a pure function of each.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridle.errors import MistakeError
from bridle.files import sha256
from bridle.settings import RecipeError
from bridle.tokens.bulk import TOKENIZER, VOCABULARY
from bridle.tokens.corpus import Corpus
from bridle.tokens.formats import DATA
from bridle.tokens.layouts import Ids
from bridle.tokens.parts import MANIFEST, PARTS, Part
from bridle.tokens.store import Store

JOB = "packing.json"
IGNORED = -100
"""The label of padding, which no loss counts."""


@dataclass(frozen=True)
class Packed:
    """Rows of one length. lengths: of the documents in each row, in their order; the rest of a row is padding."""

    rows: list[Ids]
    lengths: list[list[int]]


def pack(documents: Sequence[Ids], length: int, pad: int) -> Packed:
    """Documents ``[L]`` to rows ``[length]``: the longest first, each where the least room is left behind it."""
    pieces = [piece for document in documents for piece in _cut(document, length)]
    order = sorted(range(len(pieces)), key=lambda i: (-len(pieces[i]), i))
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # sorted: room left, number of the bin
    for i in order:
        need = len(pieces[i])
        at = bisect_left(room, (need, -1))
        if at < len(room):
            left, number = room.pop(at)
        else:
            left, number = length, len(bins)
            bins.append([])
        bins[number].append(i)
        insort(room, (left - need, number))
    rows = []
    for found in bins:
        row = np.full(length, pad, np.int64)
        joined = np.concatenate([pieces[i] for i in found])
        row[: len(joined)] = joined
        rows.append(row)
    return Packed(rows, [[len(pieces[i]) for i in found] for found in bins])


def _cut(document: Ids, length: int) -> Iterator[Ids]:
    for first in range(0, len(document), length):
        yield document[first : first + length]


def pack_corpus(source: str, out: str, length: int) -> dict[str, Any]:
    """Packs a tokenized corpus into Parquet files, one for each of its outputs; what is done already is kept.

    Columns: `input_ids`, `labels` (-100 in the padding), `position_ids` (from 0 in each document), all of `length`, and
    `lengths` of the documents.

    Returns:
        The manifest.

    Raises:
        RecipeError: a length below 2.
        ValueError: not a corpus of flat documents with ids, or an output that holds something else.
        OSError: see `Store`.
    """
    if length < 2:
        raise RecipeError(f"--length {length}: expected 2 or more")
    corpus, store = Corpus(source), Store(out)
    if corpus.kind == "jsonl" or corpus.tokens.layout == "parallel":
        raise MistakeError(f"{source}: format {corpus.kind}, layout {corpus.tokens.layout}: no flat ids to pack; "
                         "tokenize to parquet, webdataset or megatron, in another layout than parallel")  # fmt: skip
    about = {
        "version": 1,
        "length": length,
        "pad": corpus.space.pad,
        "model": corpus.model,
        "settings": corpus.manifest["settings"],
    }
    before = store.read_json(JOB)
    if before not in (None, about) or (before is None and store.exists()):
        raise MistakeError(f"{out}: holds something else than this packing; choose an empty folder")
    others = sorted(store.sizes(PARTS).keys() - {f"{part.name}.json" for part in corpus.parts})
    if others:
        raise MistakeError(f"{out}: holds what {source} has not, such as {others[0]}; choose an empty folder")
    if before is None:
        for name in (VOCABULARY, *(f"{TOKENIZER}/{name}" for name in corpus.store.sizes(TOKENIZER))):
            store.put_bytes(name, corpus.store.read(name) or b"")
        store.put_json(JOB, about)
    parts = [_pack_part(corpus, part, store, length) for part in corpus.parts]
    names = ("rows", "documents", "tokens")
    summary: dict[str, Any] = {name: sum(part[name] for part in parts) for name in names}
    summary["filled"] = summary["tokens"] / (summary["rows"] * length) if summary["rows"] else 1.0
    whole = {**about, "summary": summary, "parts": parts}
    store.put_json(MANIFEST, whole)
    card = f'---\nconfigs:\n- config_name: default\n  data_files: "{DATA}/*.parquet"\n---\n\n# Packed codes\n\n'
    text = (
        f"{summary['documents']} documents in {summary['rows']} rows of {length} ids, {summary['filled']:.1%} filled.\n"
    )
    store.put_bytes("README.md", (card + text).encode())
    return whole


def _pack_part(corpus: Corpus, part: Part, store: Store, length: int) -> dict[str, Any]:
    made_of = {name: file["sha256"] for name, file in part.files.items()}
    before = store.read_json(f"{PARTS}/{part.name}.json")
    if before is not None and before["source"] == made_of:
        sizes = store.sizes(DATA)
        if all(sizes.get(name) == file["bytes"] for name, file in before["files"].items()):
            return dict(before)
    documents = [row.ids for row in corpus.rows(part) if row.ids is not None]
    packed = pack(documents, length, corpus.space.pad)
    name, files = f"{part.name}.parquet", {}
    if packed.rows:  # `datasets` refuses a file without rows
        with store.put(f"{DATA}/{name}") as path:
            _write(path, packed, length)
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    done = {
        "name": part.name,
        "source": made_of,
        "rows": len(packed.rows),
        "documents": len(documents),
        "tokens": sum(map(sum, packed.lengths)),
        "files": files,
    }
    store.put_json(f"{PARTS}/{part.name}.json", done)
    return done


def _write(path: Path, packed: Packed, length: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = np.array(packed.rows, np.int64).reshape(-1, length)
    labels, positions = rows.copy(), np.zeros_like(rows)
    for number, lengths in enumerate(packed.lengths):
        labels[number, sum(lengths) :] = IGNORED
        places = [np.arange(size) for size in (*lengths, length - sum(lengths))]
        positions[number] = np.concatenate(places)
    kind = pa.list_(pa.int32())
    columns = {
        name: pa.array(list(values.astype(np.int32)), kind)
        for name, values in (("input_ids", rows), ("labels", labels), ("position_ids", positions))
    }
    pq.write_table(pa.table({**columns, "lengths": pa.array(packed.lengths, kind)}), path, compression="zstd")

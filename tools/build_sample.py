"""Packs the shards that ship inside the package: ``python tools/build_sample.py SRC [DST]``.

SRC holds ``audio/LABEL/*``, ``images/LABEL/*``, ``videos/LABEL/*`` and ``LICENSES.tsv`` (file, licence, author,
source). Within each modality's budget the smallest files are taken, and some of every label in any case. About 15 % of
each label, chosen by a hash of the name, is held out. The same SRC gives the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from bridle.data.writer import Planned, write_shard

BUDGETS = {"audio": ("audio", 3_280_000), "image": ("images", 2_640_000), "video": ("videos", 1_950_000)}
"""Folder of each modality in SRC, and bytes of its tars."""
LIMIT = 8_000_000
HELDOUT_SHARE = 0.15
KEPT_OF_EACH_LABEL = 4
CROPS_PER_PHOTOGRAPH = 6
PHOTOGRAPHS = {"brick", "cameraman", "cat", "coffee", "galaxies", "grass", "gravel", "retina", "rocket"}
"""Picture labels that are crops of one photograph each."""
LEFT_OUT = {"audio/loop/loop_amen.ogg", "audio/loop/loop_amen_full.flac"}
"""Marked CC0 by their uploader, but they sample a record that is not his."""


def main() -> int:
    """Writes tars, indexes and LICENSES.tsv; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("src", type=Path)
    parser.add_argument("dst", type=Path, nargs="?", default=Path(__file__).parents[1] / "bridle" / "data" / "sample")
    args = parser.parse_args()
    with (args.src / "LICENSES.tsv").open(encoding="utf-8", newline="") as stream:
        licences = {row["file"]: row for row in csv.DictReader(stream, delimiter="\t")}
    args.dst.mkdir(parents=True, exist_ok=True)
    rows = []
    for modality, (folder, budget) in BUDGETS.items():
        chosen = list(_choose(args.src, folder, budget, licences))
        for split, samples in _split(chosen).items():
            shard = args.dst / f"{modality}-{split}-0000.tar"
            header, _ = write_shard(shard, samples)
            print(f"{shard.name}: {header.samples} samples, {header.bytes} bytes", file=sys.stderr)
            for sample in samples:
                row = licences[sample.source.relative_to(args.src).as_posix()]
                rows.append(
                    [f"{shard.name}/{sample.key}.{sample.extension}", row["licence"], row["author"], row["source"]]
                )
    with (args.dst / "LICENSES.tsv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerows([["file", "licence", "author", "source"], *sorted(rows)])
    total = sum(file.stat().st_size for file in args.dst.iterdir())
    print(f"{len(rows)} samples, {total} bytes of at most {LIMIT}", file=sys.stderr)
    return int(total >= LIMIT)


def _choose(src: Path, folder: str, budget: int, licences: dict[str, dict[str, str]]) -> Iterator[Planned]:
    queues = []
    for label in sorted(entry.name for entry in (src / folder).iterdir() if entry.is_dir()):
        samples = [
            Planned(f"{label}/{file.stem}", file, file.suffix[1:].lower(), file.stat().st_size, {"label": label})
            for file in sorted((src / folder / label).iterdir())
            if (name := file.relative_to(src).as_posix()) in licences and name not in LEFT_OUT
        ]
        samples.sort(key=lambda sample: (sample.tar_bytes, sample.key))
        queues.append(samples[:CROPS_PER_PHOTOGRAPH] if label in PHOTOGRAPHS else samples)
    first = [sample for queue in queues for sample in queue[:KEPT_OF_EACH_LABEL]]
    rest = [sample for queue in queues for sample in queue[KEPT_OF_EACH_LABEL:]]
    for sample in first + sorted(rest, key=lambda sample: (sample.tar_bytes, sample.key)):
        if sample.tar_bytes <= budget:
            budget -= sample.tar_bytes
            yield sample


def _split(samples: list[Planned]) -> dict[str, list[Planned]]:
    """Both halves in the order of a hash, so that neighbours are not all of one label."""
    by_label: dict[str, list[Planned]] = {}
    for sample in sorted(samples, key=lambda sample: hashlib.sha256(sample.key.encode()).digest()):
        by_label.setdefault(sample.meta["label"], []).append(sample)
    held = {sample.key for found in by_label.values() for sample in found[: max(1, round(HELDOUT_SHARE * len(found)))]}
    ordered = sorted(samples, key=lambda sample: hashlib.sha256(b"order" + sample.key.encode()).digest())
    return {
        "train": [sample for sample in ordered if sample.key not in held],
        "heldout": [sample for sample in ordered if sample.key in held],
    }


if __name__ == "__main__":
    sys.exit(main())

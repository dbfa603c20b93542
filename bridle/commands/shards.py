"""`bridle shards build|index|check|stats`."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bridle.commands import shard_stats
from bridle.commands.local_path import local_path
from bridle.data import index
from bridle.data.build import Built, build
from bridle.data.cache import ShardCache
from bridle.data.check import Decode, check_shard
from bridle.data.importers import IMPORTERS, RawDataSet, plan
from bridle.data.origin import HELDOUT
from bridle.data.patterns import expand, is_remote
from bridle.data.writer import write_index
from bridle.remote.access import shown

HELP = "build shards from a data set, index them, check them, or tell what is in them"
NAMED = 5
REPORT_SECONDS = 2.0
JOBS = 4
DECODE_SECONDS, DECODE_BYTES = 120.0, 4 << 30
"""What one window of a sample may take in a check."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="build|index|check|stats")
    making = actions.add_parser("build", help="pack a data set into tar shards")
    making.add_argument("--kind", required=True, choices=sorted(IMPORTERS), help="layout of SRC (see docs/data.md)")
    making.add_argument("src", type=local_path, help="folder of the data set")
    making.add_argument("dst", type=local_path, help="folder for the shards; a second run goes on from the first")
    making.add_argument("--shard-size", type=_positive(float), default=256.0, metavar="MB", help="10^6 bytes (256)")
    making.add_argument(
        "--samples-per-shard", type=_positive(int), metavar="N", help="close a shard after N samples too"
    )
    making.add_argument(
        "--table",
        type=local_path,
        metavar="FILE",
        help="audioset, kinetics: the CSV; imagefolder: labels of a flat folder",
    )
    making.add_argument("--split", metavar="NAME", help="imagefolder, kinetics: train, val or test")
    making.add_argument(
        "--heldout",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="keep this share, such as 0.05, apart in DST/heldout",
    )
    making.add_argument("--overwrite", action="store_true", help="replace the shards of another source in DST")
    making.add_argument("--jobs", type=_positive(int), default=JOBS, metavar="N", help=f"shards at once ({JOBS})")
    making.add_argument(
        "--part", type=_part, default=(0, 1), metavar="I/N", help="of N machines at one DST, the I-th from 0 (0/1)"
    )
    indexing = actions.add_parser("index", help="build the index, with sha256, of each shard")
    checking = actions.add_parser("check", help="read every sample and report what is wrong")
    checking.add_argument("--modality", metavar="NAME", help="also decode every sample as audio, image or video")
    telling = actions.add_parser("stats", help="mean, deviation, durations, padding, rates and kinds of the samples")
    shard_stats.add_arguments(telling)
    for action in (indexing, checking, telling):
        action.add_argument("shards", nargs="+", metavar="SHARDS", help="paths, globs, braces; s3://, https://, pipe:")
        action.add_argument("--cache", metavar="DIR", help="folder for remote shards (~/.cache/bridle)")
        action.add_argument("--cache-gb", type=_positive(float), default=50.0, metavar="GB", help="its bound (50)")


def run(args: argparse.Namespace) -> int:
    """Runs the action; 0 on success, 1 where a check finds faults."""
    return {"build": _build, "index": _index, "check": _check, "stats": shard_stats.run}[args.action](args)


def _build(args: argparse.Namespace) -> int:
    print(f"listing {args.src}", file=sys.stderr)
    found = plan(args.kind, RawDataSet(args.src, args.table, args.split))
    total, size = len(found.samples), sum(sample.size for sample in found.samples)
    unread = ", ".join(f"{count} {ending}" for ending, count in found.unread.most_common(NAMED))
    why = f" (no modality reads {unread}{', …' if len(found.unread) > NAMED else ''})" if unread else ""
    print(f"{total} samples of {size / 1e6:.1f} MB found, {found.ignored} other files left out{why}", file=sys.stderr)
    began = last = time.monotonic()

    def progress(done: Built) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= REPORT_SECONDS or done.samples == done.planned:
            seconds = max(now - began, 1e-9)
            rate, speed = (done.samples - done.kept_samples) / seconds, (done.bytes - done.kept_bytes) / 1e6 / seconds
            left = f"{(done.planned - done.samples) / rate:.0f} s left" if rate else "nothing new so far"
            share = f"{done.samples}/{done.planned} samples, {done.bytes / 1e6:.1f} MB"
            print(f"{share}, {rate:.0f}/s, {speed:.1f} MB/s, {left}", file=sys.stderr)
            last = now

    built = build(
        found,
        args.dst,
        shard_bytes=int(args.shard_size * 1e6),
        samples_per_shard=args.samples_per_shard,
        jobs=args.jobs,
        progress=progress,
        part=args.part,
        heldout=args.heldout,
        overwrite=args.overwrite,
    )
    if built.missing:
        names = ", ".join(built.missing[:NAMED]) + (", …" if len(built.missing) > NAMED else "")
        print(f"{len(built.missing)} files are missing or empty: {names} (all in {built.listed})", file=sys.stderr)
    kept = f", {built.kept_shards} of them from an earlier run" if built.kept_shards else ""
    print(f"{args.dst}: {built.shards} shards{kept}, {built.samples} samples, {built.bytes} bytes")
    words = [f"--data '{args.dst}/*.tar'"] + ([f"--heldout '{args.dst / HELDOUT}/*.tar'"] if args.heldout else [])
    print(f"train on them with {' '.join(words)}", file=sys.stderr)
    return 0


def _index(args: argparse.Namespace) -> int:
    cache = ShardCache(args.cache, args.cache_gb)
    for url in expand(args.shards):
        if is_remote(url):
            path, header = cache.index_of(url)
        else:
            path = Path(f"{url}{index.SUFFIX}")
            header = write_index(Path(url), path)
        print(f"{shown(url)}: {header.samples} samples, {header.bytes} bytes, index {path}", flush=True)
    return 0


def _check(args: argparse.Namespace) -> int:
    decode: Decode | None = None
    extensions: tuple[str, ...] = ()
    if args.modality:
        from bridle.modalities import build_modality  # brings torch, which the other actions can do without
        from bridle.modalities.isolation import isolated_windows

        modality = build_modality(args.modality, {})
        extensions = modality.extensions

        def decode(data: bytes) -> object:  # a file that crashes its decoder is a fault like any other
            return [None for _ in isolated_windows(modality, data, seconds=DECODE_SECONDS, memory_bytes=DECODE_BYTES)]

    urls = expand(args.shards)
    samples = faults = 0
    progress = _CheckProgress(len(urls))
    for number, url in enumerate(urls):
        progress.begin(number, samples)
        checked = check_shard(
            url, extensions=extensions, decode=decode, cache=args.cache, cache_gb=args.cache_gb, progress=progress
        )
        for fault in checked.faults:
            print(fault, flush=True)
        without = f", {checked.without} samples without a wanted member" if checked.without else ""
        state = f"{len(checked.faults)} faults" if checked.faults else "good"
        print(f"{checked.url}: {checked.samples} samples{without}, {checked.bytes} bytes: {state}", file=sys.stderr)
        samples, faults = samples + checked.samples, faults + len(checked.faults)
    print(f"{len(urls)} shards, {samples} samples, {faults} faults ({samples / progress.seconds:.0f} samples/s)")
    return int(faults > 0)


class _CheckProgress:
    """A line every two seconds, also in the middle of a large shard."""

    def __init__(self, shards: int) -> None:
        self.shards, self.number, self.before = shards, 0, 0
        self.began = self.last = time.monotonic()

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.began, 1e-9)

    def begin(self, number: int, samples: int) -> None:
        """Shard `number` is next; `samples` were checked before."""
        self.number, self.before = number, samples

    def __call__(self, done: int, of: int) -> None:
        if time.monotonic() - self.last < REPORT_SECONDS:
            return
        self.last = time.monotonic()
        share, samples = (self.number + done / max(of, 1)) / self.shards, self.before + done
        left = self.seconds * (1 - share) / max(share, 1e-9)
        place = f"shard {self.number + 1} of {self.shards}"
        print(
            f"{samples} samples, {place}, {samples / self.seconds:.0f}/s, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 0.5:
        raise argparse.ArgumentTypeError(f"'{text}' is not a share above 0 and at most 0.5, such as 0.05")
    return value


def _positive(number: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = number(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parse.__name__ = number.__name__  # argparse names the type in its message
    return parse


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I from 0 to N - 1, such as 0/4")
    return int(number), int(count)

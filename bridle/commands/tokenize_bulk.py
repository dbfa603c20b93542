"""`bridle tokenize MODEL_DIR SHARDS|FILES|FOLDER --out DIR`: many files to a data set that language models train on."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import Any

from bridle.errors import MistakeError
from bridle.gpus import device_index
from bridle.settings import OneRankError, RecipeError

FORMATS = ("parquet", "webdataset", "megatron", "jsonl")
LAYOUTS = ("interleaved", "delay", "coarse_first", "parallel")
MAX_PORT = 65535
_RANKS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS", ""),
)
"""Rank, number of ranks and rank on this machine, as torchrun, Slurm, MPI and Kubernetes call them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of bulk work."""
    bulk = parser.add_argument_group("with --out DIR (docs/tokens.md)")
    add_vocabulary_arguments(bulk)
    bulk.add_argument("--template", metavar="TEXT", default="{codes}", help="e.g. 'A sound of {label}: {codes}'")
    bulk.add_argument("--vocabulary", metavar="FILE", help="vocabulary.json that several modalities share")
    bulk.add_argument("--workers", metavar="N", type=_count, help="decoding processes (default: one less than cores)")
    bulk.add_argument("--batch", metavar="N", type=_positive, help="windows in a batch (default: 8; on a GPU 64)")
    bulk.add_argument("--files-per-output", metavar="N", type=_positive, default=1000, help="default: 1000")
    bulk.add_argument("--max-corrupt", metavar="SHARE", type=float, default=0.01, help="skipped (default: 0.01)")
    bulk.add_argument(
        "--lease", metavar="SECONDS", type=float, default=60.0, help="silence of a lost rank (default: 60)"
    )
    bulk.add_argument("--metrics-port", metavar="PORT", type=_count, default=0, help="Prometheus, plus the local rank")
    bulk.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: as actors of a Ray cluster")
    bulk.add_argument("--verify", action="store_true", help="check what is there, and change nothing")


def add_vocabulary_arguments(parser: argparse._ActionsContainer) -> None:
    """The options that say what the ids are."""
    parser.add_argument("--layout", choices=LAYOUTS, default="interleaved", help="order of a document's ids")
    parser.add_argument("--delays", metavar="0,1,…", type=_numbers, help="positions each codebook is moved by")
    parser.add_argument("--time-marks", metavar="SECONDS", type=float, help="put a time-mark token every so often")
    parser.add_argument("--tokenizer", metavar="T", help="text tokenizer: tokenizer.json, its folder or a hub id")
    parser.add_argument(
        "--offset", metavar="N", type=_count, default=0, help="first id (default: 0, or behind the text's)"
    )


def run(args: argparse.Namespace) -> int:
    """Does the job, or with --verify checks it.

    Raises:
        RecipeError: a wrong argument, or fewer GPUs than ranks of this machine.
        ValueError, OSError: see `bridle.tokens.bulk.prepare` and `Job.run`.
    """
    from bridle.commands.options import load_model

    rank, world, local = ranks()
    if args.device == "cuda" and local is not None:
        import torch

        if gpus := torch.cuda.device_count():  # without any, `cuda` is refused as it was written
            args.device = f"cuda:{device_index(local, gpus)}"
    model = load_model(args)
    return _verify(args, model) if args.verify else _tokenize(args, model, rank, world, local or 0)


def ranks() -> tuple[int, int, int | None]:
    """Rank, number of ranks and rank on this machine, of any launcher's environment; one rank without any.

    Raises:
        OneRankError: something else than numbers.
    """
    for names in _RANKS:
        found = [os.environ.get(name, "") for name in names]
        if not found[0]:
            continue
        if not all(value.isdigit() or not value for value in found):
            raise OneRankError(f"{', '.join(names)}: found {found}, expected numbers")
        rank = int(found[0])
        world = int(found[1]) if found[1] else rank + 1
        if not rank < world:
            raise OneRankError(f"{names[0]}={rank} is not below {names[1]}={world}")
        return rank, world, int(found[2]) if found[2] else None
    return 0, 1, None


def _settings(args: argparse.Namespace) -> Any:
    from bridle.tokens.bulk import Settings

    return Settings(
        kind=args.format,
        layout=args.layout,
        delays=args.delays,
        mark_s=args.time_marks,
        template=args.template,
        tokenizer=args.tokenizer,
        offset=args.offset,
        vocabulary=args.vocabulary,
        batch=args.batch,
        files_per_unit=args.files_per_output,
    )


def _tokenize(args: argparse.Namespace, model: Any, rank: int, world: int, local: int) -> int:
    from bridle.tokens.bulk import finish, prepare
    from bridle.tokens.job import Job
    from bridle.tokens.state import State

    if not args.inputs:
        raise RecipeError("INPUT: give shards, files or a folder to tokenize")
    if not 0 <= args.max_corrupt <= 1 or not args.lease > 0:
        raise RecipeError("--max-corrupt is a share from 0 to 1, --lease a number of seconds above 0")
    port = args.metrics_port + local if args.metrics_port else 0
    if port > MAX_PORT:
        raise OneRankError(f"--metrics-port {args.metrics_port}: with local rank {local} port {port}, above {MAX_PORT}")
    logging.basicConfig(format="bridle tokenize: %(message)s")
    logging.getLogger("bridle").setLevel(logging.INFO)
    prepared = prepare(model, args.inputs, args.out, _settings(args))
    state = State(prepared, args.max_corrupt)
    watch = _Watch(state, port)
    try:
        if args.engine == "ray":
            from bridle import ray

            source = ray.ModelSource(args.model, args.dtype, args.device)
            parts = ray.run_job(state, source, num_gpus=int(args.device.startswith("cuda")))
        else:
            job = Job(state, model, _workers(args.workers), rank, world, args.lease)
            watch.timings, job.engine.ticked = job.engine.timings, watch.tick
            parts = job.run()
    finally:
        watch.close()
    return _say(args.out, finish(prepared, parts))


class _Watch:
    """The progress line, one line for each skipped sample, and the metrics."""

    NAMED = 20

    def __init__(self, state: Any, port: int) -> None:
        from tqdm import tqdm

        from bridle.tokens.engine import Timings

        units = state.prepared.inputs.units
        samples = sum(unit.samples for unit in units)
        self.bar = tqdm(total=samples, unit="sample", file=sys.stderr, mininterval=0.5 if sys.stderr.isatty() else 10)
        self.metrics: Any = None
        if port:
            from bridle.tokens.metrics import Metrics

            self.metrics = Metrics(port, len(units), samples)
        self.state, self.timings, self.named, self.others = state, Timings(), 0, 0
        state.told = self.told

    def close(self) -> None:
        """Ends both."""
        self.bar.close()
        if self.metrics:
            self.metrics.close()

    def tick(self) -> None:
        """Samples have gone through the model, though their output is not written yet."""
        self.bar.update(self.others + self.timings.samples - self.bar.n)

    def told(self, progress: Any, part: Any) -> None:
        """See `Told`."""
        if part is None:  # not of this run: it must not count for the rate
            before, self.others = self.others, progress.samples - self.timings.samples
            self.bar.initial += max(0, self.others - before)
        self.bar.update(max(0, progress.samples - self.bar.n))
        if part is not None:
            seconds = self.bar.format_dict["elapsed"]
            self.bar.set_postfix_str(f"{progress.codes / seconds:.0f} codes/s" if seconds else "", refresh=False)
            for skip in part.skipped[: max(0, self.NAMED - self.named)]:
                self.bar.write(f"bridle tokenize: skipped {skip['key']}: {skip['reason']}", file=sys.stderr)
            self.named += len(part.skipped)
        if self.metrics:
            self.metrics.told(progress, part, self.timings)


def _verify(args: argparse.Namespace, model: Any) -> int:
    from bridle.tokens.parts import JOB, verify
    from bridle.tokens.sources import open_inputs
    from bridle.tokens.store import Store

    store = Store(args.out)
    job = store.read_json(JOB) or {}
    found = job.get("model", {}).get("sha256")
    if found != model.sha256:
        raise MistakeError(f"{store.address}: made by a model of sha256 {found}, this one has {model.sha256}")
    per_unit = job["settings"].get("files_per_unit", args.files_per_output)
    inputs = open_inputs(args.inputs, model.modality, files_per_unit=per_unit) if args.inputs else None
    faults = verify(store, inputs)
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        advice = "delete the files named under parts/ and data/, and run the same command without --verify"
        print(f"bridle tokenize: {len(faults)} faults in {args.out}; {advice}", file=sys.stderr)
        return 1
    print(f"{args.out}: everything is there, and every hash is the manifest's")
    return 0


def _say(out: str, manifest: dict[str, Any]) -> int:
    total = manifest["summary"]
    time = f" of {total['seconds'] / 3600:.2f} h" if total["seconds"] else ""
    print(
        f"{out}: {total['samples']} samples{time}, {total['codes']} codes, {total['tokens']} tokens in "
        f"{total['outputs']} outputs; {total['skipped']} skipped"
    )
    return 0


def _workers(asked: int | None) -> int:
    from bridle.cores import available_cores

    return max(1, available_cores() - 1) if asked is None else asked


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text}, expected numbers such as 0,1,1") from None


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"found {text}, expected a number, 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"found {text}, expected a number, 1 or more")
    return int(text)

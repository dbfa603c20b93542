"""`bridle probe MODEL_DIR SHARDS --labels MEMBER`: what simple readers find of labels in a model's features."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bridle.commands.local_path import local_path
from bridle.commands.options import add_model_arguments, load_model

if TYPE_CHECKING:
    from bridle.data.shards import ShardSet
    from bridle.evaluation.probe import Task
    from bridle.evaluation.probe_features import Pooled
    from bridle.model_folder import BridleModel

HELP = "score a model's embeddings and codes on labels, beside controls that have learned nothing"
FACTS = ("name", "modality", "tokenizer", "codebooks", "codebook_size", "dim", "width", "sha256")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add_model_arguments(parser)
    parser.add_argument(
        "shards",
        metavar="SHARDS",
        nargs="+",
        help="tars: paths, globs, braces, s3://…, https://…, pipe:, builtin:audio",
    )
    parser.add_argument(
        "--labels", metavar="MEMBER", required=True, help="extension of the member with labels: cls, json, json.FIELD"
    )
    parser.add_argument(
        "--group", metavar="MEMBER", help="member of what must not straddle folds, such as json.speaker"
    )
    parser.add_argument("--test", metavar="SHARDS", nargs="+", help="test on these shards, instead of in folds")
    parser.add_argument("--folds", metavar="K", type=folds_number, default=5, help="folds, 2 or more (default: 5)")
    parser.add_argument("--seed", type=whole_number, default=0, help="of folds and bootstrap draws (default: 0)")
    parser.add_argument("--fast", action="store_true", help="without the paper's linear probe, which is trained")
    parser.add_argument("--out", metavar="DIR", type=local_path, help="write probe.json and probe.html there")
    parser.add_argument("--workers", metavar="N", type=whole_number, default=1, help="decoding processes (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Prints a table and a verdict a claim; with --out, writes the figures and a page too.

    Raises:
        RecipeError: a wrong argument, no such member, too few labels.
        ModelError, ShardError: no model, no data.
        ValueError: nothing could be decoded.
    """
    from bridle.data.shards import open_shards
    from bridle.evaluation.linear_probe import paper_settings
    from bridle.evaluation.probe import figures, verdicts
    from bridle.evaluation.probe_features import comparisons
    from bridle.evaluation.probe_page import probe_page
    from bridle.files import whole_file, write_json
    from bridle.settings import RecipeError

    model = load_model(args)
    learn = open_shards(args.shards, extensions=model.modality.extensions)
    test = open_shards(args.test, extensions=model.modality.extensions) if args.test else None
    if test and (both := {shard.url for shard in learn.shards} & {shard.url for shard in test.shards}):
        raise RecipeError(f"--test: {min(both)} is among the shards to learn from as well; keep them apart")
    pooled, task, unlabelled = _measured(model, learn, test, args)
    settings = None if args.fast else paper_settings(model.config.modality, max(len(known) for known, _ in task.splits))
    found = {
        "model": {key: model.info[key] for key in FACTS},
        "shards": args.shards, "labels": args.labels, "group": args.group, "test": args.test or [],
        "folds": None if args.test else args.folds, "seed": args.seed,
        "unlabelled": unlabelled, "skipped": pooled.skipped,
    } | figures(pooled.features, comparisons(model), task, args.seed, settings)  # fmt: skip
    print(_table(found))
    print("\n".join(["", *verdicts(found)]))
    if args.out is not None:
        write_json(args.out / "probe.json", found)
        with whole_file(args.out / "probe.html") as aside:
            aside.write_text(probe_page(found), encoding="utf-8")
        print(f"written: {args.out / 'probe.json'}, {args.out / 'probe.html'}")
    return 0


def _measured(
    model: BridleModel, learn: ShardSet, test: ShardSet | None, args: argparse.Namespace
) -> tuple[Pooled, Task, int]:
    """Features of all labelled files that can be read, what is asked of them, and how many files have no label."""
    import torch

    from bridle.data.loaders import made_by_workers
    from bridle.evaluation.codebooks import Windows
    from bridle.evaluation.probe import make_task, read_labels
    from bridle.evaluation.probe_features import Feature, NumberedWindows, Pooled, control_models, pooled

    sets = [learn] if test is None else [learn, test]
    told = [read_labels(shards, args.labels, args.group) for shards in sets]
    lists = [files for files, _ in told]
    make_task(lists[0], lists[1] if test else None, args.folds, args.seed)  # a fault is found before the work
    controls = control_models(model, Windows(learn, model.modality), [file.number for file in lists[0]])
    parts: list[Pooled] = []
    for number, (shards, files) in enumerate(zip(sets, lists, strict=True)):
        windows = NumberedWindows(Windows(shards, model.modality), [file.number for file in files])
        items = made_by_workers(windows, args.workers)
        parts.append(pooled(model, controls, with_progress(items, len(files), "bridle probe")))
        readable = set(parts[-1].files)
        lists[number] = [file for file in files if file.number in readable]
    features = [
        Feature(group[0].name, [torch.cat(copies) for copies in zip(*(each.copies for each in group), strict=True)],
                group[0].scaled)
        for group in zip(*(part.features for part in parts), strict=True)
    ]  # fmt: skip
    every = Pooled([], features, [reason for part in parts for reason in part.skipped])
    task = make_task(lists[0], lists[1] if test else None, args.folds, args.seed)
    return every, task, sum(count for _, count in told)


def with_progress(items: Iterable[tuple[int, Any]], files: int, program: str) -> Iterator[tuple[int, Any]]:
    """Passes windows on, shows how many files are begun, and names the ones that are skipped."""
    from tqdm import tqdm

    from bridle.evaluation.codebooks import Skipped

    with tqdm(total=files, unit="file", file=sys.stderr, mininterval=0.5 if sys.stderr.isatty() else 10) as bar:
        for index, item in items:
            if isinstance(item, Skipped):
                tqdm.write(f"{program}: skipped {item.reason}", file=sys.stderr)
            if not item.begun if isinstance(item, Skipped) else item.first:
                bar.update()
            yield index, item


def _table(found: dict[str, Any]) -> str:
    from bridle.evaluation.probe import spelled
    from bridle.evaluation.probe_page import readers_of, score_rows

    metric, readers = found["metric"], readers_of(found)
    head = ["feature", "numbers", *(f"{reader}: {metric.replace('_', ' ')}" for reader in readers)]
    plain = metric == "balanced_accuracy"
    head += [*(f"{reader}: accuracy" for reader in readers), "linear: top-5"] if plain else []
    lines: list[Sequence[str]] = [head]
    for name, columns, scores in score_rows(found):
        cells = [name, str(columns), *(spelled(score[metric]) for score in scores)]
        if plain:
            cells += [f"{score['accuracy']['value']:.3f}" for score in scores]
            cells.append(f"{scores[0]['top_5_accuracy']['value']:.3f}")
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    left_out = f"; left out as too rare: {', '.join(found['left_out'])}" if found["left_out"] else ""
    facts = (
        f"{found['tested']} tested files of {len(found['classes'])} classes, {found['unlabelled']} without a label,"
        f" {len(found['skipped'])} unreadable{left_out}; guessing scores {found['chance']:.3f}"
    )
    return "\n".join([*rows, facts])


def whole_number(text: str) -> int:
    """0 or more."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"found {text}, expected a whole number, 0 or more")
    return int(text)


def folds_number(text: str) -> int:
    """Of --folds."""
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"found {text}, expected a whole number, 2 or more")
    return int(text)

"""`bridle study vq-vs-rq`: the paper's comparison of quantizers on your shards, as tables, figures and one page."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridle.commands.local_path import local_path
from bridle.commands.probe import folds_number, whole_number, with_progress

if TYPE_CHECKING:
    from bridle.config import Recipe
    from bridle.data.shards import ShardSet
    from bridle.evaluation.probe import Labelled
    from bridle.evaluation.probe_features import Feature
    from bridle.evaluation.study import Measured

HELP = "train and compare VQ, RQ with uniform and RQ with k-means codebooks, as the paper does"
CONTROLS = "controls.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("name", choices=["vq-vs-rq"], help="which comparison")
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="tars to train and probe on, such as builtin:audio")
    parser.add_argument("--recipe", metavar="NAME|FILE.yaml", default="audio-mini", help="(default: audio-mini)")
    parser.add_argument("--labels", metavar="MEMBER", default="json", help="member with labels (default: json)")
    parser.add_argument("--group", metavar="MEMBER", help="member of what must not straddle folds")
    parser.add_argument("--test", metavar="SHARDS", nargs="+", help="probe on these shards, instead of in folds")
    parser.add_argument("--folds", metavar="K", type=folds_number, default=5, help="folds, 2 or more (default: 5)")
    parser.add_argument("--seeds", metavar="N", type=whole_number, default=3, help="runs of each arm (default: 3)")
    parser.add_argument(
        "--share", metavar="X", type=_share, default=0.1, help="of the recipe's steps; 1: all of them (default: 0.1)"
    )
    parser.add_argument("--set", metavar="KEY=VALUE", nargs="+", default=[], help="further settings of the recipe")
    parser.add_argument(
        "--out", metavar="DIR", type=local_path, default=Path("runs/vq-vs-rq"), help="(default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Trains what is not trained yet, measures it, prints the tables; writes study.json and study.html.

    Returns:
        75 when it was asked to stop while a run trained (the same command goes on), that run's code when it failed, 2
        also where it was begun with other settings.

    Raises:
        RecipeError: a wrong argument, no such labels. ShardError: no data. ValueError: see `same_files`.
    """
    from bridle.config import load_recipe
    from bridle.data.shards import open_shards
    from bridle.evaluation.probe import make_task, read_labels
    from bridle.evaluation.study import ARMS
    from bridle.modalities import modality_class
    from bridle.settings import RecipeError

    if args.seeds < 1:
        raise RecipeError("--seeds 0: a study needs a run of each arm or more")
    recipe = load_recipe(args.recipe, args.set)
    if sum(phase.kind == "encoder" for phase in recipe.phases) != 2:
        raise RecipeError(f"recipe {args.recipe}: a study compares two iterations; give one with two encoder phases")
    extensions = modality_class(recipe.modality).extensions
    sets = [open_shards(names, extensions=extensions) for names in (args.shards, args.test) if names]
    lists = [read_labels(shards, args.labels, args.group)[0] for shards in sets]
    make_task(lists[0], lists[1] if args.test else None, args.folds, 0)  # a fault is found before the work
    jobs = [(arm, seed) for seed in range(args.seeds) for arm in ARMS]
    begun = time.monotonic()
    fresh = [job for job in jobs if not (_folder(args, *job) / "models" / "final").is_dir()]
    for number, (arm, seed) in enumerate(jobs, 1):
        left = ""
        if (arm, seed) in fresh and (done := fresh.index((arm, seed))):
            left = f"; about {(time.monotonic() - begun) / done * (len(fresh) - done) / 60:.0f} min left"
        print(f"bridle study: run {number} of {len(jobs)}: {arm}, seed {seed}{left}", flush=True)
        if code := _train(args, recipe, arm, seed):
            return code
        _measure(args, _folder(args, arm, seed), sets, lists)
    _report(args, recipe, sets, lists, jobs)
    return 0


def _folder(args: argparse.Namespace, arm: str, seed: int) -> Path:
    return Path(args.out) / f"{arm}-{seed}"


def _train(args: argparse.Namespace, recipe: Recipe, arm: str, seed: int) -> int:
    """Trains a run to its end, in processes of its own; the exit code. One that is done says so, or that it was begun
    with other settings than these."""
    from bridle.commands import launch
    from bridle.evaluation.study import arm_settings
    from bridle.ports import free_port

    folder = _folder(args, arm, seed)
    heldout = recipe.data.heldout if args.shards == recipe.data.shards else None
    command = ["--deepspeed_config", "builtin:zero1", "--recipe", args.recipe, "--run", str(folder)]
    command += ["--data", *args.shards, *(["--heldout", *heldout] if heldout else [])]
    settings = ["train.prometheus_port=0", *args.set, *arm_settings(recipe, arm, seed, args.share)]
    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    return launch.run(parser.parse_args(["--master-port", str(free_port()), "--", *command, *settings]))


def _measure(
    args: argparse.Namespace, folder: Path, sets: Sequence[ShardSet], lists: Sequence[Sequence[Labelled]]
) -> None:
    """Looks at each iteration's model of a run, and at the controls where that has not been done."""
    from bridle.evaluation.codebooks import Windows, code_norms, measure
    from bridle.evaluation.probe_features import control_models
    from bridle.evaluation.study import Measured
    from bridle.model_folder import load

    for iteration in (1, 2):
        target = folder / f"measured-{iteration}.safetensors"
        first = not (args.out / CONTROLS).is_file()
        if target.is_file() and not first:
            continue
        model = load(folder / "models" / f"iteration-{iteration}")
        windows = [Windows(shards, model.modality) for shards in sets]
        controls = control_models(model, windows[0], [file.number for file in lists[0]]) if first else []
        features, files = _pooled(model, controls, windows, lists)
        if first:
            _save_controls(args.out / CONTROLS, features)
        Measured.of(features, files, measure(model, windows[0]), code_norms(model)).save(target)


def _pooled(model: Any, controls: Sequence[Any], windows: Sequence[Any], lists: Any) -> tuple[list[Feature], list[int]]:
    """Features of the files of all sets, and their numbers, those of the second set behind those of the first."""
    import torch

    from bridle.evaluation.probe_features import Feature, NumberedWindows, pooled

    parts, files, before = [], [], 0
    for each, some in zip(windows, lists, strict=True):
        items = NumberedWindows(each, [file.number for file in some])
        parts.append(pooled(model, controls, with_progress(items, len(some), "bridle study")))
        files += [before + number for number in parts[-1].files]
        before += len(each.shards)
    features = [
        Feature(same[0].name, [torch.cat(copies) for copies in zip(*(each.copies for each in same), strict=True)])
        for same in zip(*(part.features for part in parts), strict=True)
    ]
    return features, files


def _save_controls(path: Path, features: Sequence[Feature]) -> None:
    from safetensors.torch import save_file

    from bridle.evaluation.study import RANDOM
    from bridle.files import whole_file

    copies = next(feature.copies for feature in features if feature.name == RANDOM)
    with whole_file(path) as aside:
        save_file({str(number): copy.contiguous() for number, copy in enumerate(copies)}, aside)


def _report(
    args: argparse.Namespace,
    recipe: Recipe,
    sets: Sequence[ShardSet],
    lists: Sequence[Sequence[Labelled]],
    jobs: Sequence[tuple[str, int]],
) -> None:
    """Prints the tables and writes the page."""
    from safetensors.torch import load_file

    from bridle.evaluation.linear_probe import paper_settings
    from bridle.evaluation.pictures import norms_picture
    from bridle.evaluation.probe import make_task, verdicts
    from bridle.evaluation.probe_features import Feature
    from bridle.evaluation.probe_scores import READERS
    from bridle.evaluation.study import (
        ARMS,
        RANDOM,
        Measured,
        labelled_files,
        probe_rows,
        row_name,
        same_files,
        usage_rows,
    )
    from bridle.evaluation.study_page import as_text, score_table, study_page, usage_table
    from bridle.files import whole_file, write_json

    measured: dict[tuple[str, int], list[Measured]] = {}
    for arm in ARMS:
        for iteration in (1, 2):
            paths = [_folder(args, *job) / f"measured-{iteration}.safetensors" for job in jobs if job[0] == arm]
            measured[arm, iteration] = [Measured.read(path) for path in paths]
    readable = same_files(each for copies in measured.values() for each in copies).tolist()
    controls = [Feature(RANDOM, list(load_file(args.out / CONTROLS).values()))]
    kept = labelled_files(readable, lists, [len(shards) for shards in sets])
    task = make_task(kept[0], kept[1] if args.test else None, args.folds, 0)
    settings = paper_settings(recipe.modality, max(len(known) for known, _ in task.splits))
    command = ["bridle study", args.name, *args.shards, "--recipe", args.recipe, "--seeds", str(args.seeds)]
    found: dict[str, Any] = {
        "recipe": args.recipe, "share": args.share, "seeds": list(range(args.seeds)), "commit": _commit(),
        "command": " ".join([*command, "--share", f"{args.share:g}", *(["--set", *args.set] if args.set else [])]),
        "recipe_text": (_folder(args, *jobs[-1]) / "recipe.yaml").read_text(encoding="utf-8"),
        "probe": probe_rows(measured, controls, task, 0, settings), "usage": usage_rows(measured),
    }  # fmt: skip
    pictures = [
        (row_name(*key), norms_picture(copies[0].norms, copies[0].counts, row_name(*key)))
        for key, copies in measured.items()
    ]
    tables = [as_text(score_table(found, reader)) for reader in (READERS[0], READERS[2])]
    tables += [as_text(usage_table(found)), "\n".join(verdicts(found["probe"]))]
    print("\n" + "\n\n".join(tables))
    write_json(args.out / "study.json", found)
    with whole_file(args.out / "study.html") as aside:
        aside.write_text(study_page(found, pictures), encoding="utf-8")
    print(f"written: {args.out / 'study.json'}, {args.out / 'study.html'}")


def _commit() -> str | None:
    """Of the checkout that this package lies in; none where it is installed without one."""
    place = Path(__file__).resolve().parents[2] / ".git"
    try:
        if place.is_file():  # a worktree, whose branches lie in the checkout that it belongs to
            place = Path(place.read_text(encoding="utf-8").removeprefix("gitdir:").strip())
        head = (place / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        shared = place / "commondir"
        branches = place / shared.read_text(encoding="utf-8").strip() if shared.is_file() else place
        return (branches / head.removeprefix("ref: ")).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a number above 0 and up to 1")
    return share

"""Fine-tuning's recipes: Table 5's figures, and each data set's labels from its download's own layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridle.cli import main
from bridle.config import EncoderSettings
from bridle.data.shards import open_shards
from bridle.evaluation.probe import read_labels
from bridle.finetune_recipe import BELOW, load_finetune_recipe
from bridle.modalities import build_modality
from bridle.modeling.masking import hidden_count
from bridle.recipe_files import shipped_recipes
from bridle.settings import RecipeError

TABLE_5 = {  # clips a GPU, GPUs, rate, epochs, loss, share hidden of each axis, mean, deviation
    "audioset-2m": (8, 32, 5e-4, 120, "bce", (0.2, 0.2), -4.4446096, 3.3216383),
    "audioset-20k": (8, 32, 4e-4, 150, "bce", (0.2, 0.2), -4.4446096, 3.3216383),
    "esc50": (8, 8, 2e-3, 300, "bce", (0.2, 0.2), -6.6268077, 5.358466),
    "imagenet": (32, 32, 5e-4, 200, "bce", (0.2,), 0.485, 0.229),
    "kinetics400": (32, 64, 7.5e-4, 75, "ce", (), 0.485, 0.229),
}


@pytest.mark.parametrize("name", TABLE_5)
def test_the_papers_recipes_say_what_its_table_5_says(name: str) -> None:
    clips, gpus, rate, epochs, loss, hidden, mean, deviation = TABLE_5[name]
    recipe = load_finetune_recipe(name)
    assert recipe.train.micro_batch_size == clips and recipe.train.batch_size == clips * gpus
    assert (recipe.phase.lr, recipe.phase.epochs, recipe.phase.loss) == (rate, epochs, loss)
    assert recipe.train.weight_decay == 1e-4
    modality = build_modality(recipe.modality, recipe.clip)
    first = [
        figure if isinstance(figure, float) else figure[0] for figure in (modality.settings.mean, modality.settings.std)
    ]
    assert first == [mean, deviation]
    grid = tuple(modality.grid.values())
    if len(hidden) == 2:
        seen = [side - round(side * share) for side, share in zip(grid, hidden, strict=True)]
        assert recipe.phase.mask is not None
        assert hidden_count(recipe.phase.mask, grid) == grid[0] * grid[1] - seen[0] * seen[1]
    elif hidden:
        assert recipe.phase.mask is not None and recipe.phase.mask.kind == "random"
        assert hidden_count(recipe.phase.mask, grid) == round(grid[0] * grid[1] * hidden[0])
    else:
        assert recipe.phase.mask is None
    assert (recipe.views.clips, recipe.views.crops) == ((5, 3) if name == "kinetics400" else (1, 1))


@pytest.mark.parametrize("name", shipped_recipes(BELOW))
def test_every_shipped_recipe_loads_with_its_modality(name: str) -> None:
    recipe = load_finetune_recipe(name)
    assert build_modality(recipe.modality, recipe.clip).name == recipe.modality
    assert recipe.data.heldout is None or "mini" in name


LAYOUTS: dict[str, tuple[str, list[str], dict[str, str], dict[str, list[str]]]] = {
    "audioset-2m": (
        "audioset", [],
        {"unbalanced_train_segments.csv": '# YTID, start, end, labels\n--aE2O5G5WE, 30.0, 40.0, "/m/03fwl,/m/04rlf"\n'
         '-0xyz123456, 0.0, 10.0, "/m/09x0r"\n', "--aE2O5G5WE.wav": "x", "Y-0xyz123456.wav": "y"},
        {"--aE2O5G5WE_30000": ["/m/03fwl", "/m/04rlf"], "-0xyz123456_0": ["/m/09x0r"]},
    ),
    "esc50": (
        "esc50", [],
        {"meta/esc50.csv": "filename,fold,target,category\n1-1-A-0.wav,1,0,dog\n5-9-A-49.wav,5,49,hand_saw\n",
         "audio/1-1-A-0.wav": "x", "audio/5-9-A-49.wav": "y"},
        {"1-1-A-0": ["dog"], "5-9-A-49": ["hand_saw"]},
    ),
    "imagenet": (
        "imagefolder", ["--split", "val", "--table", "LOC_val_solution.csv"],
        {"LOC_val_solution.csv": "ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1 2 3 4\n",
         "train/n01440764/n01440764_1.JPEG": "x", "val/ILSVRC2012_val_00000001.JPEG": "y"},
        {"ILSVRC2012_val_00000001": ["n01440764"]},
    ),
    "kinetics400": (
        "kinetics", ["--split", "train"],
        {"annotations/train.csv": "label,youtube_id,time_start,time_end,split\nabseiling,0347ZoDXyP0,95,105,train\n",
         "train/abseiling/0347ZoDXyP0_000095_000105.mp4": "x"},
        {"0347ZoDXyP0_000095_000105": ["abseiling"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_labels_and_folds_come_from_the_downloads_own_layout(name: str, tmp_path: Path) -> None:
    kind, options, files, wanted = LAYOUTS[name]
    root = tmp_path / "download"
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    options = [str(root / word) if word.endswith(".csv") else word for word in options]
    assert main(["shards", "build", "--kind", kind, *options, str(root), str(tmp_path / "shards")]) == 0
    recipe = load_finetune_recipe(name)
    modality = build_modality(recipe.modality, recipe.clip)
    shards = open_shards([str(tmp_path / "shards" / "*.tar")], extensions=modality.extensions)
    found, without = read_labels(shards, recipe.labels, recipe.fold_of if name == "esc50" else None)
    assert {shards.where(file.number)[1]: list(file.labels) for file in found} == wanted and not without
    if name == "esc50":
        assert sorted(file.group for file in found) == ["1", "5"]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(RecipeError, match="either fold"):
        load_finetune_recipe("audio-mini", ["fold='1'"])
    with pytest.raises(RecipeError, match=r"did you mean .esc50"):
        load_finetune_recipe("esc-50")
    with pytest.raises(RecipeError, match=r"encoder.size 'huge' is unknown"):
        load_finetune_recipe("audio-mini", ["encoder.size=huge"])
    tiny = load_finetune_recipe("audio-mini", ["encoder.size=tiny", "encoder.class_token=false"]).encoder
    assert tiny == EncoderSettings(width=96, depth=4, heads=3, class_token=False)

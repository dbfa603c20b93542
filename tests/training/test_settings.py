"""Wrong settings are refused in one line that says what was meant; nothing is ignored."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from launching import ROOT, TINY, command, environment, pretrain
from warm import run_warm

from bridle import pretrain as door
from bridle.config import TrainSettings, load_recipe
from bridle.data.order import SampleOrder
from bridle.evaluation.run_folder import read_run
from bridle.modalities import build_modality
from bridle.recipe_files import shipped_recipes
from bridle.seeds import SeedPart, Shuffle, phase_seed
from bridle.settings import RecipeError
from bridle.training.engine import learning_rate, resolve_ds_config, split_batch, uses_bf16
from bridle.training.loop import Length
from bridle.training.run_folder import check_same_recipe, read_run_recipe
from bridle.training.status import look


def refused(capsys, *arguments: str) -> str:
    assert door.main(["--deepspeed_config", "ds_configs/zero2.json", *arguments]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--recipe", "audoi-mini"], "did you mean 'audio-mini'?"),
        (["--recipe", "nowhere.yaml"], "no such file"),
        (["train.bach_size=8"], "did you mean 'batch_size'?"),
        (["model.encoder.widht=8"], "did you mean 'width'?"),
        (["phases.1.epoch=3"], "did you mean 'epochs'?"),
        (["train.batch_size=many"], "train.batch_size"),
        (["phases.7.lr=1"], "no position in a list of 4"),
        (["phases.².lr=1"], "'²' is no position in a list of 4"),
        (["nonsense"], "expected dotted.key=value"),
        (["model.encoder.heads=5"], "does not divide width"),
        (["phases.1.epochs=3"], "either epochs or steps"),
        (["phases.0.kind=encoder", "phases.0.lr=1", "phases.0.steps=1"], "begin with cold_start"),
        (["model.quantizer.norm=always"], "model.quantizer.norm"),
        (['data.sources=[{"kind": "shards", "shards": ["a.tar", 3]}]'], "'data.sources.0.shards.1'"),
        (["phases=[{kind: cold_start, epochs: 1, lr: x}]"], "'phases.0.lr'"),
        (["phases.1.steps=null", "phases.1.epochs=.inf"], "'phases.1.epochs' = inf: Input should be a finite number"),
        (["phases.1.lr=.inf"], "'phases.1.lr' = inf"),
        (["train.betas=[0.9, 1.5]"], "'train.betas.1' = 1.5: Input should be less than 1"),
        (["train.collective_timeout=1.0e+30"], "'train.collective_timeout' = 1e+30: Input should be less than"),
        (["phases.1.soft_codes=100000"], "phases.1.soft_codes 100000 is more than the"),
        (["seed=1000000000000000"], "'seed' = 1000000000000000: Input should be less than 900000000000000"),
        (["model.size=[tiny]"], "did you mean 'tiny'?"),
    ],
)
def test_a_wrong_argument_is_one_clear_line(capsys, arguments, expected):
    assert expected in refused(capsys, *arguments)


def test_a_string_is_no_boolean():
    settings = {**load_recipe("audio-mini").clip, "roll": "perhaps"}
    with pytest.raises(RecipeError, match="roll"):
        build_modality("audio", settings)


def test_a_modality_refuses_unknown_keys_too():
    with pytest.raises(RecipeError, match="did you mean 'seconds'"):
        build_modality("audio", {"secnods": 3})


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_with_its_modality(name):
    recipe = load_recipe(name)
    clip = {key: value for key, value in recipe.clip.items() if value != "auto"}  # which a run replaces first
    assert build_modality(recipe.modality, clip).name == recipe.modality


def test_a_recipe_that_is_no_text_is_named(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"modality: \xff\xfe")
    assert "mine.yaml: not a text in UTF-8" in refused(capsys, "--recipe", str(tmp_path / "mine.yaml"))


def test_a_rank_that_is_no_number_is_named(tmp_path):
    variables = [{"RANK": "first", "WORLD_SIZE": "1"}]
    done = run_warm(command(tmp_path / "run"), env=environment(), cwd=ROOT, ranks=variables)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the environment's RANK is 'first'; expected a whole number" in done.stderr


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_deepspeed_file_that_is_no_json_object_is_named(tmp_path, capsys, text):
    file = tmp_path / "ds.json"
    file.write_text(text)
    assert door.main(["--deepspeed_config", str(file)]) == 2
    assert str(file) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"fp16": {"enabled": true}}', "use bf16.enabled"),
        ('{"zero_optimization": {"stge": 2}}', "DeepSpeed does not take it"),
    ],
)
def test_a_deepspeed_file_that_cannot_be_trained_with_is_refused(tmp_path, text, said):
    file = tmp_path / "ds.json"
    file.write_text(text)
    done = pretrain(tmp_path / "run", config=str(file), check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


TRAIN = TrainSettings(batch_size=16, micro_batch_size=4)


@pytest.mark.parametrize(
    ("given_config", "expected"),
    [
        ({"train_batch_size": 32}, "train_batch_size = 32 conflicts with the recipe's train.batch_size"),
        ({"train_micro_batch_size_per_gpu": 8}, "train.micro_batch_size"),
        ({"gradient_clipping": 5.0}, "train.gradient_clipping"),
        ({"optimizer": {"type": "Adam"}}, "'optimizer' conflicts"),
        ({"scheduler": {"type": "WarmupLR"}}, "'scheduler' conflicts"),
        ({"bf16": {"enabled": True}}, "stage to 1"),
        ({"bf16": {"enabled": "auto"}}, 'bf16.enabled = "auto": expected true or false'),
        ({"bfloat16": {"enabled": True}}, "write that section as bf16"),
        ({"zero_optimization": {"stage": "3"}}, 'zero_optimization.stage = "3": expected 0, 1, 2 or 3'),
        ({"zero_optimization": 2}, "zero_optimization = 2: expected an object"),
        ({"bf16": None}, "bf16 = null: expected an object"),
    ],
)
def test_what_recipe_and_deepspeed_both_name_is_a_conflict_that_names_both(given_config, expected):
    with pytest.raises(RecipeError, match=r"my\.json") as error:
        resolve_ds_config(given_config, "my.json", TRAIN, world=2)
    assert expected in str(error.value)


def test_the_recipe_fills_what_deepspeed_leaves_open():
    filled = resolve_ds_config({"train_batch_size": "auto", "zero_optimization": {"stage": 1}}, "x", TRAIN, world=2)
    assert (filled["train_batch_size"], filled["train_micro_batch_size_per_gpu"]) == (16, 4)
    assert filled["gradient_accumulation_steps"] == 2
    assert not uses_bf16(filled)
    assert uses_bf16({"torch_autocast": {"enabled": True}})
    # DeepSpeed's timer would wait for the device in every micro-step, unless it is asked for.
    assert filled["timers"] == {"throughput": {"enabled": False}}
    asked = {"throughput": {"enabled": True}}
    assert resolve_ds_config({"timers": asked}, "x", TRAIN, world=2)["timers"] == asked


def test_compiled_blocks_and_weights_gathered_inside_them_exclude_each_other():
    compiled = TRAIN.model_copy(update={"compile": True})
    with pytest.raises(RecipeError, match=r"ZeRO stage 3 .* take a lower stage, or train\.compile=false"):
        resolve_ds_config({"zero_optimization": {"stage": 3}}, "my.json", compiled, world=2)
    resolve_ds_config({"zero_optimization": {"stage": 2}}, "my.json", compiled, world=2)


@given(st.integers(1, 64), st.integers(1, 8), st.one_of(st.none(), st.integers(1, 16)))
def test_a_batch_is_split_without_a_rest_or_refused(batch_size, world, micro):
    train = TrainSettings(batch_size=batch_size, micro_batch_size=micro)
    try:
        size, steps = split_batch(train, world)
    except RecipeError:
        assert batch_size % world or (batch_size // world) % min(micro or batch_size, batch_size // world)
    else:
        assert size * steps * world == batch_size


@given(st.integers(1, 500), st.integers(0, 100), st.floats(1e-6, 1.0))
def test_the_learning_rate_rises_to_its_peak_and_falls_towards_zero(total, warmup, peak):
    warmup = min(warmup, total)
    rates = [learning_rate(peak, step, warmup, total) for step in range(total)]
    assert all(a < b for a, b in itertools.pairwise(rates[:warmup]))
    assert all(a >= b for a, b in itertools.pairwise(rates[warmup:]))
    assert max(rates) <= peak * (1 + 1e-9)
    assert rates[min(warmup, total - 1)] == pytest.approx(peak) or warmup == total


def test_epochs_count_clips():
    phase = load_recipe("audio").phases[1]
    length = Length.of(phase, samples=1_738_788 + 18_685, batch_size=1024)
    assert length.total == math.ceil(130 * 1_757_473 / 1024)
    assert length.warmup == math.ceil(10 * 1_757_473 / 1024)


def test_the_audio_recipe_is_table_5():
    recipe = load_recipe("audio")
    cold, first, tokenizer, second = recipe.phases
    assert cold.kind == "cold_start"
    assert (
        (first.epochs, first.lr, first.warmup_epochs)
        == (130, 5e-4, 10)
        == (second.epochs, second.lr, second.warmup_epochs)
    )
    assert (tokenizer.epochs, tokenizer.lr, tokenizer.warmup_epochs) == (30, 2e-4, 2)
    quantizer = recipe.model.quantizer
    assert (quantizer.codebooks, quantizer.codebook_size, quantizer.dim, quantizer.decay) == (4, 256, 256, 0.99)
    assert (quantizer.init, quantizer.kmeans_iterations, quantizer.reset_threshold) == ("kmeans", 10, 1)
    assert (recipe.mask.kind, recipe.mask.ratio) == ("random", 0.8)
    assert (recipe.train.weight_decay, recipe.train.betas) == (1e-4, (0.9, 0.95))
    assert recipe.train.batch_size == 16 * 8 * 8
    clip = build_modality("audio", recipe.clip).settings
    assert (clip.mean, clip.std, clip.frames) == (-4.4446096, 3.3216383, 1024)


def test_the_tiny_recipe_of_these_tests_is_itself_valid():
    assert load_recipe(str(TINY)).train.batch_size == 8


MAY_CHANGE = {
    "data.workers=1": True,
    "data.cache=elsewhere": True,
    "data.heldout=[elsewhere.tar]": False,
    "train.compile=true": True,
    "train.micro_batch_size=1": True,
    "train.batch_size=2": False,
    "phases.1.lr=0.5": False,
    "mask.ratio=0.5": False,
}


@pytest.mark.parametrize("change", MAY_CHANGE)
def test_a_resumed_run_may_have_other_values_of_what_changes_no_result(change, tmp_path):
    begun = load_recipe("audio-mini", ["data.shards=[here.tar]"])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(begun.model_dump(mode="json")))
    now = load_recipe("audio-mini", ["data.shards=[here.tar]", change])
    if MAY_CHANGE[change]:
        check_same_recipe(tmp_path, now)
    else:
        with pytest.raises(RecipeError, match=change.partition("=")[0]):
            check_same_recipe(tmp_path, now)
    check_same_recipe(tmp_path, load_recipe("audio-mini", ["data.shards=[moved.tar]"]), other_names=True)
    with pytest.raises(RecipeError, match=r"data\.shards"):
        check_same_recipe(tmp_path, load_recipe("audio-mini", ["data.shards=[moved.tar]"]))


@pytest.mark.parametrize("text", ["phases: [", "- a list\n", ""])
def test_a_damaged_recipe_of_a_run_is_told_alike_by_all_who_read_it(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    for reader in (read_run, read_run_recipe, lambda run: look(str(run))):
        with pytest.raises(RecipeError, match=r"recipe\.yaml: (not valid YAML|found .*, expected a mapping)"):
            reader(tmp_path)


def test_the_largest_seed_is_one_to_draw_with():
    largest = phase_seed(load_recipe("audio-mini", ["seed=899999999999999"]).seed, 999, max(SeedPart))
    torch.Generator().manual_seed(largest)
    SampleOrder([8], largest, 2, 2).locate(9)


def test_no_two_parts_of_a_run_share_a_seed():
    runs = itertools.product(range(3), range(12), SeedPart)
    assert len({phase_seed(*each) for each in runs}) == 3 * 12 * len(SeedPart)
    assert len(set(Shuffle)) == 4

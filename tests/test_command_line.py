"""The `bridle` command as somebody meets it on the first day: quick, and it says what was meant."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bridle import __version__
from bridle.cli import main
from bridle.config import load_recipe
from bridle.settings import RecipeError


def test_version_is_printed_without_importing_what_takes_long() -> None:
    code = "import sys; from bridle.cli import main; main(['--version']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, modules = done.stdout.splitlines()
    assert version == f"bridle {__version__}"
    heavy = {"torch", "numpy", "deepspeed", "fastapi", "matplotlib", "requests", "bridle.commands"}
    assert not heavy & set(modules.split())


def test_a_mistake_in_a_recipe_is_told_before_what_takes_long_is_imported() -> None:
    code = "import sys; from bridle.{0} import main; main({1}); print(*sys.modules)"
    given = ["--deepspeed_config", "builtin:zero2", "--recipe", "audio-mini", "train.batch_sise=8"]
    for program in ("pretrain", "finetune"):
        command = [sys.executable, "-c", code.format(program, given)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "did you mean 'batch_size'" in done.stderr
        assert not {"torch", "deepspeed"} & set(done.stdout.split())


@pytest.mark.parametrize(("word", "meant"), [("tokenise", "tokenize"), ("shard", "shards"), ("server", "serve")])
def test_a_misspelt_command_is_answered_with_what_was_meant(
    word: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word, "x", "y"]) == 2
    assert capsys.readouterr().err == f"bridle: error: command '{word}' is unknown; did you mean '{meant}'?\n"


def test_a_fault_of_a_whole_section_names_no_key_that_is_none() -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe("audio-mini", ["phases=[{kind: encoder, steps: 1, lr: 0.1}]"])
    assert "whole" not in str(raised.value)
    assert str(raised.value).startswith("recipe audio-mini: phases.0 is an encoder phase without a tokenizer before it")


def test_settings_of_a_recipe_may_follow_options(capfd: pytest.CaptureFixture[str]) -> None:
    for words in (["bench", "audio-mini", "--rounds", "1", "train.batch_sise=8"],
                  ["finetune", "builtin:image", "--scratch", "train.batch_sise=8"]):  # fmt: skip
        assert main(words) == 2
        assert "did you mean 'batch_size'" in capfd.readouterr().err


def test_what_is_missing_is_named_and_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench"])
    assert capsys.readouterr().err.endswith("bridle bench: error: the following arguments are required: RECIPE\n")

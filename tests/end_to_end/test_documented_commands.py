"""What README and docs tell people to type: every command line is one the programs take, and README's path works."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from importlib import resources
from pathlib import Path

import pytest

from bridle import finetune
from bridle.cli import COMMANDS
from bridle.config import load_recipe
from bridle.finetune_recipe import load_finetune_recipe
from bridle.pretrain import overrides, parse
from bridle.recipe_files import shipped_recipes

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = re.compile(r"(deepspeed|torchrun|srun|bridle)\b")
OTHERS = re.compile(r"(make|pip|uv|docker|kubectl|curl|promtool|python3?|docker/\S+\.(?:sh|py))\s")
"""Programs of others that README and docs have people type, without those that cannot be asked without being run."""
PHASES = "{kind: cold_start}, {kind: encoder, steps: 2, lr: 0.001}, {kind: tokenizer, steps: 2, lr: 0.001}"
SHORT = [
    "model={size: tiny, encoder: {depth: 1}, quantizer: {codebooks: 2, codebook_size: 16, dim: 16}}", "clip.seconds=1",
    "train.batch_size=4", "train.micro_batch_size=null", "train.evaluate_clips=8", "train.prometheus_port=0",
    "data.workers=0", f"phases=[{PHASES}, {{kind: encoder, steps: 2, lr: 0.001}}]",
]  # fmt: skip
"""What makes the paper's recipe a matter of seconds; everything else stays as README has it."""


def documented(page: Path, programs: re.Pattern[str] = OURS) -> list[str]:
    """The command lines of a page's blocks that are not in another language, without comments."""
    blocks = re.findall(r"^```(\S*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    shell = [block for language, block in blocks if language in ("", "bash", "sh")]
    lines = [line for block in shell for line in block.replace("\\\n", " ").splitlines()]
    return [re.sub(r"\s+# .*$", "", line).strip() for line in lines if programs.match(line)]


LINES = [(page.name, line) for page in PAGES for line in documented(page)]
OTHER_LINES = [(page.name, line) for page in PAGES for line in documented(page, OTHERS)]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line[:60]}" for page, line in LINES])
def test_every_documented_command_line_is_one_that_the_programs_take(page: str, line: str) -> None:
    line = re.sub(r"\[--[^\]]*\]|\[dotted[^\]]*\]|\.\.\.|…", "", line).rstrip(" &")  # what a synopsis leaves open
    words = shlex.split(line)
    if words[0] == "bridle" and words[1] != "launch":
        assert words[1] in COMMANDS
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(f"bridle.commands.{words[1].replace('-', '_')}").add_arguments(parser)
        parser.parse_args(words[2:])
        return
    doors = ("bridle/pretrain.py", "bridle.pretrain", "bridle/finetune.py")
    marks = [i for i, word in enumerate(words) if word.endswith(doors) or word == "--"]
    given = words[marks[-1] + 1 :]
    needed = [] if "--deepspeed_config" in given else ["--deepspeed_config", "ds_configs/zero2.json"]
    if "--finetune" in words or any(word.endswith("finetune.py") for word in words):
        load_finetune_recipe(finetune.parse([*given, *needed]).recipe)
        return
    args = parse([*given, *needed])
    recipe = args.recipe if args.recipe in shipped_recipes() else "audio-mini"
    load_recipe(recipe, [word for word in overrides(args) if "--" not in word])
    config = args.deepspeed_config
    assert config == "FILE" or config.startswith("builtin:") or (ROOT / config).is_file()


@pytest.mark.parametrize(("page", "line"), OTHER_LINES, ids=[f"{page}: {line[:60]}" for page, line in OTHER_LINES])
def test_every_documented_line_of_another_program_is_one_that_it_takes(page: str, line: str, tmp_path: Path) -> None:
    """Without doing it: its own parser, a dry run, or a rendering; and the files of ours that it names are there."""
    words = shlex.split(re.sub(r"\$\([^)]*\)", "X", line).rstrip(" &"))
    ours = {path.name for path in ROOT.iterdir()} - {"runs"}  # somebody's work, where it is there
    named = [word for word in words if word.split("/")[0] in ours]
    assert [word for word in named if not (ROOT / word).exists()] == []
    (tmp_path / "keys.txt").write_text("a key")
    where = tmp_path if "--from-file" in words else ROOT
    dry = dry_run(words)
    if dry is None:
        return  # a script of ours, compose (see test_images.py), a tool that is not here: its files are there
    done = subprocess.run(dry, cwd=where, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]


def dry_run(words: list[str]) -> list[str] | None:
    """The same line so that its program does nothing but judge it."""
    program = Path(sys.executable).parent / words[0] if words[0] in ("pip", "uv") else shutil.which(words[0])
    if program is None or "/" in words[0] or words[0].startswith("python") or words[:2] == ["docker", "compose"]:
        return None
    if words[0] == "make":
        return ["make", "--dry-run", *words[1:]]
    if words[:2] == ["kubectl", "apply"]:
        return ["kubectl", "kustomize", words[words.index("-k") + 1]]
    if "secret" in words:
        return [*words, "--dry-run=client"]
    if words[0] == "docker":  # behind an image, all words are the container's
        return [*words[:2], "--help", *words[2:]]
    return [str(program), *words[1:], "--help"]


def readme(beginning: str) -> str:
    (line,) = [line for line in documented(ROOT / "README.md") if line.startswith(beginning)]
    return line


def type_in(line: str, where: Path, *more: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as with the environment active
    variables = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = " ".join([line, *map(shlex.quote, more)])
    done = subprocess.run(
        ["bash", "-ec", command], cwd=where, env=variables, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, command + done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_readmes_path_for_a_folder_of_ones_own_sounds_ends_with_a_report_of_heldout_clips(tmp_path: Path) -> None:
    for name in ("bridle", "ds_configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    sample = resources.files("bridle") / "data" / "sample" / "audio-train-0000.tar"
    with sample.open("rb") as file, tarfile.open(fileobj=file) as tar:
        for member in tar:
            if not member.name.endswith(".json"):
                target = tmp_path / "SOUNDS" / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    type_in(readme("bridle shards build"), tmp_path)
    type_in(readme("bridle shards stats"), tmp_path)
    train = readme("deepspeed bridle/pretrain.py --deepspeed_config ds_configs/zero1_bf16.json")
    train = train.replace("deepspeed ", "python ").replace("_bf16", "")  # the launcher has tests of its own
    told = type_in(train, tmp_path, *SHORT).stdout
    assert "no held-out clips" not in told and "held out" in told
    type_in(readme("bridle export").replace("runs/audio-mini", "runs/mine"), tmp_path)
    type_in("python examples/one_clip.py builtin:audio-heldout 12 clip.ogg", tmp_path)
    assert '"codes"' in type_in(readme("bridle tokenize model clip.ogg"), tmp_path).stdout
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    type_in(f"python -c {shlex.quote(code)}", tmp_path)
    type_in(readme("bridle report"), tmp_path)
    page = (tmp_path / "runs" / "mine" / "report.html").read_text()
    assert page.count("<audio ") == 3 and "Held-out clips" in page

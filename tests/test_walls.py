"""The walls between the rooms, and the habits that keep the house safe, read from the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FILE = 400
BELOW = {
    "errors": set(),
    "seeds": set(),
    "settings": set(),
    "config": {"settings", "recipe_files"},
    "recipe_files": {"settings"},
    "finetune_arguments": set(),
    "finetune_recipe": {"config", "recipe_files", "settings"},
    "classifier": {
        "model",
        "model_folder",
        "folder_config",
        "config",
        "settings",
        "files",
        "modalities",
        "modeling",
        "hub",
    },
    "files": set(),
    "home": {"settings"},
    "cores": set(),
    "gpus": {"settings"},
    "ports": set(),
    "recipes": set(),
    "processes": set(),
    "remote": {"settings"},
    "modeling": {"config", "settings"},
    "modalities": {"config", "settings", "processes"},
    "data": {"config", "settings", "processes", "files", "home", "remote", "modalities.clip"},
    "hub": set(),
    "model_card": set(),
    "folder_config": {"config", "settings", "files"},
    "model": {"folder_config", "config", "settings", "modalities", "modeling"},
    "model_folder": {
        "model",
        "folder_config",
        "config",
        "settings",
        "files",
        "modalities",
        "modeling",
        "hub",
        "model_card",
    },
    "tokens": {
        "model",
        "config",
        "settings",
        "processes",
        "files",
        "remote",
        "modalities",
        "modeling",
        "data",
        "model_folder",
    },
    "evaluation": {
        "model",
        "recipe_files",
        "config",
        "settings",
        "processes",
        "files",
        "modalities",
        "modeling",
        "data",
        "model_folder",
        "classifier",
        "finetune_recipe",
        "tokens",
    },
    "training": {
        "model",
        "gpus",
        "ports",
        "recipe_files",
        "processes",
        "config",
        "settings",
        "files",
        "remote",
        "modalities",
        "modeling",
        "data",
        "model_folder",
        "classifier",
        "finetune_recipe",
        "hub",
        "tokens",
        "evaluation",
    },
    "measuring": {"config", "settings", "modalities", "modeling", "data", "model_folder", "training"},
    "serving": {
        "hub",
        "model",
        "classifier",
        "folder_config",
        "processes",
        "config",
        "settings",
        "files",
        "modalities",
        "modeling",
        "data",
        "model_folder",
        "tokens",
        "evaluation",
        "cores",
    },
    "diagnostics": {"config", "settings", "cores"},
    "client": set(),
}
"""What each room may import besides itself. The doors (cli, pretrain, commands) may import every room."""
SERVING = {"workers": set(), "engine": {"workers"}, "web": {"engine"}}
"""What each of the service's rooms may import of the others."""
SERVING_TOOLS = {"settings", "logs", "metrics", "tracing"}
"""What all of them may use."""
PROCESS_LIBRARIES: dict[str, set[str]] = {
    "multiprocessing": set(),
    "subprocess": {"bridle/data/fetch.py"},  # `pipe:` shards are a shell's command
    "mmap": set(),
}
"""Libraries of `bridle/processes`, and the files elsewhere that have another use for them."""
DOORS = {"cli", "pretrain", "finetune", "commands", "ray", "hf", "hear"}
ONLY_IN = {
    "deepspeed": {"training", "diagnostics"},
    "fastapi": {"serving"},
    "starlette": {"serving"},
    "uvicorn": {"serving"},
    "tensorboard": {"training"},
    "webdataset": {"data", "tokens"},
    "fsspec": {"remote"},
    "aiohttp": {"remote"},
    "av": {"modalities", "diagnostics"},
    "decord": {"modalities", "diagnostics"},
    "soundfile": {"modalities", "diagnostics"},
    "ray": {"ray"},
    "transformers": {"hf", "measuring"},
    "tokenizers": {"tokens"},
}
"""Libraries that one room is there to hide."""


def sources(*folders: str) -> list[Path]:
    found = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert found
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(dotted: str) -> str:
    """`bridle.data.stream` is in `data`, `serving.web.app` in `serving`; the package itself is ``""``."""
    top, _, rest = dotted.partition(".")
    return "serving" if top == "serving" else rest.partition(".")[0]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported anywhere in a file; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import; write the whole name"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def allowed(room: str, imported: str) -> bool:
    target = room_of(imported)
    if target in {room, "__version__", "load", "errors", "seeds"} or room in DOORS or room == "":
        return True
    inside = imported.split(".", 1)[1]
    return any(inside == wall or inside.startswith(f"{wall}.") for wall in BELOW[room])


def calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def keyword(call: ast.Call, name: str) -> object:
    return next((ast.literal_eval(word.value) for word in call.keywords if word.arg == name), None)


def test_imports_run_only_downwards() -> None:
    wrong = []
    for path in sources("bridle", "serving"):
        room = room_of(module_of(path))
        assert room in BELOW.keys() | DOORS | {"", "__init__"}, (
            f"{name_of(path)}: a new room; say in BELOW what it knows"
        )
        for line, imported in imports(path):
            if imported.split(".")[0] in {"bridle", "serving"} and not allowed(room, imported):
                wrong.append(f"{name_of(path)}:{line}: {room} must not know {imported}")
    assert not wrong, "\n".join(wrong)


def test_the_service_has_three_rooms_and_only_looks_down() -> None:
    wrong = []
    for path in sources("serving"):
        room = module_of(path).split(".")[1] if len(path.relative_to(ROOT).parts) > 2 else "top"
        assert room in SERVING.keys() | {"top"}, f"{name_of(path)}: a new room; say in SERVING what it knows"
        for line, imported in imports(path):
            parts = imported.split(".")
            if room != "top" and parts[0] == "serving" and parts[1] not in {*SERVING[room], room, *SERVING_TOOLS}:
                wrong.append(f"{name_of(path)}:{line}: {room} must not know {imported}")
            if room != "web" and room != "top" and parts[0] in {"fastapi", "starlette", "uvicorn", "python_multipart"}:
                wrong.append(f"{name_of(path)}:{line}: {room} must know no HTTP")
            if path.stem in SERVING_TOOLS and parts[0] == "serving" and parts[1] in SERVING:
                wrong.append(f"{name_of(path)}:{line}: {path.stem} must know no room")
    assert not wrong, "\n".join(wrong)


def test_one_room_starts_processes_and_shares_memory() -> None:
    wrong = [
        f"{name_of(path)}:{line}: {imported} belongs to bridle/processes"
        for path in sources("bridle", "serving")
        for line, imported in imports(path)
        if imported.split(".")[0] in PROCESS_LIBRARIES and room_of(module_of(path)) != "processes"
        if name_of(path) not in PROCESS_LIBRARIES[imported.split(".")[0]]
    ]
    wrong += [
        f"{name_of(path)}:{call.lineno}: {function}"
        for path in sources("bridle", "serving")
        if room_of(module_of(path)) not in {"processes", *DOORS}
        for call, function in calls(path)
        if function in {"os.fork", "os.forkpty", "os.posix_spawn", "os.memfd_create", "os.system", "socket.socketpair"}
        or function.startswith(("os.exec", "os.spawn"))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_room_uses_the_private_names_of_another_module() -> None:
    wrong = [
        f"{name_of(path)}:{line}: {imported}"
        for path in sources("bridle", "serving")
        for line, imported in imports(path)
        if imported.startswith(("bridle.", "serving.")) and imported.rpartition(".")[2].startswith("_")
        if not imported.endswith("__version__")
    ]
    assert not wrong, "\n".join(wrong)


def test_libraries_stay_in_the_room_that_hides_them() -> None:
    wrong = [
        f"{name_of(path)}:{line}: {imported} belongs to {', '.join(ONLY_IN[imported.split('.')[0]])}"
        for path in sources("bridle", "serving")
        for line, imported in imports(path)
        if room_of(module_of(path)) not in ONLY_IN.get(imported.split(".")[0], {room_of(module_of(path))})
    ]
    assert not wrong, "\n".join(wrong)


def test_loading_a_model_imports_no_training_code() -> None:
    script = "import sys, bridle; bridle.load; import bridle.model_folder; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    loaded = done.stdout.split()
    assert "bridle.model_folder" in loaded
    assert not [name for name in loaded if name.split(".")[0] == "deepspeed" or name.startswith("bridle.training")]


def test_the_services_own_process_imports_no_model() -> None:
    """Its children do; here that would be seconds of each start, and memory for nothing."""
    script = "import sys, serving.run; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    loaded = done.stdout.split()
    assert "serving.engine.deployment" in loaded
    assert not {"torch", "timm", "torchvision"} & set(loaded)


@pytest.mark.parametrize("folder", ["bridle", "serving"])
def test_nothing_shadows_the_standard_library(folder: str) -> None:
    """`deepspeed bridle/pretrain.py` puts bridle/ first on the path, where its files would stand in for Python's."""
    names = {path.stem for path in (ROOT / folder).iterdir() if path.is_dir() or path.suffix == ".py"}
    assert not names & sys.stdlib_module_names


def test_the_map_is_the_tree() -> None:
    chart = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
    named = set(re.findall(r"[\w./-]+", chart))
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    there = [Path(name).parts for name in listed if name]
    top = {parts[0] for parts in there if len(parts) > 1}
    rooms = {parts[1] for parts in there if parts[0] in {"bridle", "serving"} and len(parts) == 3}
    files = {parts[1] for parts in there if parts[0] == "bridle" and len(parts) == 2} - {"__init__.py", "py.typed"}
    assert not {name for name in top | rooms if f"{name}/" not in chart}
    assert not {name for name in files if not {name, f"{name}/", f"bridle/{name}"} & named}
    paths = {name for name in named if name.endswith((".py", "/")) and name.strip("/.")}
    assert not {name for name in paths if not any((ROOT / at / name).exists() for at in ("", "bridle", "tests"))}


def test_files_stay_short() -> None:
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in sources("bridle", "serving", "tests")}
    assert not {name_of(path): count for path, count in lines.items() if count > LONGEST_FILE}


def test_nothing_from_outside_is_unpickled_or_run() -> None:
    wrong = []
    for path in sources("bridle", "serving", "benchmarks", "examples", "tools"):
        for line, imported in imports(path):
            if imported.split(".")[0] in {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}:
                wrong.append(f"{name_of(path)}:{line}: import {imported}")
        for call, function in calls(path):
            unsafe = (
                (function == "torch.load" and keyword(call, "weights_only") is not True)
                or function in {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}
                or (function in {"np.load", "numpy.load"} and keyword(call, "allow_pickle"))
            )
            if unsafe:
                wrong.append(f"{name_of(path)}:{call.lineno}: {ast.unparse(call)}")
    assert not wrong, "\n".join(wrong)


def test_tracked_files_name_no_machine_and_no_registry() -> None:
    folders = "|".join(("work", "root", "home", "Users"))
    hosts = "|".join(("pypi", "pythonhosted", "npmjs", "download.pytorch", "deb.debian", "ghcr"))
    forbidden = re.compile(
        r"(?<![\w.\-})])/(?:" + folders + r")/\w|/opt/(?:wheels|pypi)|\b(?:" + hosts + r")\.(?:org|com|io)\b"
    )
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    wrong = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if not path.is_file() or b"\0" in path.read_bytes()[:4096]:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if found := forbidden.search(line):
                wrong.append(f"{name}:{number}: {found.group()}")
    assert not wrong, "\n".join(wrong)

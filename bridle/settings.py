"""Settings that refuse what they do not know, and say what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from bridle.errors import MistakeError


class MayChange:
    """Beside a setting: it changes neither the order of the data nor the mathematics, so a resumed run may have another
    value. ``Annotated[int, MayChange()]``."""


class JudgedByContent:
    """Beside a setting that names data: what it leads to is compared (see `BegunWith`), so that it may be moved."""


class Settings(BaseModel):
    """Base of all settings: immutable, keyword-only, unknown keys and numbers that are not finite refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


class RecipeError(MistakeError):
    """A recipe or an override that cannot be honoured; the message says where, what and what to do."""


class OneRankError(RecipeError):
    """What a rank may meet alone, of its own place: each tells it, not just the first of a machine."""


SettingsT = TypeVar("SettingsT", bound=Settings)


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for an unknown word, or the list of known ones when nothing is near."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"


def parse_settings(cls: type[SettingsT], mapping: Mapping[str, Any], where: str) -> SettingsT:
    """Builds settings from plain data.

    Raises:
        RecipeError: one line per fault, naming `where`, the key, what was found and what was expected.
    """
    try:
        return cls.model_validate(dict(mapping))
    except ValidationError as error:
        lines = [_explain(cls, detail, where) for detail in error.errors()]
        raise RecipeError("\n".join(dict.fromkeys(lines))) from None


def _explain(cls: type[Settings], detail: Any, where: str) -> str:
    loc = detail["loc"]
    path = [part for i, part in enumerate(loc) if not _is_kind(cls, loc, i)]
    key = ".".join(str(part) for part in path)
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key '{key}'{nearest(str(loc[-1]), _known_keys(cls, loc[:-1]))}"
    if detail["type"] == "missing":
        return f"{where}: '{key}' is missing; add it"
    if detail["type"] == "value_error" or not path:
        return f"{where}: {key}: {message}" if key else f"{where}: {message}"
    return f"{where}: '{key}' = {detail['input']!r}: {message}"


def _is_kind(cls: type[Settings], loc: tuple[int | str, ...], i: int) -> bool:
    """Behind a position in a list of several kinds stands the kind of its element, which is no key."""
    return 0 < i < len(loc) - 1 and isinstance(loc[i - 1], int) and loc[i] not in _known_keys(cls, loc[:i])


def _known_keys(cls: type[Settings], loc: tuple[int | str, ...]) -> set[str]:
    """Field names of the settings class that `loc` leads to."""
    classes: list[Any] = [cls]
    for part in loc:
        below: list[Any] = []
        for owner in classes:
            if part in owner.model_fields:
                below += _settings_in(owner.model_fields[part].annotation)
        classes = below or classes
        tagged = [
            c for c in classes if "kind" in c.model_fields and part in get_args(c.model_fields["kind"].annotation)
        ]
        classes = tagged or classes
    return {name for owner in classes for name in owner.model_fields}


def marked(cls: type[Settings], mark: type[Any], prefix: str = "") -> set[str]:
    """Dotted keys of the settings of a class, and of those below it, that have a mark beside them."""
    found = set()
    for name, field in cls.model_fields.items():
        if any(isinstance(beside, mark) for beside in field.metadata):
            found.add(prefix + name)
        for below in _settings_in(field.annotation):
            found |= marked(below, mark, f"{prefix}{name}.")
    return found


def _kinds(owner: Any) -> tuple[Any, ...]:
    return get_args(owner.model_fields["kind"].annotation)


def _settings_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _settings_in(argument)]


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets what ``dotted.key=value`` says in plain data; the value is YAML.

    Raises:
        RecipeError: not of that form, or nothing there that can be set.
    """
    import yaml  # which a decoder's child process starts without

    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise RecipeError(f"override '{override}': expected dotted.key=value, for example train.batch_size=16")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"override '{override}': the value is not valid YAML") from None
    *parents, last = dotted.split(".")
    node: Any = raw
    for key in parents:
        node = _child(node, key, override)
    if isinstance(node, list):
        node[_list_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError(f"override '{override}': nothing below '{'.'.join(parents)}' can be set")


def _child(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, key, override)]
    if not isinstance(node, dict):
        raise RecipeError(f"override '{override}': nothing below a plain value can be set")
    if not isinstance(node.get(key), (dict, list)):
        node[key] = {}
    return node[key]


def _list_index(node: list[Any], key: str, override: str) -> int:
    if not (key.isascii() and key.isdigit()) or int(key) >= len(node):
        raise RecipeError(f"override '{override}': '{key}' is no position in a list of {len(node)} (they count from 0)")
    return int(key)

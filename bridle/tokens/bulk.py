"""From settings to a bulk job: opens what it needs, refuses what does not go together, ends with the manifest."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bridle.errors import MistakeError
from bridle.model_folder import BridleModel
from bridle.settings import RecipeError
from bridle.tokens.documents import PLAIN, Documents, Template
from bridle.tokens.formats import FORMATS, check_format
from bridle.tokens.layouts import Vocabulary
from bridle.tokens.parts import JOB, MANIFEST, PARTS, Part, manifest
from bridle.tokens.sources import FILES_OF_A_UNIT, FileInputs, Inputs, open_inputs
from bridle.tokens.store import Store
from bridle.tokens.text import bare_tokenizer, extend, read_tokenizer, text_size, tokenizer_files
from bridle.tokens.vocabulary import TIME_MARKS, IdSpace, ModalityTokens, id_space, id_space_from_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = "vocabulary.json"
TOKENIZER = "tokenizer"
BATCH = {"cpu": 8}
"""Windows in a batch, by kind of device; more than 8 is slower on a CPU."""
BATCH_ELSEWHERE = 64


@dataclass(frozen=True)
class Settings:
    """What a job's output looks like. Everything here is written down in job.json, and cannot change within a job.

    kind: of `FORMATS`. layout, delays, mark_s: see `ModalityTokens`. template: see `Template`. tokenizer: the text
    vocabulary: file, folder or hub id. offset: the first id, without a tokenizer. vocabulary: a vocabulary.json that
    says all of that instead. batch: windows in a batch; none: by the device. files_per_unit: files in an output.
    """

    kind: str = "parquet"
    layout: str = "interleaved"
    delays: tuple[int, ...] | None = None
    mark_s: float | None = None
    template: str = PLAIN
    tokenizer: str | None = None
    offset: int = 0
    vocabulary: str | None = None
    batch: int | None = None
    files_per_unit: int = FILES_OF_A_UNIT


@dataclass(frozen=True)
class Prepared:
    """A job that is ready to run, in one process or in many. about: the content of job.json."""

    store: Store
    inputs: Inputs
    documents: Documents
    kind: str
    batch: int
    about: dict[str, Any]


def prepare(model: BridleModel, words: Sequence[str], out: str, settings: Settings) -> Prepared:
    """Opens inputs and output, and writes down what the job is; a second call for the same job finds the same.

    Raises:
        RecipeError: settings that do not go together.
        TokenError: a vocabulary or tokenizer that cannot be used.
        ShardError: no input.
        ValueError: the output holds something else: another model's job, other settings, other files.
        OSError: the output cannot be reached.
    """
    if settings.kind not in FORMATS:
        raise RecipeError(f"--format {settings.kind}: use one of {', '.join(FORMATS)}")
    template = Template(settings.template)
    tokenizer = read_tokenizer(settings.tokenizer) if settings.tokenizer else None
    space = vocabulary_of([model], settings, tokenizer)
    documents = Documents(space, model.config.modality, template, tokenizer, model.modality.positions_per_second)
    check_format(settings.kind, documents)
    inputs = open_inputs(words, model.modality, files_per_unit=settings.files_per_unit)
    twice = [name for name, times in Counter(unit.name for unit in inputs.units).items() if times > 1]
    assert not twice, twice
    batch = settings.batch or BATCH.get(model.device.type, BATCH_ELSEWHERE)
    about = _about(model, documents, settings, batch, inputs)
    store = Store(out)
    _agree(store, about)
    _refuse_others(store, inputs)
    _publish(store, about, space, tokenizer)
    return Prepared(store, inputs, documents, settings.kind, batch, about)


def finish(prepared: Prepared, parts: Sequence[Part]) -> dict[str, Any]:
    """Writes the manifest and the data set's card. Any process may; all write the same.

    Returns:
        The manifest.

    Raises:
        OSError: see `Store.put`.
    """
    from bridle.tokens.card import card

    whole = manifest(prepared.about, sorted(parts, key=lambda part: part.name))
    prepared.store.put_json(MANIFEST, whole)
    prepared.store.put_bytes("README.md", card(whole).encode())
    return whole


def vocabulary_of(models: Sequence[BridleModel], settings: Settings, tokenizer: Tokenizer | None) -> IdSpace:
    """The id space of a vocabulary file, or of models one behind the other.

    Raises:
        RecipeError: settings that contradict each other.
        TokenError: a file that does not fit the models.
    """
    if settings.vocabulary is not None:
        return _from_file(models, settings, tokenizer)
    if tokenizer is not None and settings.offset:
        raise RecipeError("--offset and --tokenizer: the tokenizer says where its ids end; leave --offset out")
    blocks = []
    for model in models:
        quantizer, timed = model.config.quantizer, model.modality.positions_per_second is not None
        marks = settings.mark_s if timed else None
        ids = Vocabulary(quantizer.codebooks, quantizer.codebook_size, marks=TIME_MARKS if marks is not None else 0)
        if settings.delays is not None and len(settings.delays) != quantizer.codebooks:
            raise RecipeError(f"--delays: found {len(settings.delays)} numbers for {quantizer.codebooks} codebooks")
        tokens = ModalityTokens(ids, settings.layout, settings.delays, marks, model.config.name, model.sha256)
        blocks.append((model.config.modality, tokens))
    text = text_size(tokenizer) if tokenizer is not None else settings.offset
    return id_space(blocks, text, settings.tokenizer)


def _from_file(models: Sequence[BridleModel], settings: Settings, tokenizer: Tokenizer | None) -> IdSpace:
    assert settings.vocabulary is not None
    plain = Settings()
    for name in ("layout", "delays", "mark_s", "offset"):
        if getattr(settings, name) != getattr(plain, name):
            raise RecipeError(f"--vocabulary says what {name} is; leave that option out")
    folder, _, name = settings.vocabulary.rpartition("/")
    raw = Store(folder or ".").read_json(name)
    if raw is None:
        raise RecipeError(f"--vocabulary {settings.vocabulary}: no such file; write one with `bridle vocabulary`")
    space = id_space_from_json(raw, settings.vocabulary)
    for model in models:
        tokens, config = space.of(model.config.modality), model.config
        if tokens.sha256 not in (None, model.sha256):
            raise RecipeError(
                f"--vocabulary {settings.vocabulary}: was made for {config.modality} model {tokens.model} "
                f"(sha256 {(tokens.sha256 or '')[:12]}…), this is {config.name} ({model.sha256[:12]}…); make it again"
            )
    if tokenizer is not None and text_size(tokenizer) != space.text:
        raise RecipeError(
            f"--tokenizer {settings.tokenizer}: {text_size(tokenizer)} ids, {settings.vocabulary} has {space.text}"
        )
    return space


def _about(model: BridleModel, documents: Documents, settings: Settings, batch: int, inputs: Inputs) -> dict[str, Any]:
    """Everything that the bytes of the output depend on."""
    config, tokens = model.config, documents.tokens
    files = (
        {"files_per_unit": settings.files_per_unit, "files": inputs.listing} if isinstance(inputs, FileInputs) else {}
    )
    return {
        "version": 1,
        "model": {
            "name": config.name,
            "sha256": model.sha256,
            "modality": config.modality,
            "codebooks": config.quantizer.codebooks,
            "codebook_size": config.quantizer.codebook_size,
            "grid": dict(model.modality.grid),
        },
        "settings": {
            "format": settings.kind,
            "layout": tokens.layout,
            "delays": None if tokens.delays is None else list(tokens.delays),
            "time_mark_seconds": tokens.mark_s,
            "template": settings.template,
            "offset": tokens.ids.offset,
            "ids": documents.space.size,
            "tokenizer_sha256": _digest(documents.tokenizer),
            "batch": batch,
            "dtype": str(model.encoder.embed.weight.dtype).removeprefix("torch."),
            **files,
        },
    }


def _digest(tokenizer: Tokenizer | None) -> str | None:
    return None if tokenizer is None else hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def _agree(store: Store, about: dict[str, Any]) -> None:
    """Refuses an output that is not this job's."""
    before = store.read_json(JOB)
    if before is None:
        if store.exists():
            raise MistakeError(f"{store.address}: holds files, but no {JOB}; choose an empty folder")
        return
    if before == about:
        return
    if before.get("version") != about["version"]:
        raise MistakeError(f"{store.shown(JOB)}: version {before.get('version')!r}, expected {about['version']}")
    for section in ("model", "settings"):
        for name, value in about[section].items():
            found = before.get(section, {}).get(name)
            if found != value:
                if name == "files":
                    raise MistakeError(f"{store.address}: files came, went or changed since; choose another --out")
                raise MistakeError(
                    f"{store.address}: holds the job of another {section}: {name} was {found!r}, now it is {value!r}; "
                    "give what it was, or choose another --out"
                )
    raise MistakeError(f"{store.shown(JOB)}: not what this job would write; choose another --out")


def _refuse_others(store: Store, inputs: Inputs) -> None:
    """Refuses inputs that lack some of those done before: the manifest would not name their outputs, and readers of the
    manifest and of `data/` would find different samples."""
    given = {f"{unit.name}.json" for unit in inputs.units}
    others = sorted(store.sizes(PARTS).keys() - given)
    if others:
        name = others[0].removesuffix(".json")
        raise MistakeError(
            f"{store.address}: holds outputs of {len(others)} inputs that are not given now, such as {name}; give "
            f"those too, choose another --out, or delete their files in {PARTS}/ and data/"
        )


def _publish(store: Store, about: dict[str, Any], space: IdSpace, tokenizer: Tokenizer | None) -> None:
    """The id space first, job.json last: where that is, the rest is too."""
    if store.read_json(JOB) is not None:
        return
    store.put_json(VOCABULARY, space.as_json())
    for name, content in tokenizer_of(space, tokenizer).items():
        store.put_bytes(f"{TOKENIZER}/{name}", content)
    store.put_json(JOB, about)


def tokenizer_of(space: IdSpace, tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """The files of a tokenizer with the id space's tokens; none where it has text ids and nobody said whose.

    Raises:
        TokenError: see `extend`, `read_tokenizer`.
    """
    try:
        import tokenizers  # noqa: F401  an optional library
    except ImportError:
        return {}
    if tokenizer is None and space.text:
        if space.tokenizer is None:
            return {}
        tokenizer = read_tokenizer(space.tokenizer)
    copy = type(tokenizer).from_str(tokenizer.to_str()) if tokenizer is not None else bare_tokenizer()
    return tokenizer_files(extend(copy, space))

"""Models and shards, made once; a shard cache of the tests' own."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpus_inputs import write_model, write_shards, write_tokenizer

MODALITIES = ("audio", "image", "video")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing lands in the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of each modality."""
    folder = tmp_path_factory.mktemp("models")
    return {modality: write_model(folder / modality, modality) for modality in MODALITIES}


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three shards of 5, 3 and 4 sounds."""
    return write_shards(tmp_path_factory.mktemp("sounds"), "audio", [5, 3, 4])


@pytest.fixture(scope="session")
def text_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small text tokenizer of Hugging Face's kind."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizers") / "text")

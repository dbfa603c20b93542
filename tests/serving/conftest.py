"""One service for the tests that do it no harm; the others start their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from running_service import Server, serving
from small_models import sample_files, write_classifier, write_model

import bridle
from bridle.model_folder import BridleModel


@pytest.fixture(scope="session")
def audio_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "audio", "audio")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "image", "image")


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("models") / "kinds", "audio")


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory, audio_folder: Path, image_folder: Path, classifier_folder: Path
) -> Iterator[Server]:
    """Sound and pictures, classes of sounds, no keys, small limits."""
    folder = tmp_path_factory.mktemp("serve")
    models = (audio_folder, image_folder, classifier_folder)
    with serving(folder, *models, max_bytes=4_000_000, max_clips=8, max_seconds=60) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as opened:
        yield opened


@pytest.fixture(scope="session")
def audio_model(audio_folder: Path) -> BridleModel:
    return bridle.load(audio_folder)


@pytest.fixture(scope="session")
def image_model(image_folder: Path) -> BridleModel:
    return bridle.load(image_folder)


@pytest.fixture(scope="session")
def sounds() -> list[bytes]:
    return sample_files("audio", ("flac", "ogg"), 12)


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
    return sample_files("image", ("jpg", "png", "webp"), 6)

"""Classes over HTTP: those of `bridle classify`, by a classifier that stands beside models in one service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from running_service import Server, serving

from bridle.classifier import Classifier, load_classifier, new_config, save_classifier
from bridle.client import Client
from bridle.model_folder import load
from bridle.modeling.classifier import ClassifierModule

CLASSES = [f"kind {i}" for i in range(7)]


@pytest.fixture(scope="module")
def classifier_folder(audio_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load(audio_folder)
    torch.manual_seed(0)
    module = ClassifierModule(model.config.encoder, model.encoder.patch, len(CLASSES))
    module.encoder.load_state_dict(model.encoder.state_dict())
    module.head.weight.data.normal_()
    folder = tmp_path_factory.mktemp("classifiers") / "kinds"
    config = new_config(
        name="kinds", modality="audio", clip=model.config.clip, encoder=model.config.encoder, classes=CLASSES, loss="ce"
    )
    save_classifier(folder, config, module.state_dict(), None)
    return folder


@pytest.fixture(scope="module")
def classifier(classifier_folder: Path) -> Classifier:
    return load_classifier(classifier_folder)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, audio_folder: Path, classifier_folder: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("serve"), audio_folder, classifier_folder) as running:
        yield running


def test_files_get_the_classes_that_the_classifier_gives_them(
    both: Server, classifier: Classifier, sounds: list[bytes]
) -> None:
    files = sounds[:3]
    sent = [("file", (str(i), data)) for i, data in enumerate(files)]
    answer = httpx.post(both.url + "/classify?top=7", files=sent, timeout=60)
    assert answer.status_code == 200, answer.text
    assert "model;dur=" in answer.headers["server-timing"]
    for clip, data in zip(answer.json()["clips"], files, strict=True):
        assert clip["model"] == "kinds" and clip["duration_s"] > 0
        found = {each["class"]: each["probability"] for each in clip["classes"]}
        assert [found[name] for name in CLASSES] == pytest.approx(classifier.classify(data).tolist(), abs=1e-4)
        values = [each["probability"] for each in clip["classes"]]
        assert values == sorted(values, reverse=True)


def test_the_client_asks_for_the_likeliest(both: Server, classifier: Classifier, sounds: list[bytes]) -> None:
    with Client(both.url) as client:
        found = client.classify(sounds[0], top=2)
    best = classifier.classify(sounds[0]).topk(2)
    assert [name for name, _ in found] == [CLASSES[i] for i in best.indices.tolist()]


def test_a_classifier_gives_no_codes_and_a_model_no_classes(both: Server, server: Server, sounds: list[bytes]) -> None:
    listed = httpx.get(both.url + "/v1/models").json()
    assert [one["id"] for one in listed["data"]] == ["audio-test"]
    assert [(one["id"], one["classes"]) for one in listed["classifiers"]] == [("kinds", CLASSES)]
    assert httpx.post(both.url + "/tokenize", content=sounds[0]).json()["clips"][0]["model"] == "audio-test"
    for path in ("/tokenize?model=kinds", "/classify?model=audio-test"):
        answer = httpx.post(both.url + path, content=sounds[0])
        assert answer.status_code == 404 or answer.status_code == 422
        assert "classif" in answer.json()["detail"]
    answer = httpx.post(server.url + "/classify", content=sounds[0])
    assert answer.status_code in (404, 422) and "no classifier is loaded" in answer.json()["detail"]
    assert httpx.post(both.url + "/classify", content=b"not a sound at all").status_code == 415

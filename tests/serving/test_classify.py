"""Classes over HTTP: those of `bridle classify`, by a classifier that stands beside models in one service."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from running_service import Server
from small_models import CLASSES

from bridle.classifier import Classifier, load_classifier
from bridle.client import Client


@pytest.fixture(scope="module")
def classifier(classifier_folder: Path) -> Classifier:
    return load_classifier(classifier_folder)


def test_files_get_the_classes_that_the_classifier_gives_them(
    client: httpx.Client, classifier: Classifier, sounds: list[bytes]
) -> None:
    files = sounds[:3]
    answer = client.post("/classify?top=7", files=[("file", (str(i), data)) for i, data in enumerate(files)])
    assert answer.status_code == 200, answer.text
    assert "model;dur=" in answer.headers["server-timing"]
    for clip, data in zip(answer.json()["clips"], files, strict=True):
        assert clip["model"] == "kinds" and clip["duration_s"] > 0
        found = {each["class"]: each["probability"] for each in clip["classes"]}
        assert [found[name] for name in CLASSES] == pytest.approx(classifier.classify(data).tolist(), abs=1e-4)
        values = [each["probability"] for each in clip["classes"]]
        assert values == sorted(values, reverse=True)


def test_the_client_asks_for_the_likeliest(server: Server, classifier: Classifier, sounds: list[bytes]) -> None:
    with Client(server.url) as client:
        found = client.classify(sounds[0], top=2)
    best = classifier.classify(sounds[0]).topk(2)
    assert [name for name, _ in found] == [CLASSES[i] for i in best.indices.tolist()]
    assert [probability for _, probability in found] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_classifier_gives_no_codes_and_a_model_no_classes(client: httpx.Client, sounds: list[bytes]) -> None:
    listed = client.get("/v1/models").json()
    assert {one["id"] for one in listed["data"]} == {"audio-test", "image-test"}
    assert [(one["id"], one["classes"]) for one in listed["classifiers"]] == [("kinds", CLASSES)]
    assert client.get("/info").json()["classifiers"] == listed["classifiers"]
    assert client.post("/tokenize", content=sounds[0]).json()["clips"][0]["model"] == "audio-test"
    for path in (
        "/tokenize?model=kinds",
        "/encode?model=kinds",
        "/classify?model=audio-test",
        "/classify?modality=image",
    ):
        answer = client.post(path, content=sounds[0])
        assert answer.status_code == 422, path
        assert "classif" in answer.json()["detail"] or "no model for modality" in answer.json()["detail"]
    assert client.post("/classify", content=b"not a sound at all").status_code == 415

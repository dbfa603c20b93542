"""Problems by themselves: what a client is told of an error, and with which status."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bridle.modalities.clip import TooLargeError, UndecodableError, WrongKindError
from serving import logs
from serving.engine.errors import (
    AnswerTooLargeError,
    ChoiceError,
    DeadlineError,
    EmptyError,
    EngineError,
    FaultError,
    FileError,
    ProcessEndedError,
    ReloadError,
    UnknownKindError,
)
from serving.web.problems import BY_STATUS, TYPES, ProblemError, log_fault, problem_of

SERVING = (Path(__file__).parents[2] / "docs/serving.md").read_text()


def test_every_type_has_the_status_that_is_documented() -> None:
    """A row of the table has one status for all its types, or one for each."""
    documented: dict[str, int] = {"internal": 500}
    for statuses, types in re.findall(r"^\| ([\d, ]+) \| (`[a-z`, -]+`) \|", SERVING, re.MULTILINE):
        numbers, names = [int(one) for one in statuses.split(",")], re.findall(r"[a-z-]+", types)
        assert len(numbers) in (1, len(names))
        documented |= dict(zip(names, numbers * len(names), strict=False))
    assert {type: status for type, (status, _) in TYPES.items()} == documented
    assert all(documented[type] == status for status, type in BY_STATUS.items())
    assert {BY_STATUS[status] for status in (400, 404, 405)} == {"malformed", "not-found", "method-not-allowed"}


def test_an_answer_holds_the_whole_problem_and_no_more_than_is_read() -> None:
    answer = ProblemError("undecodable", "broken ü", clip=0).response("id-1", {"X-More": "yes", "Cache-Control": "no"})
    assert json.loads(bytes(answer.body)) == {
        "type": "urn:bridle:problem:undecodable",
        "title": "The content cannot be decoded",
        "status": 400,
        "detail": "broken ü",
        "clip": 0,
        "request_id": "id-1",
    }
    assert bytes(answer.body).isascii()
    assert (answer.status_code, answer.media_type) == (400, "application/problem+json")
    assert (answer.headers["x-more"], answer.headers["cache-control"]) == ("yes", "no")
    assert answer.headers["content-type"] == "application/problem+json"
    plain = ProblemError("busy", "x" * 2001)
    assert "request_id" not in plain.body()
    assert plain.body()["detail"] == "x" * 2000
    assert plain.response().headers["cache-control"] == "no-store"
    assert str(plain) == plain.detail == "x" * 2001


@pytest.mark.parametrize(("seconds", "told"), [(None, None), (0.0, "1"), (1.4, "1"), (1.6, "2"), (60.0, "60")])
def test_a_client_is_told_when_to_come_again_in_whole_seconds(seconds: float | None, told: str | None) -> None:
    assert ProblemError("busy", "full", retry_after=seconds).headers().get("Retry-After") == told


def test_only_who_has_no_key_is_asked_for_one() -> None:
    for type in TYPES:
        asked = ProblemError(type, "").headers().get("WWW-Authenticate", "")
        assert [scheme in asked for scheme in ("Bearer realm", "Basic realm")] == [type == "unauthorized"] * 2


@pytest.mark.parametrize(
    ("error", "type", "again"),
    [
        (WrongKindError("x"), "unsupported-kind", None),
        (TooLargeError("x"), "too-large", None),
        (UndecodableError("x"), "undecodable", None),
        (ChoiceError("x"), "wrong-parameter", None),
        (UnknownKindError("x"), "unsupported-kind", None),
        (EmptyError("x"), "undecodable", None),
        (AnswerTooLargeError("x"), "too-large", None),
        (ReloadError("x"), "reload-failed", None),
        (ProcessEndedError("x"), "unavailable", 1),
        (DeadlineError(), "deadline", 1),
    ],
)
def test_an_error_of_the_engine_is_told_as_it_is(error: EngineError, type: str, again: float | None) -> None:
    problem = problem_of(error)
    assert (problem.type, problem.detail, problem.retry_after, problem.extra) == (type, str(error), again, {})


def test_a_file_at_fault_is_named_and_a_fault_of_ours_is_not_explained() -> None:
    for cause, type in (
        (WrongKindError("of no kind"), "unsupported-kind"),
        (UndecodableError("broken"), "undecodable"),
    ):
        problem = problem_of(FileError(2, cause))
        assert (problem.type, problem.detail, problem.extra) == (type, str(cause), {"clip": 2})
    fault = problem_of(FaultError("KeyError: 'secret'", "Traceback: here"))
    assert (fault.type, fault.extra, fault.retry_after) == ("internal", {}, None)
    assert "request id" in fault.detail and "secret" not in fault.detail


def test_only_faults_of_ours_are_logged(capfd: pytest.CaptureFixture[str]) -> None:
    logs.set_level("info")
    log_fault(ChoiceError("their mistake"), "id-1")
    log_fault(FaultError("KeyError: 'secret'", "Traceback: here"), "id-2")
    assert logs.flush()
    (line,) = [json.loads(row) for row in capfd.readouterr().err.splitlines()]
    told = {"level": "error", "request_id": "id-2", "error": "KeyError: 'secret'", "traceback": "Traceback: here"}
    assert told.items() <= line.items()

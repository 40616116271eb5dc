"""``florence2 batch`` and services that hang, break, refuse all, or become others meanwhile."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from florence2_kserve.batch import run as run_module
from florence2_kserve.exit_codes import ExitCode
from tests.batch.front import Call, Front, Reply, refusal
from tests.batch.runs import QUICK, draw, failures, names, read_lines, run


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    return draw(tmp_path / "pictures", 3)


def instead(reply: Reply, call: Call) -> Reply:
    """Answers all questions with `reply`."""
    return reply if call.is_question else call.forward()


def instead_for(picture: bytes, reply: Reply, call: Call) -> Reply:
    """Answers the questions about one picture with `reply`."""
    return reply if picture in call.body else call.forward()


@pytest.mark.parametrize(("status", "message"), [(504, "time ran out"), (500, "row 0: the engine broke")])
def test_a_service_that_answers_nothing_ends_the_run_and_blames_no_picture(
    pictures, tmp_path, service, status, message
):
    output = tmp_path / "out.jsonl"
    with Front(service.rest_url, partial(instead, refusal(status, message))) as front:
        result = run(pictures[0].parent, "--output", output, "--url", front.url, "--give-up-after", "0.5", *QUICK)
    assert result.returncode == ExitCode.UNREACHABLE
    assert f"has answered no question for 1 s: {message}" in result.stderr
    assert not failures(output)


def test_a_picture_that_fails_three_times_while_others_are_answered_is_asked_again_by_a_rerun(
    pictures, tmp_path, service
):
    output = tmp_path / "out.jsonl"
    broken = refusal(500, "row 0: the engine broke")
    with Front(service.rest_url, partial(instead_for, pictures[0].read_bytes(), broken)) as front:
        result = run(pictures[0].parent, "--output", output, "--url", front.url, *QUICK)
    assert result.returncode == ExitCode.SOME_UNANSWERED
    assert names(read_lines(output)) == [path.name for path in pictures[1:]]
    (failure,) = failures(output)
    assert (failure["address"], failure["kind"]) == (str(pictures[0]), "unanswered")
    assert failure["attempts"] >= 3
    assert run(pictures[0].parent, "--output", output, "--url", service.rest_url, *QUICK).returncode == ExitCode.OK
    assert not failures(output)


def test_what_the_service_refuses_of_all_pictures_ends_the_run_and_blames_none(pictures, tmp_path, service):
    output = tmp_path / "out.jsonl"
    message = "unknown output 'FINISH_REASON'; known: PARSED_JSON"  # of a service older than the client
    with Front(service.rest_url, partial(instead, refusal(400, message))) as front:
        result = run(pictures[0].parent, "--output", output, "--url", front.url)
    assert result.returncode == ExitCode.USAGE
    assert f"the service refuses: {message}" in result.stderr
    assert not failures(output)


def test_a_picture_that_a_gateway_finds_too_large_is_refused(pictures, tmp_path, service):
    output = tmp_path / "out.jsonl"
    large = pictures[1].read_bytes()
    too_large = Reply(413, b"<html>Request Entity Too Large</html>", {})
    with Front(service.rest_url, partial(instead_for, large, too_large)) as front:
        result = run(pictures[0].parent, "--output", output, "--url", front.url, *QUICK)
    assert result.returncode == ExitCode.SOME_REFUSED
    (failure,) = failures(output)
    assert (failure["address"], failure["kind"], failure["status"]) == (str(pictures[1]), "refused", 413)
    assert len(read_lines(output)) == 2


def test_a_service_that_doesnt_say_who_it_is_counts_as_gone(pictures, tmp_path, service):
    let_go = threading.Event()

    def hang(call: Call) -> Reply:
        let_go.wait(60)
        return call.forward()

    with Front(service.rest_url, hang) as front:
        result = run(pictures[0], "--output", tmp_path / "o", "--url", front.url, "--give-up-after", "0.5")
        let_go.set()
    assert result.returncode == ExitCode.UNREACHABLE
    assert "can't be reached: it didn't say within 1 s which model it has" in result.stderr


def with_revision(reply: Reply, revision: str) -> Reply:
    metadata = json.loads(reply.body)
    metadata["properties"]["revision"] = revision
    return replace(reply, body=json.dumps(metadata).encode())


class Rolling:
    """A service that is away for one call and comes back as another model."""

    def __init__(self, away_at: int) -> None:
        self._away_at, self._questions = away_at, 0

    def __call__(self, call: Call) -> Reply:
        self._questions += call.is_question
        if call.is_question and self._questions == self._away_at:
            return refusal(503, "draining")
        reply = call.forward()
        return reply if call.is_question or self._questions < self._away_at else with_revision(reply, "newer")


def test_a_model_that_changes_in_an_outage_ends_the_run_before_its_answers_are_written(pictures, tmp_path, service):
    output = tmp_path / "out.jsonl"
    ask = (pictures[0].parent, "--output", output, *QUICK)
    with Front(service.rest_url, Rolling(away_at=2)) as front:
        result = run(*ask, "--url", front.url, "--concurrency", "1")
        assert result.returncode == ExitCode.FAILED
        assert "the service's model changed from florence2 (florence2_embedded, embedded@" in result.stderr
        assert "to florence2 (florence2_embedded, embedded@newer); run again" in result.stderr
        (line,) = read_lines(output)
        assert line["revision"] != "embedded@newer"
        assert run(*ask, "--url", front.url).returncode == ExitCode.OK
    assert [each["revision"] for each in read_lines(output)] == [line["revision"], *["embedded@newer"] * 3]


def test_a_model_that_changes_without_an_outage_is_noticed_after_a_while(pictures, tmp_path, service, monkeypatch):
    monkeypatch.setattr(run_module, "_SAME_MODEL_S", 0.0)
    asked = 0

    def change(call: Call) -> Reply:
        nonlocal asked
        asked += call.is_question
        return with_revision(call.forward(), "newer") if asked and not call.is_question else call.forward()

    with Front(service.rest_url, change) as front:
        result = run(pictures[0].parent, "--output", tmp_path / "out.jsonl", "--url", front.url, *QUICK)
    assert result.returncode == ExitCode.FAILED
    assert "the service's model changed" in result.stderr
    assert not read_lines(tmp_path / "out.jsonl")

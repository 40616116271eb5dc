from __future__ import annotations

from pathlib import Path

import pytest

from florence2_kserve.batch.identity import Asked, Question, content_hash, question_key
from florence2_kserve.batch.ledger import FailureKind, Ledger, OutputFiles
from florence2_kserve.batch.sources import WHOLE, Picture, Shard
from florence2_kserve.client import InvalidRequestError

ASKED = Asked("florence2", "florence2_embedded", None, {})
QUESTION = Question("<CAPTION>")
SAID = {"answer": "a star", "score": -0.1, "scores": [0.9], "finish_reason": "stop", "seconds": 0.1}


def picture(address: str, data: bytes = b"x", state: str | None = "1-1") -> Picture:
    return Picture(address, lambda: data, state)


def ledger(folder: Path, **options: bool) -> Ledger:
    return Ledger(OutputFiles.of(folder / "out.jsonl", WHOLE), ASKED, **options)


@pytest.mark.parametrize(
    ("output", "shard", "journal", "table"),
    [
        ("o.jsonl", WHOLE, "o.jsonl", None),
        ("o.parquet", WHOLE, "o.parquet.journal.jsonl", "o.parquet"),
        ("folder", WHOLE, "folder/answers.jsonl", None),
        ("o.jsonl", Shard(3, 10), "o-00003-of-00010.jsonl", None),
        ("o.parquet", Shard(3, 10), "o-00003-of-00010.parquet.journal.jsonl", "o-00003-of-00010.parquet"),
        ("folder", Shard(0, 2), "folder/answers-00000-of-00002.jsonl", None),
    ],
)
def test_where_a_run_writes(tmp_path, output, shard, journal, table):
    files = OutputFiles.of(tmp_path / output, shard)
    assert files.journal == tmp_path / journal
    assert files.table == (None if table is None else tmp_path / table)
    assert files.failures == tmp_path / f"{table or journal}.failures.jsonl"


def test_every_part_of_a_question_makes_another_key():
    content = content_hash(b"x")
    keys = {
        question_key(content, QUESTION, ASKED),
        question_key(content_hash(b"y"), QUESTION, ASKED),
        question_key(content, Question("<OCR>"), ASKED),
        question_key(content, Question("<CAPTION>", "text"), ASKED),
        question_key(content, QUESTION, Asked("other", "florence2_embedded", None, {})),
        question_key(content, QUESTION, Asked("florence2", "florence2_safetensors", None, {})),
        question_key(content, QUESTION, Asked("florence2", "florence2_embedded", "abc", {})),
        question_key(content, QUESTION, Asked("florence2", "florence2_embedded", None, {"num_beams": 1})),
    }
    assert len(keys) == 8
    ordered, other_order = {"num_beams": 1, "length_penalty": 1.0}, {"length_penalty": 1.0, "num_beams": 1}
    first, second = (Asked("m", "p", None, parameters) for parameters in (ordered, other_order))
    assert question_key(content, QUESTION, first) == question_key(content, QUESTION, second)


def test_an_answer_is_known_after_a_restart_by_address_and_by_bytes(tmp_path):
    content = content_hash(b"x")
    with ledger(tmp_path) as first:
        (question,) = first.open_questions(picture("/a"), content, [QUESTION])
        first.add_answers(picture("/a"), "1-1", content, [(question, {**SAID, "at": "2000-01-01T00:00:00Z"})])
        assert not first.open_questions(picture("/a"), content, [QUESTION])
    with ledger(tmp_path) as second:
        assert second.found == 1
        assert second.known_content(picture("/a"), "1-1") == content
        assert second.known_content(picture("/a"), "1-2") is None
        assert second.known_content(picture("/a"), None) is None
        assert not second.open_questions(picture("/a"), content, [QUESTION])
        still_open = second.open_questions(picture("/b"), content, [QUESTION])
        assert [item.question for item in still_open] == [QUESTION]
        assert not second.copy_answers(picture("/b"), "2-2", still_open)
        records = list(second.records())
    assert [record["address"] for record in records] == ["/a", "/b"]
    assert records[1] == {**records[0], "address": "/b", "state": "2-2", "at": records[1]["at"]}
    assert records[1]["at"] > records[0]["at"], "it is when the copy was written"
    with ledger(tmp_path, rehash=True) as third:
        assert third.known_content(picture("/a"), "1-1") is None


def test_a_failure_that_was_answered_before_a_kill_is_forgotten(tmp_path):
    content = content_hash(b"x")
    error = InvalidRequestError("bad", 400)
    with ledger(tmp_path) as first:
        (question,) = first.open_questions(picture("/a"), content, [QUESTION])
        first.add_failure(picture("/a"), "1-1", content, question, kind=FailureKind.REFUSED, error=error, attempts=1)
    files = OutputFiles.of(tmp_path / "out.jsonl", WHOLE)
    stood = files.failures.read_bytes()
    with ledger(tmp_path) as second:
        assert not second.open_questions(picture("/a"), content, [QUESTION])
        assert second.count_refused(picture("/a"), content, [QUESTION]) == 1
    with ledger(tmp_path, retry_failed=True) as third:
        (question,) = third.open_questions(picture("/a"), content, [QUESTION])
        third.add_answers(picture("/a"), "1-1", content, [(question, SAID)])
    assert not files.failures.exists()
    files.failures.write_bytes(stood + stood[:20])  # as if that run had been killed instead of ended
    ledger(tmp_path).close()
    assert not files.failures.exists()


def test_a_line_torn_off_between_two_tasks_leaves_one_question_open(tmp_path):
    content = content_hash(b"x")
    questions = [QUESTION, Question("<OCR>")]
    with ledger(tmp_path) as first:
        items = first.open_questions(picture("/a"), content, questions)
        first.add_answers(picture("/a"), "1-1", content, [(item, SAID) for item in items])
    path = tmp_path / "out.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    with ledger(tmp_path) as second:
        assert [item.question for item in second.open_questions(picture("/a"), content, questions)] == questions[1:]

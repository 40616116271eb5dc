"""A batch's output as the run sees it: which questions are open, and where their answers or failures go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from florence2_kserve.batch.identity import Asked, Question, question_key
from florence2_kserve.batch.index import Index
from florence2_kserve.batch.journal import Journal, replace_file
from florence2_kserve.batch.sources import Picture, Shard

PARQUET_SUFFIX = ".parquet"
# What a line of the output holds, in this order; docs/batch.md says what each is.
FIELDS = (
    "key",
    "address",
    "state",
    "content",
    "task",
    "text",
    "model",
    "platform",
    "revision",
    "parameters",
    "at",
    "answer",
    "score",
    "scores",
    "finish_reason",
    "seconds",
)
_NAME_IN_FOLDER = "answers.jsonl"


class FailureKind(StrEnum):
    """Why a question has no answer, and so whether a rerun asks again."""

    REFUSED = "refused"  # 400, 413: the picture or the text is to blame; only --retry-failed asks again
    UNANSWERED = "unanswered"  # 429, 500, 503, 504, a lost connection: the next run asks again
    UNREAD = "unread"  # the file can't be read: the next run tries again


@dataclass(frozen=True, slots=True)
class OutputFiles:
    """Where a run writes.

    Attributes:
        journal: JSON lines, one an answer.
        failures: JSON lines, one a question without an answer.
        table: The same as a Parquet file, made at the end; None where none is asked for.
    """

    journal: Path
    failures: Path
    table: Path | None = None

    @classmethod
    def of(cls, output: Path, shard: Shard) -> OutputFiles:
        """Names the files of one shard.

        Args:
            output: ``….parquet``, another file, or a folder (one that exists, or a name without a suffix).
            shard: Where there are several, each has files of its own.
        """
        if output.is_dir() or not output.suffix:
            output = output / _NAME_IN_FOLDER
        if shard.count > 1:
            output = output.with_stem(f"{output.stem}-{shard.index:05}-of-{shard.count:05}")
        failures = output.with_name(f"{output.name}.failures.jsonl")
        if output.suffix == PARQUET_SUFFIX:
            return cls(output.with_name(f"{output.name}.journal.jsonl"), failures, output)
        return cls(output, failures)


@dataclass(frozen=True, slots=True)
class OpenQuestion:
    """A question without an answer, and the key that its answer will have."""

    question: Question
    key: str


class Ledger:
    """Opens an output, reads what it holds, and adds to it.

    Args:
        files: Where it lies.
        asked: Whom the run asks and how.
        retry_failed: Whether questions that were refused are open again.
        rehash: Whether files are read even where nothing about them has changed.

    Attributes:
        found: Lines that the output held.

    Raises:
        JournalError: If it is in use, damaged, or somebody else's.
    """

    def __init__(self, files: OutputFiles, asked: Asked, *, retry_failed: bool = False, rehash: bool = False) -> None:
        self.files, self._asked = files, asked
        self._retry_failed, self._rehash = retry_failed, rehash
        files.journal.parent.mkdir(parents=True, exist_ok=True)
        self._index = Index()
        self._answers = Journal(files.journal, required=("address", "key", "task", "answer"))
        try:
            self.found = self._index.add_answers(self._answers.records())
            self._failures = Journal(files.failures, required=("address", "kind", "task"))
            try:
                self._load_failures()
            except BaseException:
                self._failures.close()
                raise
        except BaseException:
            self._answers.close()
            raise

    def known_content(self, picture: Picture, state: str | None) -> str | None:
        """Returns the hash of a file's bytes where the file is as it was when it was last read."""
        return None if self._rehash else self._index.known_content(picture.address, state)

    def open_questions(self, picture: Picture, content: str, questions: Iterable[Question]) -> list[OpenQuestion]:
        """Returns those of `questions` that the output neither answers for this picture nor knows as refused."""
        return [
            OpenQuestion(question, key)
            for question in questions
            if not self._is_settled(picture.address, question, key := question_key(content, question, self._asked))
        ]

    def count_refused(self, picture: Picture, content: str, questions: Iterable[Question]) -> int:
        """Returns how many of `questions` the service refused for this picture, in a run before."""
        keys = (question_key(content, question, self._asked) for question in questions)
        return sum(self._index.is_refused(picture.address, key) for key in keys)

    def forget_stale_failures(self, picture: Picture, content: str, questions: Iterable[Question]) -> None:
        """Drops failures of settled questions that are about other bytes, or about bytes that couldn't be read."""
        for question in questions:
            self._index.forget_stale_failure(picture.address, question.task, question.text, content)

    def note_state(self, picture: Picture, state: str | None, content: str, questions: Iterable[Question]) -> None:
        """Writes answers anew where the same bytes have another state, so that a rerun knows the file by that."""
        if state is None or self._index.known_content(picture.address, state) == content:
            return
        items = [OpenQuestion(question, question_key(content, question, self._asked)) for question in questions]
        self.copy_answers(picture, state, items)

    def copy_answers(
        self, picture: Picture, state: str | None, questions: Sequence[OpenQuestion]
    ) -> list[OpenQuestion]:
        """Answers what was answered for the same bytes, at another address or before the file was changed.

        Returns:
            The questions that are still open.
        """
        records, still_open = [], []
        for item in questions:
            offset = self._index.answer_offset(item.key)
            if offset is None:
                still_open.append(item)
                continue
            known = self._answers.read(offset)
            records.append({**known, "address": picture.address, "state": state, "at": _now()})
        self._add(records)
        return still_open

    def add_answers(
        self, picture: Picture, state: str | None, content: str, answers: Iterable[tuple[OpenQuestion, Any]]
    ) -> None:
        """Writes the answers to one picture's questions.

        Args:
            picture: The picture.
            state: Of its file.
            content: Hash of its bytes.
            answers: Questions, and what the service said: the fields that depend on the answer.

        Raises:
            OSError: If they can't be written.
        """
        self._add([{**self._question(picture, state, content, item), **answer} for item, answer in answers])

    def add_failure(
        self,
        picture: Picture,
        state: str | None,
        content: str | None,
        item: OpenQuestion | Question,
        *,
        kind: FailureKind,
        error: Exception,
        attempts: int,
    ) -> None:
        """Writes that a question has no answer; `content` is None where the file couldn't be read."""
        record = {
            "address": picture.address,
            "state": state,
            "content": content,
            "key": item.key if isinstance(item, OpenQuestion) else None,
            **_task_and_text(item.question if isinstance(item, OpenQuestion) else item),
            "kind": kind.value,
            "status": getattr(error, "status", None),
            "reason": str(error) or type(error).__name__,
            "attempts": attempts,
            "at": _now(),
        }
        self._failures.append([record])
        self._note_failure(record)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yields what the output's lines hold."""
        return (record for _, record in self._answers.records())

    def sync(self) -> None:
        """Has the disk hold what was written until now."""
        self._answers.sync()

    def close(self) -> None:
        """Ends the run: leaves in the file of failures those that stand, and lets the output go."""
        try:
            self._answers.sync()
            if self._index.failure_count():
                temporary = self.files.failures.with_name(f".{self.files.failures.name}.tmp")
                with open(temporary, "w", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in self._index.failures())
                replace_file(self.files.failures, temporary)
            else:
                self.files.failures.unlink(missing_ok=True)
        finally:
            self._failures.close()
            self._answers.close()
            self._index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_settled(self, address: str, question: Question, key: str) -> bool:
        if self._index.is_done(address, question, self._asked, key):
            return True
        return not self._retry_failed and self._index.is_refused(address, key)

    def _load_failures(self) -> None:
        for _, record in self._failures.records():
            # A run that was killed may have answered what an earlier one couldn't.
            key = record.get("key")
            if key is None or self._index.answer_offset(key) is None:
                self._note_failure(record)

    def _note_failure(self, record: Mapping[str, Any]) -> None:
        self._index.add_failure(record, refused=record["kind"] == FailureKind.REFUSED)

    def _add(self, records: Sequence[dict[str, Any]]) -> None:
        if not records:
            return
        offsets = self._answers.append(records)
        self._index.add_answers(zip(offsets, records, strict=True))
        for record in records:
            self._index.forget_failure(record["address"], record["task"], record["text"])

    def _question(self, picture: Picture, state: str | None, content: str, item: OpenQuestion) -> dict[str, Any]:
        return {
            "key": item.key,
            "address": picture.address,
            "state": state,
            "content": content,
            **_task_and_text(item.question),
            "model": self._asked.model,
            "platform": self._asked.platform,
            "revision": self._asked.revision,
            "parameters": dict(self._asked.parameters),
            "at": _now(),
        }


def _task_and_text(question: Question) -> dict[str, Any]:
    return {"task": question.task, "text": question.text}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")

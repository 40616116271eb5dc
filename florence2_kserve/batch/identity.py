"""When two questions are the same, so that the answer to one is the answer to the other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

_BYTES = 16  # of every hash here; `b2sum -l 128` gives the same for a file


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about a picture.

    Attributes:
        task: The task's name, e.g. ``<OD>``.
        text: Text or region, None where the task takes none.
    """

    task: str
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """All that an answer depends on beside the picture and the question.

    Attributes:
        model: Name of the model.
        platform: What the service's metadata says of the model's kind.
        revision: What else tells models apart: the user's word, or else the checkpoint in the service's metadata;
            None where that says nothing.
        parameters: Request parameters that change answers.
    """

    model: str
    platform: str
    revision: str | None
    parameters: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.model} ({', '.join(filter(None, (self.platform, self.revision)))})"


def content_hash(data: bytes) -> str:
    """Returns the hash of a file's bytes: BLAKE2b of 128 bits, as 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=_BYTES).hexdigest()


def question_key(content: str, question: Question, asked: Asked) -> str:
    """Returns the name of a question, 32 hexadecimal digits: equal keys have equal answers.

    Args:
        content: Hash of the picture's bytes.
        question: What is asked.
        asked: Of whom and how.
    """
    parts = [content, question.task, question.text, asked.model, asked.platform, asked.revision, asked.parameters]
    return hashlib.blake2b(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS), digest_size=_BYTES).hexdigest()


def short(*parts: str | Mapping[str, Any] | None) -> bytes:
    """Returns 16 bytes that stand for `parts` in an index."""
    return hashlib.blake2b(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS), digest_size=_BYTES).digest()


def slot(address: str, question: Question, asked: Asked) -> bytes:
    """Returns 16 bytes that stand for a question about whatever picture is at `address`."""
    return short(address, question.task, question.text, asked.model, asked.platform, asked.revision, asked.parameters)

"""What the clients raise where the service refuses, fails or can't be reached."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime

from florence2_kserve.errors import ServiceError


class ClientError(Exception):
    """The service refused or couldn't answer.

    Attributes:
        message: The server's message.
        status: HTTP status or name of the gRPC status; None where no answer came.
        retry_after_s: Seconds after which the server wants to be asked again; None where it didn't say.
    """

    def __init__(self, message: str, status: int | str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.retry_after_s = message, status, retry_after_s


class InvalidRequestError(ClientError):
    """The request is wrong (400, 413); sending it again won't help."""


class NotFoundError(ClientError):
    """No such model (404)."""


class OverloadedError(ClientError):
    """The server's queue is full (429)."""


class UnavailableError(ClientError):
    """The server is loading, draining or can't be reached (503, a proxy's 502, connection refused or reset)."""


class DeadlineError(ClientError):
    """No answer in time (504, or the client's own timeout)."""


class ServerError(ClientError):
    """A fault of the server (500 and others), or an answer that can't be read."""


class RowError(ClientError):
    """One row of a request with ``partial=true`` has no answer; `status` and `message` are that row's."""


def read_retry_after(value: str | None) -> float | None:
    """Reads a Retry-After: seconds, or the date that a proxy may give instead; None where it says nothing."""
    if value is None:
        return None
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


@contextmanager
def reading_an_answer() -> Iterator[None]:
    """Turns whatever reading an answer of another shape than agreed raises into a ServerError."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ServiceError) as error:
        raise ServerError(f"the server's answer can't be read: {error!r}") from error

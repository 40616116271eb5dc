"""The one family of errors that clients of the services see.

Every error carries both its HTTP status and its gRPC status. The family derives from
``GrpcException``, which the SDK's gRPC interceptor turns into a status by itself; for
REST, ``server.py`` registers one handler for the whole family.
"""

from __future__ import annotations

import math

from grpc import StatusCode
from grpc_interceptor.exceptions import GrpcException

_LONGEST_DETAILS = 1000


class ServiceError(GrpcException):
    """Base of all errors reported to clients.

    Attributes:
        status_code: gRPC status.
        http_status: HTTP status.
        details: What went wrong, in words meant for the caller.
        retry_after_s: Seconds after which a retry makes sense, or None.
    """

    http_status: int = 500
    status_code: StatusCode = StatusCode.INTERNAL

    def __init__(self, details: str, *, retry_after_s: float | None = None) -> None:
        if len(details) > _LONGEST_DETAILS:  # they may quote the client, and gRPC drops a status of over 16 KiB
            details = f"{details[: _LONGEST_DETAILS - 1]}…"
        super().__init__(details=details)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.details

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that go with the error (whole seconds, as Retry-After wants them)."""
        return {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


class BadRequest(ServiceError):
    """The request can't be understood: 400 / INVALID_ARGUMENT."""

    http_status = 400
    status_code = StatusCode.INVALID_ARGUMENT


class BadTensor(BadRequest):
    """One tensor, or one row of it, is wrong; the message names both."""

    def __init__(self, tensor: str, reason: str, *, row: int | str | None = None) -> None:
        self.tensor, self.row, self.reason = tensor, row, reason
        super().__init__(f"{tensor}: {reason}" if row is None else f"{tensor}, row {row}: {reason}")


class Forbidden(ServiceError):
    """The call is switched off on this server: 403 / PERMISSION_DENIED."""

    http_status = 403
    status_code = StatusCode.PERMISSION_DENIED


class NotFound(ServiceError):
    """No such model: 404 / NOT_FOUND."""

    http_status = 404
    status_code = StatusCode.NOT_FOUND


class TooLarge(ServiceError):
    """Body or image over the limit: 413 / INVALID_ARGUMENT, since a retry won't help."""

    http_status = 413
    status_code = StatusCode.INVALID_ARGUMENT


class QueueFull(ServiceError):
    """The waiting queue is full; come back later: 429 / RESOURCE_EXHAUSTED."""

    http_status = 429
    status_code = StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, details: str, *, retry_after_s: float | None = 1.0) -> None:
        super().__init__(details, retry_after_s=retry_after_s)


class ClientGone(ServiceError):
    """The caller closed the connection; its work was dropped: 499 / CANCELLED."""

    http_status = 499
    status_code = StatusCode.CANCELLED


class Internal(ServiceError):
    """A fault of the service itself: 500 / INTERNAL."""


class RowFailed(Internal):
    """One row can't be answered, through no fault of the caller; the message names it."""

    def __init__(self, row: int, reason: str) -> None:
        self.row, self.reason = row, reason
        super().__init__(f"row {row}: {reason}")


class Unavailable(ServiceError):
    """Loading, draining, or the predictor is away: 503 / UNAVAILABLE."""

    http_status = 503
    status_code = StatusCode.UNAVAILABLE

    def __init__(self, details: str, *, retry_after_s: float | None = 1.0) -> None:
        super().__init__(details, retry_after_s=retry_after_s)


class DeadlineExceeded(ServiceError):
    """The request's time is over: 504 / DEADLINE_EXCEEDED."""

    http_status = 504
    status_code = StatusCode.DEADLINE_EXCEEDED


_BY_GRPC_STATUS: dict[StatusCode, type[ServiceError]] = {
    StatusCode.INVALID_ARGUMENT: BadRequest,
    StatusCode.NOT_FOUND: NotFound,
    StatusCode.PERMISSION_DENIED: Forbidden,
    StatusCode.RESOURCE_EXHAUSTED: QueueFull,
    StatusCode.CANCELLED: ClientGone,
    StatusCode.UNAVAILABLE: Unavailable,
    StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


def from_grpc_status(code: StatusCode, details: str) -> ServiceError:
    """Returns the error that a server answering with `code` meant; unknown codes are `Internal`."""
    return _BY_GRPC_STATUS.get(code, Internal)(details)

"""What is wrong with a request, in words for its sender; which HTTP status that makes is the server's business."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from deltamem.errors import DeltaMemError, SnapshotError, WindowError


class RequestError(DeltaMemError):
    """A request that can't be done as it stands.

    Args:
        message: what was wrong and what to do.
        code: a word for programs.
        param: the request's field at fault.
    """

    def __init__(self, message: str, code: str = "invalid_request", param: str | None = None):
        super().__init__(message)
        self.message, self.code, self.param = message, code, param


def as_request_error(error: ValidationError | DeltaMemError) -> RequestError:
    """The sender's view of pydantic's and the library's errors."""
    match error:
        case RequestError():
            return error
        case ValidationError():
            return first_wrong_field(error.errors())
        case WindowError():
            return RequestError(str(error), "context_length_exceeded", "messages")
        case SnapshotError():
            return RequestError(str(error), "session_unusable", "session_id")
    return RequestError(str(error), param="messages")


def first_wrong_field(errors: Sequence[Mapping[str, Any]]) -> RequestError:
    """The first of pydantic's findings, with its place in the request."""
    where = ".".join(str(part) for part in errors[0]["loc"]) or None
    cause = errors[0].get("ctx", {}).get("error")  # what a validator of ours has raised
    if isinstance(cause, RequestError):
        return cause
    said = cause if isinstance(cause, ValueError) else errors[0]["msg"]
    return RequestError(f"{where or 'body'}: {said}", param=where)

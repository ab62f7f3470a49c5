"""TODO deltamem/protocol/errors.py."""

from __future__ import annotations

import logging

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from deltamem.errors import DeltaMemError, SnapshotError, WindowError

log = logging.getLogger("deltamem.server")


class ApiError(Exception):
    """What a client is told.

    Args:
        status: the HTTP status.
        message: what was wrong and what to do.
        code: a word for programs.
        param: the request's field at fault.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def body(self) -> dict:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def as_api_error(error: BaseException) -> ApiError:
    """The client's view of any exception; an unforeseen one is logged and told as an internal error."""
    match error:
        case ApiError():
            return error
        case ValidationError() | RequestValidationError():
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or None
            return ApiError(400, f"{where or 'body'}: {first['msg']}", "invalid_request", where)
        case WindowError():
            return ApiError(400, str(error), "context_length_exceeded", "messages")
        case SnapshotError():
            return ApiError(409, str(error), "session_unusable", "session_id")
        case DeltaMemError():
            return ApiError(400, str(error), "invalid_request", "messages")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), "http_error", headers=error.headers)
    log.error("internal error", exc_info=error)
    return ApiError(500, "internal error; the server's log has the details", "internal_error")

"""Which HTTP status an error is, and its body in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from deltamem.errors import DeltaMemError
from deltamem.protocol.errors import as_request_error, first_wrong_field
from deltamem.server.scheduler import BusyError, StoppedError
from deltamem.server.store import StoreFullError

log = logging.getLogger("deltamem.server")

# Of the library's and the protocol's errors, those that aren't a plain 400. The openai client tries again after 408,
# 409, 429 and all from 500 on, which would be in vain here: a session stays as it is.
STATUS = {"session_conflict": 422, "session_unusable": 422}
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DONT_RETRY = {"x-should-retry": "false"}  # what OpenAI's servers send to OpenAI's clients


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
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def body(self) -> dict:
        """The error as OpenAI's servers write it."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as an answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def as_api_error(error: BaseException) -> ApiError:
    """The client's view of any exception; an unforeseen one is logged and told as an internal error."""
    match error:
        case ApiError():
            return error
        case BusyError():
            return ApiError(429, str(error), "busy", headers={"Retry-After": "1"})
        case StoppedError():
            return ApiError(503, str(error), "shutting_down")
        case StoreFullError():
            return ApiError(429, str(error), "session_limit", "session_id", DONT_RETRY)
        case OSError() if error.errno in DISK_FULL:
            log.error("a turn could not be kept: %s", error)
            message = "the server's disk is full: the turn could not be kept, and the session is as it was before it"
            return ApiError(507, message, "disk_full", headers=DONT_RETRY)
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), "http_error", headers=error.headers)
        case RequestValidationError():
            wrong = first_wrong_field(error.errors())
        case ValidationError() | DeltaMemError():
            wrong = as_request_error(error)
        case _:
            log.error("internal error", exc_info=error)
            return ApiError(500, "internal error; the server's log has the details", "internal_error")
    return ApiError(STATUS.get(wrong.code, 400), wrong.message, wrong.code, wrong.param)


def install(app: FastAPI) -> None:
    """Have the app answer every exception in OpenAI's shape."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    for kind in (ApiError, ValidationError, RequestValidationError, HTTPException, DeltaMemError, Exception):
        app.add_exception_handler(kind, answer)

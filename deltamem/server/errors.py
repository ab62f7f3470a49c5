"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from deltamem.errors import DeltaMemError
from deltamem.protocol.errors import ApiError, as_api_error


def install(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    for kind in (ApiError, ValidationError, RequestValidationError, HTTPException, DeltaMemError, Exception):
        app.add_exception_handler(kind, answer)

"""The gateway: an OpenAI-compatible API over an engine, and per-person routes to read, change, and forget data."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from mta.data.tasks.task import Form
from mta.errors import MtaError
from mta.serving.api import classify, completions, people
from mta.serving.api.errors import error_of
from mta.serving.api.limits import Guard
from mta.serving.api.schemas import error_body
from mta.serving.api.service import Caller, Gateway, Service

router = APIRouter()


def create_app(service: Service) -> FastAPI:
    """Build the gateway as an ASGI application."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(service.keep_sweeping())
        yield
        sweeping.cancel()
        await asyncio.wait([sweeping])
        await asyncio.gather(service.jobs.close(), service.engine.close())

    handlers = {MtaError: _mta_error, RequestValidationError: _invalid_body, HTTPException: _http_error}
    how: dict[str, Any] = {"lifespan": lifespan, "exception_handlers": handlers, "docs_url": None, "redoc_url": None}
    app = FastAPI(title="mta", summary=__doc__, **how)
    app.state.service = service
    app.add_middleware(Guard, most=service.limits.body)
    for part in (router, completions.router, classify.router, people.router):
        app.include_router(part)
    return app


@router.get("/healthz")
async def alive(service: Gateway) -> Response:
    """Return whether the process and its engine work. On 503, restart the process."""
    ok = service.engine.alive
    return JSONResponse({"status": "ok" if ok else "the engine died, or every step fails"}, 200 if ok else 503)


@router.get("/readyz")
async def ready(service: Gateway) -> Response:
    """Return whether requests would be answered now."""
    return JSONResponse({"ready": service.engine.ready}, 200 if service.engine.ready else 503)


@router.get("/metrics")
async def metrics(service: Gateway) -> Response:
    """Return metrics for Prometheus."""
    return Response(service.metrics.text(service.engine.facts()), media_type="text/plain; version=0.0.4")


@router.get("/v1/task")
async def describe_task(service: Gateway, key: Caller) -> dict[str, Any]:
    """Return the prompt template, fields, and labels of a question, and the fields of an item of a history."""
    task, base = service.task, service.base.name

    def fields(form: Form) -> dict[str, Any]:
        return {"prompt": form.prompt, "inputs": list(form.inputs), "target": form.target}

    item = fields(task.item) | {"labels": task.labels if task.labelled else None}
    question = fields(task.query or task.item) | {"labels": task.labels, "examples": task.examples}
    return {"name": task.name, "description": task.description, **question, "item": item, "base": base}


@router.get("/", include_in_schema=False)
async def playground() -> Response:
    """Return the playground: one static page."""
    page, policy = _page()
    more = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
    return HTMLResponse(page, headers={"Content-Security-Policy": policy, **more})


@cache
def _page() -> tuple[str, str]:
    """Return the playground and its policy, which allows only its own script and calls to this server."""
    page = (resources.files("mta.serving.api") / "playground.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return page, (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _mta_error(_: Request, error: MtaError) -> Response:
    status, body, headers = error_of(error)
    return JSONResponse(body, status, headers)


async def _invalid_body(_: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        message = f"the body is not JSON, at character {first['loc'][-1]}"
        return JSONResponse(error_body(message, "invalid_request_error"), 400)
    if first["loc"] == ("body",) and isinstance(first.get("input"), bytes):
        message = "the body was not read as JSON: send the header Content-Type: application/json"
        return JSONResponse(error_body(message, "invalid_request_error"), 400)
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    message = f"{where}: {first['msg']}" if where else first["msg"]
    return JSONResponse(error_body(message, "invalid_request_error", param=where or None), 400)


async def _http_error(_: Request, error: HTTPException) -> Response:
    kinds = {401: ("authentication_error", "invalid_api_key"), 429: ("rate_limit_error", "rate_limit_exceeded")}
    kind, code = kinds.get(error.status_code, ("invalid_request_error", None))
    headers = dict(error.headers or {}) | ({"WWW-Authenticate": "Bearer"} if error.status_code == 401 else {})
    return JSONResponse(error_body(str(error.detail), kind, code), error.status_code, headers)

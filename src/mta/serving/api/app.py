"""The gateway: an OpenAI-compatible API over an engine, and per-person routes to read, change, and forget data."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mta.errors import MtaError
from mta.serving.api.completions import add_completions
from mta.serving.api.limits import BodyLimit, Unexpected
from mta.serving.api.people import add_people
from mta.serving.api.playground import add_page
from mta.serving.api.schemas import error_body
from mta.serving.api.service import Service, error_of
from mta.serving.api.sweep import Sweep


def create_app(service: Service) -> FastAPI:
    """Build the gateway as an ASGI application."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(Sweep(service).run())
        yield
        sweeping.cancel()
        await asyncio.wait([sweeping])
        await service.jobs.close()
        await service.engine.close()

    app = FastAPI(title="mta", summary=__doc__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    refusal = error_body(f"the request is longer than {service.limits.body} bytes", "invalid_request_error")
    app.add_middleware(BodyLimit, most=service.limits.body, refusal=json.dumps(refusal).encode())
    broken = error_body("internal server error", "server_error")
    app.add_middleware(Unexpected, refusal=json.dumps(broken).encode())
    _add_errors(app)
    _add_health(app, service)
    add_completions(app, service)
    add_people(app, service)
    add_page(app, service)
    return app


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    async def alive() -> Response:
        """Return whether the process and its engine work. On 503, restart the process."""
        ok = service.engine.alive
        return JSONResponse({"status": "ok" if ok else "the engine died, or every step fails"}, 200 if ok else 503)

    @app.get("/readyz")
    async def ready() -> Response:
        """Return whether requests would be answered now."""
        return JSONResponse({"ready": service.engine.ready}, 200 if service.engine.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        service.metrics.engine(service.engine.facts())
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(MtaError)
    async def mta_error(_: Request, error: MtaError) -> Response:
        status, body, headers = error_of(error)
        return JSONResponse(body, status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid_body(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        message = f"{where}: {first['msg']}" if where else first["msg"]
        return JSONResponse(error_body(message, "invalid_request_error", param=where or None), 400)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(error.status_code, "invalid_request_error")
        code = {401: "invalid_api_key", 429: "rate_limit_exceeded"}.get(error.status_code)
        headers = dict(error.headers or {}) | ({"WWW-Authenticate": "Bearer"} if error.status_code == 401 else {})
        return JSONResponse(error_body(str(error.detail), kind, code), error.status_code, headers)

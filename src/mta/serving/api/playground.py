"""The playground at ``/``: one static page. Its policy allows only its own script and calls to this server."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from mta.serving.api.service import Caller, Service


def add_page(app: FastAPI, service: Service) -> None:
    """Add the page, and the route that describes the task's fields."""
    page = (resources.files("mta.serving.api") / "playground.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": _policy(page),
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }

    @app.get("/", include_in_schema=False)
    async def playground() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    @app.get("/v1/task")
    async def task(key: Caller) -> dict[str, Any]:
        """Return the prompt template, the fields of an item, and the labels of a closed set."""
        form = service.task.item
        return {
            "name": service.task.name,
            "description": service.task.description,
            "prompt": form.prompt,
            "inputs": list(form.inputs),
            "target": form.target,
            "labels": service.task.labels if service.task.labelled else None,
            "base": service.base.name,
        }


def _policy(page: str) -> str:
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

"""Clients of a gateway: everybody is another person, asks by HTTP, and asks again as soon as they are answered."""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import httpx2
import numpy as np

TEXT = "the film was good and long with a story of people in a town where nothing ever ends"


@dataclass
class Times:
    """What the clients saw."""

    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, float]:
        found = {"tokens/s": self.tokens / self.seconds, "answers": len(self.first)}
        for name, times in (("first token", self.first), ("token", self.gaps)):
            found |= {f"{name} p{p} (ms)": 1000 * float(np.percentile(times, p)) for p in (50, 95, 99)}
        return {name: round(value, 1) for name, value in found.items()}


def prompt(draw: random.Random, words: int) -> str:
    """About as many tokens as words."""
    return " ".join(draw.choices(TEXT.split(), k=words))


async def pieces(client: httpx2.AsyncClient, model: str, text: str, most: int) -> AsyncIterator[tuple[float, int]]:
    """When each piece of an answer came, and how many tokens it is; last how many were told of no piece."""
    body = {"model": model, "prompt": text, "max_tokens": most, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    count = 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {await answer.aread()!r}")
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event, now = json.loads(line[6:]), time.monotonic()
                if "error" in event:
                    raise RuntimeError(str(event))
                if any(choice["text"] for choice in event["choices"]):
                    count += 1
                    yield now, 1
                if event.get("usage"):
                    yield now, event["usage"]["completion_tokens"] - count


async def load(url: str, models: Sequence[str], seconds: float, most: int, seed: int = 0) -> Times:
    """One client for each model, asking again and again; the same questions only with the same seed."""
    times, until = Times(), time.monotonic() + seconds

    async def client(n: int) -> None:
        draw = random.Random(f"{seed}/{n}")
        while time.monotonic() < until:
            last = begun = time.monotonic()
            async for now, count in pieces(http, models[n], prompt(draw, draw.randrange(40, 120)), most):
                times.tokens += count
                if count == 1:
                    (times.first if last == begun else times.gaps).append(now - last)
                    last = now

    start = time.monotonic()
    async with connected(url) as http:
        await asyncio.gather(*(client(n) for n in range(len(models))))
    times.seconds = time.monotonic() - start
    return times


async def cold(url: str, models: Sequence[str]) -> dict[str, float]:
    """Time to an answer of one token for people who were never asked before, and for the same people later."""
    draw = random.Random(0)
    found: dict[str, list[float]] = {"never asked before": [], "asked before": []}
    async with connected(url) as http:
        for times in found.values():
            for model in models:
                start = time.monotonic()
                async for _ in pieces(http, model, prompt(draw, 48), 1):
                    pass
                times.append(time.monotonic() - start)
    medians = {f"{name} (ms)": round(1000 * statistics.median(times), 1) for name, times in found.items()}
    first, later = medians.values()
    return medians | {"added by the first use (ms)": round(first - later, 1)}


async def delay(url: str, models: Sequence[str], newcomer: str) -> dict[str, float]:
    """How long everybody waits for a token while somebody with a prompt of 400 tokens comes in."""
    draw = random.Random(0)
    gaps: dict[str, list[float]] = {"quiet": [], "newcomer": []}
    now_is, answered = ["quiet"], asyncio.Event()

    async def runs(model: str) -> None:
        while not answered.is_set():
            last = None
            async for now, count in pieces(http, model, prompt(draw, 40), 128):
                if last is not None and count == 1:
                    gaps[now_is[0]].append(now - last)
                last = now

    async def comes() -> None:
        await asyncio.sleep(3)
        now_is[0] = "newcomer"
        async for _ in pieces(http, newcomer, prompt(draw, 400), 1):
            pass
        now_is[0] = "quiet"
        answered.set()

    async with connected(url) as http:
        await asyncio.gather(comes(), *map(runs, models))
    return {
        "quiet p50 (ms)": round(1000 * statistics.median(gaps["quiet"]), 1),
        "longest while 400 tokens are read (ms)": round(1000 * max(gaps["newcomer"], default=math.nan), 1),
    }


def connected(url: str) -> httpx2.AsyncClient:
    limits = httpx2.Limits(max_connections=None)
    return httpx2.AsyncClient(base_url=url, timeout=300, limits=limits)

"""Prometheus metrics. No label holds an id, a key name, or user text."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The metrics of one gateway; each gateway of a process has its own registry."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("mta_requests", "Requests by kind and status", ["kind", "status"], registry=registry)
        self.first_token = _seconds(registry, "first_token", "Time from request to first token")
        self.token_gap = _seconds(registry, "token", "Time between two tokens of an answer")
        self.answer = _seconds(registry, "answer", "Time from request to the end of the answer")
        self.prompt_tokens = Counter("mta_prompt_tokens", "Prompt tokens", registry=registry)
        self.answer_tokens = Counter("mta_answer_tokens", "Generated tokens", registry=registry)
        self.open = Gauge("mta_open_answers", "Answers running or waiting", registry=registry)
        self._engine: dict[str, Gauge] = {}

    def text(self, facts: Mapping[str, tuple[float, str]]) -> bytes:
        """Return all metrics in Prometheus text format, with the engine's: name -> (value, description)."""
        for name, (value, about) in facts.items():
            if name not in self._engine:
                self._engine[name] = Gauge(f"mta_engine_{name}", about, registry=self.registry)
            self._engine[name].set(value)
        return generate_latest(self.registry)


def _seconds(registry: CollectorRegistry, name: str, about: str) -> Histogram:
    return Histogram(f"mta_{name}_seconds", about, buckets=_BUCKETS, registry=registry)

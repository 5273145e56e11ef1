"""What is counted, for Prometheus. No label holds an id, a key's name or anything a person wrote."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """One registry for each gateway, so that several live in one process."""

    def __init__(self) -> None:
        self.registry = here = CollectorRegistry()
        self.requests = Counter("mta_requests", "Requests, by how they ended", ["kind", "status"], registry=here)
        self.first_token = _seconds(here, "first_token", "From request to first token")
        self.token_gap = _seconds(here, "token", "Between two tokens of an answer")
        self.answer = _seconds(here, "answer", "From request to the end of the answer")
        self.prompt_tokens = Counter("mta_prompt_tokens", "Prompt tokens", registry=here)
        self.cached_tokens = Counter("mta_cached_tokens", "Prompt tokens that were known already", registry=here)
        self.answer_tokens = Counter("mta_answer_tokens", "Tokens of answers", registry=here)
        self.open = Gauge("mta_open_answers", "Answers running or waiting", registry=here)
        self._engine: dict[str, Gauge] = {}

    def engine(self, facts: Mapping[str, tuple[float, str]]) -> None:
        """What the engine says of itself: name -> (value, what it is)."""
        for name, (value, about) in facts.items():
            if name not in self._engine:
                self._engine[name] = Gauge(f"mta_engine_{name}", about, registry=self.registry)
            self._engine[name].set(value)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


def _seconds(registry: CollectorRegistry, name: str, about: str) -> Histogram:
    return Histogram(f"mta_{name}_seconds", about, buckets=_BUCKETS, registry=registry)

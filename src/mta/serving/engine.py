"""The engine protocol: the gateway passes an ``Ask`` and receives the answer as a stream of ``Piece``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from mta.errors import InputError, MtaError
from mta.personalize.adapters import Nobody

Finish = Literal["stop", "length"]
LOST = "this answer could not be computed"
LATER = "Ask again in a few seconds; GET /readyz shows when the engine is ready."


class Refused(InputError):
    """The request cannot be answered as sent. Callers see the full message and hint."""


class QueueFull(MtaError):
    """The queue is full."""


class AnswerLost(MtaError):
    """One answer could not be computed; other answers are not affected."""


class EngineGone(MtaError):
    """The engine has stopped and answers no requests."""


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a person: merge and stack, or the merge alone if ``stacked`` is false.

    ``seal`` identifies the content: after forgetting, the same number may name other content (``Store.seal``).
    """

    person: str
    number: int
    stacked: bool = True
    seal: str = ""


Who = Version | Nobody


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to an engine: an answer from a person's model, the pooled model, or the base.

    ``asker`` identifies the caller: cached keys and values are never shared between callers, even for the same person.
    ``top_logprobs`` is the number of alternatives per token; None turns log probabilities off. With a ``seed``,
    sampling is reproducible up to rounding.
    """

    prompt: tuple[int, ...]
    who: Who
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int | None = None
    asker: str = ""

    def check(self, length: int) -> None:
        """Raises Refused if the prompt is empty, or prompt and answer exceed ``length`` tokens together."""
        if not self.prompt:
            raise Refused("the prompt is empty; expected at least one token", hint="Send some text.")
        if (size := len(self.prompt)) + self.max_tokens > length:
            raise Refused(
                f"the prompt has {size} tokens and max_tokens is {self.max_tokens}, together more than {length}",
                hint="Shorten the prompt, or lower max_tokens.",
            )


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer, its log probability, and the most likely alternatives, if requested."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, or with ``finish`` the end of the answer. ``cached`` counts prompt tokens reused from the cache."""

    token: Token | None = None
    finish: Finish | None = None
    cached: int = 0


class Engine(Protocol):
    """Answers requests for different people from one base. Closing an answer's iterator cancels the answer."""

    def answer(self, ask: Ask) -> AsyncIterator[Piece]:
        """Stream the tokens of an answer. Raises PersonNotFound, Refused, QueueFull, EngineGone."""

    async def forget(self, person: str) -> None:
        """End the person's running answers, and drop everything computed for the person."""

    async def versions(self) -> set[Version]:
        """Return the person versions in memory: running answers, adapters, keys and values."""

    @property
    def ready(self) -> bool:
        """Whether requests would be answered now."""

    @property
    def alive(self) -> bool:
        """Whether the engine can become ready again; if not, the process must be restarted."""

    def facts(self) -> Mapping[str, tuple[float, str]]:
        """Return the engine's metrics: name -> (value, description). None describes a single person."""

    async def close(self) -> None:
        """Finish accepted requests, accept no new ones, and stop."""

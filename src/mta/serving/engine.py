"""The base class of engines: the gateway passes an ``EngineRequest`` and receives a stream of ``AnswerPiece``."""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote, unquote

from mta.errors import InputError, MtaError
from mta.personalize.adapters import BASE, TASK, SharedModel

log = logging.getLogger("mta")
T = TypeVar("T")
Finish = Literal["stop", "length"]
LOST = "this answer could not be computed"
TOO_LONG = "context_length_exceeded"  # OpenAI's code, on which clients shorten their prompts
QUEUED = 256  # answers that may wait, beside those that run
COLDEST = 1e-3  # lower temperatures are greedy: dividing by less could overflow
_ZERO = "zero"
_SEAL = 16  # hex digits of the seal, enough to distinguish contents of the same version number
_PERSON = re.compile(r"person:(?P<id>.+?)(?:@v(?P<version>[1-9][0-9]{0,8}))?(?P<merged>#merged)?", re.DOTALL)
_WIRE = re.compile(r"(?P<model>.+)~(?P<seal>[0-9a-f]{16})", re.DOTALL)
LATER = "Ask again in a few seconds; GET /readyz shows when the engine is ready."


def log_failure(what: str, error: BaseException) -> None:
    """Log a failure with only the error's type and place, because the message may contain a person's data."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    log.error("%s failed: %s%s", what, type(error).__name__, place)


class Refused(InputError):
    """The request cannot be answered as sent. Callers see the full message and hint, and OpenAI's ``code``, if any."""

    def __init__(self, message: str, hint: str, code: str | None = None) -> None:
        super().__init__(message, hint)
        self.code = code


class QueueFull(MtaError):
    """The queue is full."""


class AnswerLost(MtaError):
    """One answer could not be computed; other answers are not affected."""


class ModelRemoved(MtaError):
    """The model was forgotten, or removed from the store, before its answer was complete."""


class EngineGone(MtaError):
    """The engine has stopped and answers no requests."""


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a person: merge and stack, or the merge alone if ``stacked`` is false.

    ``number`` 0 means the newest version, and occurs only in requests. ``seal`` identifies the content: after
    forgetting, the same number may name other content (``Store.seal``).
    """

    person: str
    number: int = 0
    stacked: bool = True
    seal: str = ""


ServedModel = Version | SharedModel


def named(model: str, base: str) -> ServedModel | None:
    """Parse a model name: ``person:ann``, ``person:ann@v3``, ``person:ann#merged``, ``task``, or the base's name.

    Returns None for other names. Ids are percent-decoded. Callers that build names from arbitrary ids must encode the
    ids, as ``person_name`` does, because an id may end like a version.
    """
    if model == base:
        return BASE
    if model == TASK.value:
        return TASK
    if parts := _PERSON.fullmatch(model):
        return Version(unquote(parts["id"]), int(parts["version"] or 0), parts["merged"] is None)
    return None


def person_name(id: str) -> str:
    """Return the name of a person's newest version in requests."""
    return f"person:{quote(id, safe='')}"


def wire_name(who: ServedModel) -> str:
    """Return the name of a version in vLLM, ``person:ann@v3#merged~<seal>``. A name always means the same content.

    The base's name is ``zero``, an adapter of zeros: in a batch with people's rows, vLLM on a CPU computes rows without
    an adapter with the adapter in its last slot.
    """
    if who is BASE:
        return _ZERO
    if isinstance(who, SharedModel):
        return who.value
    return f"{person_name(who.person)}@v{who.number}{'' if who.stacked else '#merged'}~{who.seal[:_SEAL]}"


def from_wire(name: str) -> ServedModel | None:
    """Return the model of a ``wire_name``, or None for other names."""
    if name == _ZERO:
        return BASE
    sealed = _WIRE.fullmatch(name)
    who = named(sealed["model"] if sealed else name, BASE.value)
    if isinstance(who, Version):
        return replace(who, seal=sealed["seal"]) if sealed and who.number else None
    return None if sealed else who


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request to an engine: an answer from a person's model, the pooled model, or the base.

    ``asker`` identifies the caller: cached keys and values are never shared between callers, even for the same person.
    ``top_logprobs`` is the number of alternatives per token; None turns log probabilities off. With a ``seed``,
    sampling is reproducible up to rounding. With ``labels``, the engine generates nothing and scores these answers,
    each with its end token. ``max_tokens`` must then be at least the longest label's number of tokens.
    """

    prompt: tuple[int, ...]
    who: ServedModel
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int | None = None
    asker: str = ""
    labels: tuple[tuple[int, ...], ...] = ()

    def check(self, length: int) -> None:
        """Raises Refused if the prompt is empty, or prompt and answer exceed ``length`` tokens together."""
        if not self.prompt:
            raise Refused("the prompt is empty; expected at least one token", hint="Send some text.")
        if (size := len(self.prompt)) + self.max_tokens > length:
            raise Refused(
                f"the prompt has {size} tokens and max_tokens is {self.max_tokens}, together more than {length}",
                hint="Shorten the prompt, or lower max_tokens.",
                code=TOO_LONG,
            )


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer, its log probability, and the most likely alternatives, if requested."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class AnswerPiece:
    """One token, or with ``finish`` the end of the answer. ``cached`` counts prompt tokens reused from the cache.

    The only piece of a request with labels has the log probability of each label in ``scores``.
    """

    token: Token | None = None
    finish: Finish | None = None
    cached: int = 0
    scores: tuple[float, ...] = ()


async def together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines at once and return their results. Errors and cancellation are raised after all have ended."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


Pieces = asyncio.Queue[AnswerPiece | MtaError]


class Engine(ABC):
    """Answers requests for different people from one base. The base class checks, queues, and ends answers.

    Prompt and answer have at most ``length`` tokens together; more than ``most`` answers at once are refused.
    """

    def __init__(self, length: int, most: int) -> None:
        self.length, self.most = length, most
        self._open: dict[Any, Any] = {}  # answers in progress
        self._closing = False  # no new request is accepted

    async def answer(self, request: EngineRequest) -> AsyncIterator[AnswerPiece]:
        """Stream the tokens of an answer; closing the iterator cancels the answer.

        Raises Refused for a prompt that does not fit, PersonNotFound, StateCorrupt, OtherBank, QueueFull, ModelRemoved,
        EngineGone.
        """
        request.check(self.length)
        if self._closing:
            raise EngineGone("the engine has stopped", hint=LATER)
        if len(self._open) >= self.most:
            raise QueueFull(f"{self.most} requests are running or waiting already", hint="Retry a little later.")
        pieces: Pieces = asyncio.Queue()
        cancel = self._begin(request, pieces)
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece, MtaError):
                    raise piece
                yield piece
                if piece.finish:
                    return
        finally:
            cancel()

    @abstractmethod
    def _begin(self, request: EngineRequest, pieces: Pieces) -> Callable[[], object]:
        """Start an answer whose pieces, or error, are put into the queue; return a function that cancels the answer."""

    async def forget(self, person: str, askers: Collection[str] = ()) -> None:
        """End the person's running answers with ModelRemoved, and drop everything computed for the person.

        Also ends answers of other models to ``askers``: the person's own, and callers who saw the person's items.
        """
        error = ModelRemoved("the person was forgotten", hint="Ask the pooled model: task")
        await self._drop(lambda who: who.person == person, error, askers)

    async def drop(self, versions: Collection[Version], askers: Collection[str] = ()) -> None:
        """End running answers of these versions and to ``askers`` with ModelRemoved, and drop their cached data."""
        error = ModelRemoved("the store no longer has this version", hint="Ask again for the newest version.")
        await self._drop(versions.__contains__, error, askers)

    @abstractmethod
    async def _drop(self, matches: Callable[[Version], bool], error: MtaError, askers: Collection[str] = ()) -> None:
        """End the answers of the versions that match, and to ``askers``; drop everything computed for them."""

    @abstractmethod
    async def versions(self) -> set[Version]:
        """Return the person versions in memory: running answers, adapters, keys and values."""

    @property
    def ready(self) -> bool:
        """Whether requests would be answered now, as far as the gateway knows."""
        return not self._closing and self.alive

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether the engine can become ready again; if not, the process must be restarted."""

    @abstractmethod
    def facts(self) -> Mapping[str, tuple[float, str]]:
        """Return the engine's metrics: name -> (value, description). No metric describes a single person."""

    @abstractmethod
    async def close(self) -> None:
        """Finish accepted requests, accept no new ones, and stop."""

"""What the gateway asks of an engine, whichever it is: an ``Ask`` in, ``Piece`` after ``Piece`` out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from mta.errors import InputError, MtaError
from mta.personalize.adapters import Nobody

Finish = Literal["stop", "length"]
LOST = "this answer could not be computed"
LATER = "Ask again in a few seconds; GET /readyz tells whether it would be answered."


class Refused(InputError):
    """What a caller asks for cannot be: the one kind that is told to them in full, so its hint is for them."""


class QueueFull(MtaError):
    """So many requests wait that another would wait too long; ``retry_after`` says when to come again, in seconds."""

    retry_after = 1


class AnswerLost(MtaError):
    """One answer could not be computed; all others go on."""


class EngineGone(MtaError):
    """The engine has stopped: what was asked of it gets no answer."""


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a person; without its stack where ``stacked`` is off: the merge alone.

    ``seal`` tells its content from what another version of that number may once have held (``Store.seal``).
    """

    person: str
    number: int
    stacked: bool = True
    seal: str = ""


Who = Version | Nobody


@dataclass(frozen=True, slots=True)
class Ask:
    """One answer that is wanted, of a person, of the pooled model or of the base.

    ``asker`` is whoever asked: what was computed for one is not used for another, even of the same person.
    ``top_logprobs`` alternatives are told for each token, none where it is None. With a ``seed`` sampling gives the
    same tokens again, as far as rounding goes.
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
        """Raises Refused where there is no prompt, or prompt and answer have more than ``length`` tokens."""
        if not self.prompt:
            raise Refused("the prompt is empty; expected at least one token", hint="Send some text.")
        if (size := len(self.prompt)) + self.max_tokens > length:
            raise Refused(
                f"the prompt has {size} tokens and {self.max_tokens} are to come, together more than {length}",
                hint="Shorten it, or lower max_tokens.",
            )


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer, its log probability, and the likeliest ones beside it, where they were asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A token, or with ``finish`` the end of the answer, which tells how many prompt tokens were known already."""

    token: Token | None = None
    finish: Finish | None = None
    cached: int = 0


class Engine(Protocol):
    """Answers rows of different people from one base. An answer whose iterator is closed is cancelled."""

    def answer(self, ask: Ask) -> AsyncIterator[Piece]:
        """The tokens of an answer as they come. Raises PersonNotFound, Refused, QueueFull, EngineGone."""

    async def forget(self, person: str) -> None:
        """End what runs for a person, and drop all that was computed for them."""

    async def versions(self) -> set[Version]:
        """The versions of people of which something is in memory: answers that run, adapters, keys and values."""

    @property
    def ready(self) -> bool:
        """Whether requests would be answered."""

    @property
    def alive(self) -> bool:
        """Whether it will ever be ready again; if not, the process has to be started anew."""

    def facts(self) -> Mapping[str, tuple[float, str]]:
        """What an operator wants to know of it: name -> (value, what it is). Nothing that tells of one person."""

    async def close(self) -> None:
        """Answer what is running, take nothing new, and stop."""

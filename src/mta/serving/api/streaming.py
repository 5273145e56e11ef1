"""One request's answers: its prompt as tokens, n asks to the engine, and their text as it comes.

No half characters are shown, and nothing of a stop text.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from mta.model.base import BaseModel
from mta.personalize.adapters import BASE
from mta.serving.api.schemas import ChatRequest, Request
from mta.serving.engine import Ask, Engine, Finish, Refused, Token, Who

_LETTERS = 32  # of one token, at the very most that is read
_HALF = "\N{REPLACEMENT CHARACTER}"
_BYTES = 4  # of the longest character: what is no character by then will never be one


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of answer ``index``: text that can be shown, the tokens behind it, and how it ended if it did."""

    index: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    cached: int = 0


@dataclass(slots=True)
class Whole:
    """An answer put together."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None
    cached: int = 0

    def add(self, part: Part) -> None:
        """The next piece of it."""
        self.text += part.text
        self.tokens.extend(part.tokens)
        self.finish, self.cached = part.finish or self.finish, part.cached


class Text:
    """The text of one answer, given out piece by piece.

    A piece is held back while it may still be the beginning of a stop text, or half of a character.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.stopped = False
        self._tokens: list[int] = []
        self._from = 0  # tokens before are given out whole; decoding goes on a little before the new ones
        self._known = ""  # the text of the tokens from there on that is in ``_text`` already
        self._text = ""
        self._waited = 0
        self._given = 0

    def add(self, token: int) -> str:
        """What can be shown after one more token."""
        self._tokens.append(token)
        text = self._decoded(self._from)
        self._waited += 1
        if text.endswith(_HALF) and self._waited < _BYTES:
            return ""
        self._waited = 0
        self._text += text[len(self._known) :]
        # The next tokens are decoded behind this one, for some tokenizers write a word differently at a beginning.
        self._from = len(self._tokens) - 1
        self._known = self._decoded(self._from)
        return self._give(held=max((len(stop) - 1 for stop in self.stops), default=0))

    def end(self) -> str:
        """What is left when the answer is over."""
        rest = self._decoded(self._from)[len(self._known) :]
        self._text += rest
        self._known += rest
        return self._give(held=0)

    def _give(self, held: int) -> str:
        if self.stopped:
            return ""
        places = [(self._text.find(stop, max(self._given - len(stop), 0)), len(stop)) for stop in self.stops]
        found = [(at + length, at) for at, length in places if at >= 0]  # whichever is whole first ends the answer
        if found:
            self.stopped = True
        until = min(found)[1] if found else max(self._given, len(self._text) - held)
        piece, self._given = self._text[self._given : until], max(until, self._given)
        return piece

    def _decoded(self, start: int) -> str:
        return str(self.tokenizer.decode(self._tokens[start:], skip_special_tokens=True))


def ask_of(request: Request, who: Who, base: BaseModel, asker: str, length: int, most: int, usual: int) -> Ask:
    """A request as tokens: prompt and answer have ``length`` together, an answer ``most``.

    Without a number of its own an answer has at most ``usual``; the base's, which is bound to no task, may take all the
    room there is. Raises Refused.
    """
    if (letters := request.letters) > length * _LETTERS:
        raise Refused(
            f"the prompt has {letters} characters; prompt and answer have at most {length} tokens here",
            hint=f"Send at most {length * _LETTERS} characters.",
        )
    if isinstance(request, ChatRequest):
        turns = [{"role": m.role.replace("developer", "system"), "content": m.text} for m in request.messages]
        prompt = base.prompts.chat(turns)
    else:
        prompt = base.prompts.text(request.prompt)
    if (request.most or 0) > most:
        raise Refused(
            f"max_tokens is {request.most}; an answer has at most {most} here", hint=f"Send max_tokens: {most}"
        )
    return Ask(
        prompt,
        who,
        max_tokens=request.most or max(min(length - len(prompt), most, most if who is BASE else usual), 1),
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        top_logprobs=request.alternatives,
        asker=asker,
    )


async def answer(
    engine: Engine, ask: Ask, base: BaseModel, stops: Sequence[str], index: int = 0
) -> AsyncIterator[Part]:
    """The text of one answer as it comes; it ends before the first stop text."""
    text = Text(base.tokenizer, stops)
    held: list[Token] = []  # tokens whose text is still held back
    async with aclosing(engine.answer(ask)) as pieces:  # type: ignore[type-var]
        async for piece in pieces:
            shown = text.add(piece.token.id) if piece.token else text.end()
            held += [piece.token] if piece.token else []
            finish: Finish | None = "stop" if text.stopped else piece.finish
            if shown or finish:
                yield Part(index, shown, tuple(held), finish, piece.cached)
                held = []
            if finish:
                return


async def answers(engine: Engine, ask: Ask, base: BaseModel, request: Request) -> AsyncIterator[Part]:
    """The pieces of all n answers in the order they come. Whoever stops listening cancels them all."""
    told: asyncio.Queue[Part | BaseException | None] = asyncio.Queue()

    async def one(index: int) -> None:
        mine = ask if ask.seed is None else replace(ask, seed=ask.seed + index)
        try:
            async with aclosing(answer(engine, mine, base, request.stops, index)) as parts:  # type: ignore[type-var]
                async for part in parts:
                    told.put_nowait(part)
        except BaseException as error:
            told.put_nowait(error)
            raise
        told.put_nowait(None)

    tasks = [asyncio.create_task(one(index)) for index in range(request.n)]
    try:
        left = len(tasks)
        while left:
            part = await told.get()
            if isinstance(part, BaseException):
                raise part
            if part is None:
                left -= 1
            else:
                yield part
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

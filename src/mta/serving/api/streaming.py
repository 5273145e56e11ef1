"""Turns a request into n engine requests and streams the text of the answers.

Half characters and stop texts are never sent.
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

_LETTERS = 32  # upper bound of characters per token: longer prompts are refused without tokenizing
_HALF = "\N{REPLACEMENT CHARACTER}"
_BYTES = 4  # of the longest character: a character incomplete after as many tokens stays incomplete


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of answer ``index``: text that is final, its tokens, and the reason if the answer ended."""

    index: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    cached: int = 0


@dataclass(slots=True)
class Whole:
    """An answer collected from its parts."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None
    cached: int = 0

    def add(self, part: Part) -> None:
        """Append the next part."""
        self.text += part.text
        self.tokens.extend(part.tokens)
        self.finish, self.cached = part.finish or self.finish, part.cached


class Text:
    """Detokenizes one answer piece by piece.

    Text is held back while it may be the beginning of a stop text, or part of a character.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.stopped = False
        self._tokens: list[int] = []
        self._from = 0  # decoding starts at this token, one before the new ones
        self._known = ""  # text of the tokens from ``_from`` on that ``_text`` already contains
        self._text = ""
        self._waited = 0  # tokens since the last complete character
        self._given = 0  # characters already returned

    def add(self, token: int) -> str:
        """Add one token; return the text that is final now."""
        self._tokens.append(token)
        text = self._decoded(self._from)
        self._waited += 1
        if text.endswith(_HALF) and self._waited < _BYTES:
            return ""
        self._waited = 0
        self._text += text[len(self._known) :]
        # The next tokens are decoded behind this one: some tokenizers write a word differently at the start of a text.
        self._from = len(self._tokens) - 1
        self._known = self._decoded(self._from)
        return self._give(held=max((len(stop) - 1 for stop in self.stops), default=0))

    def end(self) -> str:
        """Return the remaining text at the end of the answer."""
        rest = self._decoded(self._from)[len(self._known) :]
        self._text += rest
        self._known += rest
        return self._give(held=0)

    def _give(self, held: int) -> str:
        if self.stopped:
            return ""
        places = [(self._text.find(stop, max(self._given - len(stop), 0)), len(stop)) for stop in self.stops]
        found = [(at + length, at) for at, length in places if at >= 0]  # the stop text completed first ends the answer
        if found:
            self.stopped = True
        until = min(found)[1] if found else max(self._given, len(self._text) - held)
        piece, self._given = self._text[self._given : until], max(until, self._given)
        return piece

    def _decoded(self, start: int) -> str:
        return str(self.tokenizer.decode(self._tokens[start:], skip_special_tokens=True))


def ask_of(request: Request, who: Who, base: BaseModel, asker: str, length: int, most: int, usual: int) -> Ask:
    """Tokenize a request. Prompt and answer have at most ``length`` tokens together, an answer at most ``most``.

    Without max_tokens an answer has at most ``usual`` tokens; an answer of the base, which has no task, may fill the
    remaining length. Raises Refused.
    """
    if (letters := request.letters) > length * _LETTERS:
        raise Refused(
            f"the prompt has {letters} characters; prompt and answer may have at most {length} tokens together",
            hint=f"Send at most {length * _LETTERS} characters.",
        )
    if isinstance(request, ChatRequest):
        turns = [{"role": m.role.replace("developer", "system"), "content": m.text} for m in request.messages]
        prompt = base.prompts.chat(turns)
    else:
        prompt = base.prompts.text(request.prompt)
    if (request.most or 0) > most:
        raise Refused(
            f"max_tokens is {request.most}; an answer may have at most {most} tokens", hint=f"Send max_tokens: {most}"
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
    """Stream the text of one answer, which ends before the first stop text."""
    text = Text(base.tokenizer, stops)
    held: list[Token] = []  # tokens with text that is still held back
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
    """Stream the parts of all n answers as they come; closing the iterator cancels all answers."""
    parts: asyncio.Queue[Part | BaseException | None] = asyncio.Queue()

    async def one(index: int) -> None:
        seeded = ask if ask.seed is None else replace(ask, seed=ask.seed + index)
        try:
            async with aclosing(answer(engine, seeded, base, request.stops, index)) as stream:  # type: ignore[type-var]
                async for part in stream:
                    parts.put_nowait(part)
        except BaseException as error:
            parts.put_nowait(error)
            raise
        parts.put_nowait(None)

    tasks = [asyncio.create_task(one(index)) for index in range(request.n)]
    try:
        left = len(tasks)
        while left:
            part = await parts.get()
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

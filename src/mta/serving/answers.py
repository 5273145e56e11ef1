"""One request's answers: its prompt as tokens, n asks to the engine, and their text as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from mta.model.base import BaseModel
from mta.personalize.adapters import BASE
from mta.serving.engine import Ask, Engine, Finish, Refused, Token, Who
from mta.serving.openai import ChatRequest, Request
from mta.serving.text import Text

_LETTERS = 32  # of one token, at the very most that is read


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

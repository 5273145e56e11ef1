"""From an engine's tokens to parts of text: half characters and stop texts are never sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response

from mta.serving.api.schemas import AnswerText
from mta.serving.engine import Engine, EngineRequest, Finish, Token

_HALF = "\N{REPLACEMENT CHARACTER}"
_BYTES = 4  # of the longest character: a character incomplete after as many tokens stays incomplete


class Detokenizer:
    """Detokenizes one answer piece by piece.

    Text is held back while it may be the beginning of a stop text, or part of a character. ``before`` are tokens that
    the answer continues in the middle of a text: some tokenizers omit the space before a text's first word.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.stopped = False
        self._tokens = list(before)  # the new tokens, and those of the character before them
        self._new = 0  # number of new tokens: their text is not in ``_pending``
        self._known = self._decoded()  # the part of their text that is no part of the answer, or was in ``_pending``
        if self._known.endswith(_HALF):  # a character in several tokens, which would be decoded with new ones
            self._tokens, self._known = [], ""
        self._pending = ""  # text that is not returned yet

    def add(self, token: int) -> str:
        """Add one token; return the text that is final now."""
        self._tokens.append(token)
        self._new += 1
        text = self._decoded()
        half = text.endswith(_HALF)
        if half and self._new < _BYTES:
            return ""
        self._pending += text[len(self._known) :]
        # The next tokens are decoded behind this one: some tokenizers write a word differently at the start of a text.
        # All tokens of a character stay together: some tokenizers decode neighboring bytes only as a whole.
        self._tokens = [token] if half else self._tokens[-self._new :]
        self._known, self._new = self._decoded(), 0
        return self._give(held=max((len(stop) - 1 for stop in self.stops), default=0))

    def end(self) -> str:
        """Return the remaining text at the end of the answer."""
        self._pending += self._decoded()[len(self._known) :]
        return self._give(held=0)

    def _give(self, held: int) -> str:
        places = [(self._pending.find(stop), len(stop)) for stop in self.stops]
        ends = [(at + length, at) for at, length in places if at >= 0]  # the stop text completed first ends the answer
        self.stopped = bool(ends)
        until = min(ends)[1] if ends else max(len(self._pending) - held, 0)
        piece, self._pending = self._pending[:until], self._pending[until:]
        return piece

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self._tokens, skip_special_tokens=True))


async def stream_answer(
    engine: Engine, request: EngineRequest, tokenizer: Any, stops: Sequence[str], before: Sequence[int] = ()
) -> AsyncGenerator[AnswerText]:
    """Stream the parts of an answer, which continues ``before``, until its first stop text.

    Closing the generator cancels the answer.
    """
    text = Detokenizer(tokenizer, stops, before)
    held: list[Token] = []  # tokens with text that is still held back
    async with aclosing(engine.answer(request)) as pieces:  # type: ignore[type-var]
        async for piece in pieces:
            shown = text.add(piece.token.id) if piece.token else text.end()
            held += [piece.token] if piece.token else []
            finish: Finish | None = "stop" if text.stopped else piece.finish
            if shown or finish:
                yield AnswerText(shown, tuple(held), finish, piece.cached)
                held = []
            if finish:
                return


async def until_disconnect(http: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Return the response of ``work``; cancel ``work`` when the caller disconnects, so that its slot is freed."""

    async def disconnected() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else Response(status_code=499)
    finally:
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)

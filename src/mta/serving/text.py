"""Tokens as they come, as text that can be shown: no half characters, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HALF = "\N{REPLACEMENT CHARACTER}"
_BYTES = 4  # of the longest character: what is no character by then will never be one


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

"""Requests and answers in OpenAI's shapes. What we do not know is refused, not passed over."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mta.serving.engine import Token


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_as_good_as_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class TextPart(_Request):
    """A part of a message; only text is read."""

    type: Literal["text"]
    text: str


class Message(_Request):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """All of its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Request):
    """What is told at the end of a stream."""

    include_usage: bool = False


class Common(_Request):
    """What both kinds of request have."""

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] = 1
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    fallback: Literal["task", "base"] | None = None  # ours: who answers for a person who is not here
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None

    @property
    def stops(self) -> list[str]:
        """The texts an answer ends before."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def usage_in_stream(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Common):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _logprobs_go_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def letters(self) -> int:
        """The characters of all turns."""
        return sum(len(message.text) for message in self.messages)

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens are told beside each, or None for no logprobs at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most(self) -> int | None:
        """The most tokens of an answer."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Common):
    """``POST /v1/completions``."""

    prompt: str
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] = False
    best_of: Literal[1] | None = None

    @property
    def letters(self) -> int:
        """The characters of the prompt."""
        return len(self.prompt)

    @property
    def alternatives(self) -> int | None:
        """As in a chat."""
        return self.logprobs

    @property
    def most(self) -> int | None:
        """As in a chat; OpenAI's default is 16."""
        return self.max_tokens or 16


Request = ChatRequest | CompletionRequest


class Shape:
    """How the answers to one request are written down."""

    def __init__(self, request: Request, model: str, id: str, tokenizer: Any) -> None:
        self.chat, self.id, self.tokenizer = isinstance(request, ChatRequest), id, tokenizer
        self.model, self.created = model, int(time.time())
        self._told = dict[int, int]()  # characters of each answer's tokens whose places were told

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """An answer that is not streamed."""
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {"choices": list(choices), "usage": usage}

    def part(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """One event of a stream."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._head(kind) | {"choices": list(choices)} | ({"usage": usage} if usage else {})

    def choice(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        """One whole answer."""
        body = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return {"index": index, **body, "logprobs": self._logprobs(index, tokens), "finish_reason": finish}

    def delta(
        self, index: int, text: str, tokens: Sequence[Token], finish: str | None, first: bool = False
    ) -> dict[str, Any]:
        """A piece of an answer."""
        said = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        body = {"delta": said} if self.chat else {"text": text}
        return {"index": index, **body, "logprobs": self._logprobs(index, tokens), "finish_reason": finish}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        told = [token for token in tokens if token.logprob is not None]
        if not told:
            return None
        if self.chat:
            return {
                "content": [
                    self._one(t.id, t.logprob) | {"top_logprobs": [self._one(id, p) for id, p in t.top]} for t in told
                ],
                "refusal": None,
            }
        texts = [self._text(t.id) for t in told]
        before = self._told.get(index, 0)
        starts = [before + sum(map(len, texts[:n])) for n in range(len(texts))]
        self._told[index] = before + sum(map(len, texts))
        top = [{self._text(id): p for id, p in t.top} for t in told]
        return {
            "tokens": texts,
            "token_logprobs": [t.logprob for t in told],
            "top_logprobs": top if any(top) else None,
            "text_offset": starts,
        }

    def _one(self, id: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(id)
        half = "\N{REPLACEMENT CHARACTER}" in text  # of a character: its bytes are not known from here
        return {"token": text, "logprob": logprob, "bytes": None if half else list(text.encode())}

    def _text(self, id: int) -> str:
        return str(self.tokenizer.decode([id]))


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage_of(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """What an answer took."""
    details = {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion, **details}

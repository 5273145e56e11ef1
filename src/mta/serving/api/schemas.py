"""Requests and answers in OpenAI's formats. Unknown fields are refused, never ignored."""

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
    def _drop_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class TextPart(_Request):
    """A text part of a message; other types are refused."""

    type: Literal["text"]
    text: str


class Message(_Request):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The message's full text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Request):
    """Options for the end of a stream."""

    include_usage: bool = False


class Common(_Request):
    """Fields of both kinds of request."""

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
    fallback: Literal["task", "base"] | None = None  # extension: the model that answers for an unknown person
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None

    @property
    def stops(self) -> list[str]:
        """Texts before which an answer ends."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def usage_in_stream(self) -> bool:
        """Whether the stream ends with token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Common):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def letters(self) -> int:
        """Number of characters of all turns."""
        return sum(len(message.text) for message in self.messages)

    @property
    def alternatives(self) -> int | None:
        """Number of alternatives per token, or None without log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most(self) -> int | None:
        """Maximum number of tokens of an answer."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Common):
    """``POST /v1/completions``."""

    prompt: str
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] = False
    best_of: Literal[1] | None = None

    @property
    def letters(self) -> int:
        """Number of characters of the prompt."""
        return len(self.prompt)

    @property
    def alternatives(self) -> int | None:
        """Number of alternatives per token, or None without log probabilities."""
        return self.logprobs

    @property
    def most(self) -> int | None:
        """Maximum number of tokens of an answer; OpenAI's default is 16."""
        return self.max_tokens or 16


Request = ChatRequest | CompletionRequest


class Shape:
    """Formats the answers to one request as OpenAI objects."""

    def __init__(self, request: Request, model: str, id: str, tokenizer: Any) -> None:
        self.chat, self.id, self.tokenizer = isinstance(request, ChatRequest), id, tokenizer
        self.model, self.created = model, int(time.time())
        self._offsets = dict[int, int]()  # by answer: characters of the tokens with log probabilities so far

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {"choices": list(choices), "usage": usage}

    def part(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return one event of a stream."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self._head(kind) | {"choices": list(choices)} | ({"usage": usage} if usage else {})

    def choice(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        """Return one complete choice."""
        body = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return {"index": index, **body, "logprobs": self._logprobs(index, tokens), "finish_reason": finish}

    def delta(
        self, index: int, text: str, tokens: Sequence[Token], finish: str | None, first: bool = False
    ) -> dict[str, Any]:
        """Return one choice of a stream event."""
        delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        body = {"delta": delta} if self.chat else {"text": text}
        return {"index": index, **body, "logprobs": self._logprobs(index, tokens), "finish_reason": finish}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        scored = [token for token in tokens if token.logprob is not None]
        if not scored:
            return None
        if self.chat:
            return {
                "content": [
                    self._one(t.id, t.logprob) | {"top_logprobs": [self._one(id, p) for id, p in t.top]} for t in scored
                ],
                "refusal": None,
            }
        texts = [self._text(t.id) for t in scored]
        before = self._offsets.get(index, 0)
        starts = [before + sum(map(len, texts[:n])) for n in range(len(texts))]
        self._offsets[index] = before + sum(map(len, texts))
        top = [{self._text(id): p for id, p in t.top} for t in scored]
        return {
            "tokens": texts,
            "token_logprobs": [t.logprob for t in scored],
            "top_logprobs": top if any(top) else None,
            "text_offset": starts,
        }

    def _one(self, id: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(id)
        partial = "\N{REPLACEMENT CHARACTER}" in text  # part of a character, whose bytes decode() does not give
        return {"token": text, "logprob": logprob, "bytes": None if partial else list(text.encode())}

    def _text(self, id: int) -> str:
        return str(self.tokenizer.decode([id]))


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's format."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage_of(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """Return the token counts of an answer."""
    details = {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion, **details}

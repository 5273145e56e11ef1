"""Requests and answers in OpenAI's formats. Unknown fields are refused, never ignored."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mta.serving.engine import Finish, Token

ValidText = Annotated[str, Field(max_length=1 << 24)]
"""Text that UTF-8 can hold: pydantic refuses half of a surrogate pair only in text with a constraint."""


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
    text: ValidText


class Message(_Request):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: ValidText | Annotated[list[TextPart], Field(max_length=1024, fail_fast=True)]

    @property
    def text(self) -> str:
        """The message's full text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ModelRequest(_Request):
    """Fields of all requests to a model; the extension ``fallback`` is the model that answers for an unknown person."""

    model: Annotated[str, Field(min_length=1, max_length=1024)]
    user: str | None = None
    fallback: Literal["task", "base"] | None = None


class BehindItems(ModelRequest):
    """A request whose prompt comes behind a person's latest items, if the bank's prompts show some: an extension.

    ``history_of`` is by default the person of the model, "" for none.
    """

    history_of: Annotated[str, Field(max_length=1024)] | None = None


class Common(ModelRequest):
    """Fields of both kinds of request for text."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Literal[1] = 1
    stop: ValidText | Annotated[list[ValidText], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None


class ChatRequest(Common, BehindItems):
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


class CompletionRequest(Common):
    """``POST /v1/completions``."""

    prompt: ValidText
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class ClassifyRequest(BehindItems):
    """``POST /v1/classify``: one text or several, each worded as the task's prompt."""

    input: ValidText | Annotated[list[ValidText], Field(min_length=1, max_length=64)]


Request = ChatRequest | CompletionRequest


@dataclass(frozen=True, slots=True)
class AnswerText:
    """A piece of an answer: text that is final, its tokens, and the reason if the answer ended."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    cached: int = 0


class ResponseFormatter:
    """Formats the answer to one request as OpenAI objects."""

    def __init__(self, request: Request, model: str, tokenizer: Any) -> None:
        self.chat, self.tokenizer = isinstance(request, ChatRequest), tokenizer
        # A token is decoded behind another: some tokenizers omit the space before a text's first word.
        self._before: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._start = len(str(tokenizer.decode(self._before)))
        self._texts: dict[int, str] = {}  # of tokens that were decoded: alternatives repeat
        kind = ("chat.completion" + ".chunk" * request.stream) if self.chat else "text_completion"
        id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": id, "object": kind, "created": int(time.time()), "model": model}

    def body(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return a complete answer, or one event of a stream."""
        return self._head | {"choices": list(choices)} | ({"usage": usage} if usage else {})

    def choice(self, parts: Sequence[AnswerText]) -> dict[str, Any]:
        """Return the complete choice that consists of ``parts``."""
        text, tokens = "".join(part.text for part in parts), [token for part in parts for token in part.tokens]
        return self._choice({"message": {"role": "assistant", "content": text}}, text, tokens, parts[-1].finish)

    def events(self, part: AnswerText, first: bool) -> list[dict[str, Any]]:
        """Return the stream events of a part: its text, then, if the answer ended, the reason."""
        delta = ({"role": "assistant"} if first else {}) | ({"content": part.text} if part.text or first else {})
        choices = [self._choice({"delta": delta}, part.text, part.tokens, None)]
        if part.finish:
            choices.append(self._choice({"delta": {}}, "", (), part.finish))
        return [self.body([choice]) for choice in choices]

    def _choice(
        self, chat: dict[str, Any], text: str, tokens: Sequence[Token], finish: Finish | None
    ) -> dict[str, Any]:
        body = chat if self.chat else {"text": text}
        return {"index": 0, **body, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        scored = [token for token in tokens if token.logprob is not None]
        if not scored:
            return None
        if self.chat:
            content = [
                self._one(t.id, t.logprob) | {"top_logprobs": [self._one(id, p) for id, p in t.top]} for t in scored
            ]
            return {"content": content}
        # Of tokens with the same text, the likeliest counts; ``top`` begins with it.
        top = [{self._text(id): p for id, p in reversed(t.top)} for t in scored]
        texts, logprobs = [self._text(t.id) for t in scored], [t.logprob for t in scored]
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": top if any(top) else None}

    def _one(self, id: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self._text(id), "logprob": logprob}

    def _text(self, id: int) -> str:
        if id not in self._texts:
            self._texts[id] = str(self.tokenizer.decode([*self._before, id]))[self._start :]
        return self._texts[id]


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's format."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage_of(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """Return the token counts of an answer."""
    details = {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion, **details}

"""A task as data: wording, target, labels, metric and the text that encoders see.

Nothing here knows a model or a tokenizer; ``mta.data.tasks.prompt`` turns what a task says into tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from mta.data.history import Item
from mta.data.tasks.form import Form, Frozen, template_fields
from mta.errors import DataError


def as_text(value: str | int | float) -> str:
    """A number as people write it: 4 and 4.0 are both '4'."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _label(value: Any) -> Any:
    if isinstance(value, bool):  # YAML reads a bare yes, no, on or off as a truth value
        raise ValueError("a label that YAML reads as true or false must be written in quotes")
    return as_text(value) if isinstance(value, int | float) else value


def _check_text(key: str, template: str, form: Form) -> None:
    fields = set(template_fields(template))
    if form.target in fields:
        raise ValueError(f"{key} shows the target {{{form.target}}}; leave it out, it is added where it is known")
    if extra := fields - set(form.inputs):
        raise ValueError(f"{key} has the fields {sorted(extra)}; the prompt has {sorted(form.inputs)}")
    if form.inputs and not fields:
        raise ValueError(f"{key} shows no field; the prompt has {sorted(form.inputs)}")


class Task(Frozen):
    """What people's items are asked and how answers are judged.

    ``text`` is what encoders see of an item. It never shows the target, so an item held out as a query
    cannot leak its answer; ``text_of(item, with_target=True)`` adds the target where it is known. ``profile`` words an
    earlier item, answer and all, for prompts that show some of them. ``answer_tokens`` bounds what a model writes as an
    answer, the end token included; ``PromptFormat.answer_tokens`` says what holds without it.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    version: int = Field(1, ge=1)
    description: str = ""
    source: str = ""
    lamp: str | None = None
    item: Form
    query: Form | None = None
    text: str
    query_text: str | None = None
    profile: str | None = None
    labels: tuple[Annotated[str, BeforeValidator(_label)], ...] | None = None
    metric: Literal["accuracy", "mae", "rouge"]
    answer_tokens: int | None = Field(default=None, ge=1)

    @field_validator("labels")
    @classmethod
    def _labels_are_usable(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is None:
            return None
        if not labels or any(label != label.strip() or not label for label in labels):
            raise ValueError("labels must not be empty, nor begin or end with a space")
        if len(set(labels)) < len(labels):
            raise ValueError("labels must be distinct")
        return labels

    @model_validator(mode="after")
    def _fits_together(self) -> Task:
        if self.metric != "rouge" and self.labels is None:
            raise ValueError(f"metric {self.metric} needs labels")
        if self.metric == "mae" and not all(_is_number(label) for label in self.labels or ()):
            raise ValueError("metric mae needs labels that are all numbers")
        if self.query_text is not None and self.query is None:
            raise ValueError("query_text is for a query worded unlike the items; there is no query")
        _check_text("text", self.text, self.item)
        if self.query:
            key = "text (there is no query_text)" if self.query_text is None else "query_text"
            _check_text(key, self._text(query=True), self.query)
        if extra := set(template_fields(self.profile or "")) - {*self.item.inputs, self.item.target}:
            raise ValueError(f"profile has the fields {sorted(extra)}; items have {sorted(self.fields())}")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_set(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out ``answer_tokens`` where it is not set: so hashes of tasks from before that field stay the same."""
        return {name: value for name, value in values(self).items() if name != "answer_tokens" or value is not None}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides how models are trained for the task, as JSON: all but ``answer_tokens``.

        Tasks for which this is the same are one task: banks and states of one serve the other.
        """
        return self.model_dump(mode="json", exclude={"answer_tokens"})

    def _text(self, query: bool) -> str:
        return self.query_text if query and self.query_text is not None else self.text

    def form(self, item: Item) -> Form:
        """The wording that an item calls for."""
        return self.query if item.is_query and self.query else self.item

    @property
    def asks_as_items(self) -> bool:
        """Whether a query is answered like an item of the history; LaMP-1's and LaMP-7's are not."""
        return self.query is None or self.query.target == self.item.target

    @property
    def labelled(self) -> bool:
        """Whether items of the history are answered by labels."""
        return self.labels is not None and self.asks_as_items

    def labels_of(self, item: Item) -> tuple[str, ...] | None:
        """The closed set of answers of this item; None where it is free text (LaMP-1's history has no labels)."""
        return self.labels if self.labelled or (item.is_query and self.query) else None

    def prompt(self, item: Item) -> str:
        """The instruction for an item, its target left out."""
        return self._fill(self.form(item).prompt, item)

    def has_target(self, item: Item) -> bool:
        """Whether the answer is known: a benchmark's test questions come without."""
        return self.form(item).target in item.fields

    def target(self, item: Item) -> str:
        """The answer of an item. Raises DataError if it is unknown."""
        name = self.form(item).target
        return self._fill(f"{{{name}}}", item)

    def text_of(self, item: Item, with_target: bool = False) -> str:
        """What encoders see of an item; the target stands on a line of its own."""
        text = self._fill(self._text(item.is_query), item)
        return f"{text}\n{self.target(item)}".strip() if with_target else text

    def told(self, item: Item) -> str:
        """An earlier item in one sentence, with its answer: what a prompt shows of a person's history."""
        form = self.item
        return self._fill(self.profile or f"{form.prompt} {{{form.target}}}", item)

    def profiled(self) -> Task:
        """The same task with a field ``profile`` in front of every prompt; it may be cut like the longest text.

        A task that has one stays as it is.
        """
        if "profile" in self.item.inputs:
            return self
        forms = {
            name: form.model_copy(
                update={"prompt": "{profile}" + form.prompt, "cut": (*form.cut, "profile"), "pattern": None}
            )
            for name, form in (("item", self.item), ("query", self.query))
            if form
        }
        return self.model_copy(update=forms)

    def fields(self, query: bool = False) -> tuple[str, ...]:
        """All fields an item (or a query) needs: those of the prompt, then the target."""
        form = self.query if query and self.query else self.item
        return (*form.inputs, form.target)

    def wrong(self, item: Item) -> tuple[str, str] | None:
        """The first field that does not fit and why, or None. A query's unknown target is not wrong."""
        labels, form = self.labels_of(item), self.form(item)
        for name in self.fields(item.is_query):
            value = item.fields.get(name)
            if value is None:
                if item.is_query and name == form.target:
                    continue
                return name, f"missing; task {self.name!r} needs {', '.join(self.fields(item.is_query))}"
            if not value.strip():
                return name, "empty; expected some text"
            if name == form.target and labels is not None and value not in labels:
                return name, f"unknown label {short(value)}; expected one of: {', '.join(labels)}"
        return None

    def parse_query(self, input: str, output: str | None = None, id: str | None = None) -> Item:
        """A benchmark's ready-made question, and its gold answer where known, as a query.

        Raises DataError if the question is not worded as this task's.
        """
        form = self.query or self.item
        if form.pattern is not None:
            match = re.fullmatch(form.pattern, input, re.DOTALL)
            if match is None:
                raise DataError(
                    f"not a question of task {self.name!r}: {short(input)}; expected {short(form.prompt)}",
                    hint="Give the task these questions are of, or items with fields of their own.",
                )
            fields = {name: text for name, text in match.groupdict().items() if text is not None}
        elif len(form.inputs) == 1:
            fields = {form.inputs[0]: input}
        else:
            raise DataError(
                f"task {self.name!r} has no pattern to parse a question into {', '.join(form.inputs)}",
                hint="Add a pattern to its YAML, as lamp3.yaml has one, or give the fields themselves.",
            )
        if output is not None:
            fields[form.target] = output
        return Item(fields, id=id, is_query=True)

    def asked(self, question: str | Mapping[str, str]) -> Item:
        """A question put by a caller: the fields of an item, the one field a prompt has, or a benchmark's wording.

        Raises DataError naming the fields that are needed.
        """
        form = self.query or self.item
        if isinstance(question, Mapping):
            item = Item(question, is_query=self.query is not None)
            if missing := [name for name in form.inputs if not item.fields.get(name, "").strip()]:
                raise DataError(
                    f"a question of task {self.name!r} needs {', '.join(missing)}; got {sorted(question)}",
                    hint=_as_fields(form),
                )
            return item
        if form.pattern is not None and re.fullmatch(form.pattern, question, re.DOTALL):
            return self.parse_query(question)
        if len(form.inputs) != 1:
            raise DataError(
                f"a question of task {self.name!r} needs fields: {', '.join(form.inputs)}; got one text",
                hint=_as_fields(form),
            )
        if not question.strip():
            raise DataError("the question is empty; expected some text", hint=_as_fields(form))
        return Item({form.inputs[0]: question}, is_query=self.query is not None)

    def _fill(self, template: str, item: Item) -> str:
        try:
            return template.format_map(item.fields)
        except KeyError as error:
            kind = "query" if item.is_query else "item"
            raise DataError(
                f"{kind} {item.id!r} has no field {error}; task {self.name!r} needs it",
                hint=f"Add it to the item: {short(template)} is filled from it.",
            ) from None


def _as_fields(form: Form) -> str:
    """What to ask with instead, for messages."""
    return "Ask with all of its fields:  '" + json.dumps(dict.fromkeys(form.inputs, "…"), ensure_ascii=False) + "'"


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False


def short(text: str, limit: int = 60) -> str:
    """The beginning of a text in quotes, for messages."""
    return repr(text if len(text) <= limit else text[:limit] + "…")

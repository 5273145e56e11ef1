"""A task as data: wording, target, labels, metric, and the text that encoders see.

Tasks do not depend on a model or a tokenizer; ``mta.data.tasks.prompt`` converts items to tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mta.config import Settings
from mta.data.history import PROFILE, Item
from mta.errors import DataError


@cache
def template_fields(template: str) -> tuple[str, ...]:
    """Return the distinct field names of a template, in order. Raises ValueError for anything but ``{name}``."""
    try:
        parsed = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"{template!r}: {error}; literal braces are written {{{{ and }}}}") from None
    for _, name, spec, conversion in parsed:
        if not str(name).isidentifier() or spec or conversion:
            raise ValueError(f"{{{name}}} is not a field; write {{name}}, and literal braces as {{{{ and }}}}")
    return tuple(dict.fromkeys(str(name) for _, name, _, _ in parsed))


RESERVED = {PROFILE, "person", "time", "id"}  # no fields of tasks in files: readers give them another meaning
UNTRAINED = {"answer_tokens", "examples"}  # fields of a task that do not affect training, and may change later


class Form(Settings):
    """The wording of one kind of item: ``prompt`` is a template, ``target`` the name of the target field.

    ``cut`` lists the prompt's fields that may be shortened when a prompt is too long.
    ``pattern`` parses a benchmark's ready-made question back into the prompt's fields (fullmatch, DOTALL).
    """

    prompt: str = Field(min_length=1)
    target: str = Field(min_length=1)
    cut: tuple[str, ...] = ()
    pattern: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Form:
        fields = set(template_fields(self.prompt))
        template_fields(f"{{{self.target}}}")  # a plain name, too
        if self.target in fields:
            raise ValueError(f"the prompt contains the target {{{self.target}}}, which would reveal the answer")
        for name in self.cut:
            if name not in fields:
                raise ValueError(f"cut names {name!r}, which is not a field of the prompt")
        if self.pattern is not None and (groups := _groups(self.pattern)) != fields:
            raise ValueError(f"pattern has the groups {sorted(groups)}; the prompt has the fields {sorted(fields)}")
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        """The fields of the prompt."""
        return template_fields(self.prompt)

    def parsed(self, question: str) -> dict[str, str] | None:
        """Return the prompt's fields from a ready-made question; None if it does not have the form's wording."""
        if self.pattern is None:
            return {self.inputs[0]: question} if len(self.inputs) == 1 else None
        match = re.fullmatch(self.pattern, question, re.DOTALL)
        return match and {name: text for name, text in match.groupdict().items() if text is not None}


def _groups(pattern: str) -> set[str]:
    try:
        return set(re.compile(pattern, re.DOTALL).groupindex)
    except re.error as error:
        raise ValueError(f"pattern is not a regular expression: {error}") from None


def as_text(value: str | int | float) -> str:
    """Return a value as text; 4 and 4.0 both give '4'."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _label(value: Any) -> Any:
    if isinstance(value, bool):  # YAML reads a bare yes, no, on, or off as a boolean
        raise ValueError("a label that YAML reads as true or false must be written in quotes")
    return as_text(value) if isinstance(value, int | float) else value


def _check_text(key: str, template: str, form: Form) -> None:
    fields = set(template_fields(template))
    if form.target in fields:
        raise ValueError(f"{key} contains the target {{{form.target}}}; leave it out, mta adds the target where known")
    if extra := fields - set(form.inputs):
        raise ValueError(f"{key} has the fields {sorted(extra)}; the prompt has {sorted(form.inputs)}")
    if form.inputs and not fields:
        raise ValueError(f"{key} contains no field; the prompt has {sorted(form.inputs)}")


class Task(Settings):
    """Prompts, targets, and scoring of one kind of item.

    ``text`` is what encoders see of an item. It never contains the target, so an item held out as a query cannot leak
    its answer; ``text_of(item, with_target=True)`` adds the target where it is known. ``profile`` formats an earlier
    item with its answer, for prompts that show earlier items. ``answer_tokens`` bounds a generated answer, including
    the end token; ``PromptFormat.answer_tokens`` gives the default. ``examples`` are questions to try, as fields; the
    playground and the demo show them.
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
    examples: tuple[dict[str, str], ...] = ()

    @field_validator("labels")
    @classmethod
    def _labels_are_usable(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is None:
            return None
        if not labels or any(label != label.strip() or not label for label in labels):
            raise ValueError("labels must not be empty, or begin or end with a space")
        if len(set(labels)) < len(labels):
            raise ValueError("labels must be distinct")
        return labels

    @model_validator(mode="after")
    def _fits_together(self) -> Task:
        if self.metric != "rouge" and self.labels is None:
            raise ValueError(f"metric {self.metric} needs labels")
        if self.metric == "mae" and not all(is_number(label) for label in self.labels or ()):
            raise ValueError("metric mae needs labels that are all numbers")
        if self.query_text is not None and self.query is None:
            raise ValueError("query_text needs a query, and the task has no query")
        _check_text("text", self.text, self.item)
        if self.query:
            key = "text (there is no query_text)" if self.query_text is None else "query_text"
            _check_text(key, self._text(query=True), self.query)
        asked = self.query or self.item
        for example in self.examples:
            if set(example) != set(asked.inputs):
                raise ValueError(f"an example has the fields {sorted(example)}; the prompt has {sorted(asked.inputs)}")
        if extra := set(template_fields(self.profile or "")) - {*self.item.inputs, self.item.target}:
            raise ValueError(f"profile has the fields {sorted(extra)}; items have {sorted(self.fields())}")
        return self

    def __hash__(self) -> int:
        return hash((self.name, self.version, self.item))  # examples cannot be hashed

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that affect training, as JSON: all but ``UNTRAINED``.

        Banks and states of tasks with equal ``identity`` are interchangeable.
        """
        return self.model_dump(mode="json", exclude=UNTRAINED)

    def _text(self, query: bool) -> str:
        return self.query_text if query and self.query_text is not None else self.text

    def form(self, item: Item) -> Form:
        return self.query if item.is_query and self.query else self.item

    @property
    def asks_as_items(self) -> bool:
        """Whether a query has the same target field as an item of the history; in LaMP-1 and LaMP-7 it has not."""
        return self.query is None or self.query.target == self.item.target

    def asks_like_items(self, item: Item) -> bool:
        """Return whether this is an item of the history, or a query with the same fields."""
        return not item.is_query or (self.asks_as_items and self.form(item).inputs == self.item.inputs)

    @property
    def labelled(self) -> bool:
        """Whether the targets of history items are labels."""
        return self.labels is not None and self.asks_as_items

    def labels_of(self, item: Item) -> tuple[str, ...] | None:
        """Return the closed set of answers of an item; None for free text (LaMP-1's history has no labels)."""
        return self.labels if self.labelled or (item.is_query and self.query) else None

    def prompt(self, item: Item) -> str:
        """Return the instruction for an item, without its target, behind the item's ``PROFILE`` if it has one."""
        return item.fields.get(PROFILE, "") + self._fill(self.form(item).prompt, item)

    def has_target(self, item: Item) -> bool:
        """Return whether the answer is known; a benchmark's test questions have none."""
        return self.form(item).target in item.fields

    def target(self, item: Item) -> str:
        """Return the answer of an item. Raises DataError if the answer is unknown."""
        name = self.form(item).target
        return self._fill(f"{{{name}}}", item)

    def text_of(self, item: Item, with_target: bool = False) -> str:
        """Return what encoders see of an item; a target is added as a line of its own."""
        text = self._fill(self._text(item.is_query), item)
        return f"{text}\n{self.target(item)}".strip() if with_target else text

    def sentence(self, item: Item) -> str:
        """Return an earlier item with its answer in one sentence, for prompts that show a person's history."""
        return self._fill(self.profile or f"{self.item.prompt} {{{self.item.target}}}", item)

    def fields(self, query: bool = False) -> tuple[str, ...]:
        """Return all fields that an item (or a query) needs: those of the prompt, then the target."""
        form = self.query if query and self.query else self.item
        return (*form.inputs, form.target)

    def wrong(self, item: Item) -> tuple[str, str] | None:
        """Return the first invalid field and the reason, or None. A query may lack its target."""
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

    def outputs(self, answers: Iterable[tuple[str, str]]) -> dict[str, Any]:
        """Return (question id, answer) in LaMP's format of outputs, which LaMP's own script scores."""
        return {"task": self.lamp or self.name, "golds": [{"id": id, "output": text} for id, text in answers]}

    def asked(self, question: str | Mapping[str, str]) -> Item:
        """Return a caller's question as an item. It is a mapping of fields, the only field, or a benchmark's text.

        Raises DataError, which names the required fields.
        """
        form = self.query or self.item
        if isinstance(question, str):
            one = {form.inputs[0]: question} if len(form.inputs) == 1 else {}
            fields, got = form.parsed(question) or one, f"one text, {short(question)}"
        else:
            fields, got = dict(question), f"the fields {sorted(question)}"
        if wrong := [name for name, value in fields.items() if not isinstance(value, str)]:
            raise DataError(
                f"the fields of a question are texts; {wrong[0]} is {fields[wrong[0]]!r}", hint="Give it as a text."
            )
        if missing := [name for name in form.inputs if not fields.get(name, "").strip()]:
            every = json.dumps(dict.fromkeys(form.inputs, "…"), ensure_ascii=False)
            raise DataError(
                f"a question of task {self.name!r} needs {', '.join(missing)}; got {got}",
                hint=f"Ask with all fields:  '{every}'",
            )
        return Item(fields, is_query=True)

    def _fill(self, template: str, item: Item) -> str:
        try:
            return template.format_map(item.fields)
        except KeyError as error:
            kind = "query" if item.is_query else "item"
            raise DataError(
                f"{kind} {item.id!r} has no field {error}; task {self.name!r} needs it",
                hint=f"Add the field to the item: {short(template)} needs it.",
            ) from None


def is_number(text: str) -> bool:
    """Return whether a text is a finite number."""
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False


def short(text: str, limit: int = 60) -> str:
    """Return the beginning of a text in quotes, for messages."""
    return repr(text if len(text) <= limit else text[:limit] + "…")

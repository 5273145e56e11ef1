"""The wording of a task's items as data: a prompt template and the name of the target field."""

from __future__ import annotations

import re
from functools import cache
from string import Formatter

from pydantic import Field, model_validator

from mta.config import Settings


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


def _groups(pattern: str) -> set[str]:
    try:
        return set(re.compile(pattern, re.DOTALL).groupindex)
    except re.error as error:
        raise ValueError(f"pattern is not a regular expression: {error}") from None

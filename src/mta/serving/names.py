"""Whom a request's ``model`` names: ``person:ann``, ``person:ann@v3``, ``person:ann#merged``, ``task``, or the base."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from mta.rows import BASE, TASK, Nobody

_PERSON = re.compile(r"person:(?P<id>.+?)(?:@v(?P<version>[1-9][0-9]{0,8}))?(?P<merged>#merged)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Named:
    """A person as a request names them: the latest version where none is given."""

    person: str
    version: int | None = None
    stacked: bool = True


def named(model: str, base: str) -> Named | Nobody | None:
    """Whom a model's name means; None where it means nobody we could know.

    Ids are percent-decoded. Whoever builds names from ids that others chose has to encode them
    (``urllib.parse.quote(id, safe="")``): an id may itself end like a version.
    """
    if model == base:
        return BASE
    if model == "task":
        return TASK
    if found := _PERSON.fullmatch(model):
        version = found["version"]
        return Named(unquote(found["id"]), int(version) if version else None, found["merged"] is None)
    return None

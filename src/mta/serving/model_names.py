"""Whom a request's ``model`` names: ``person:ann``, ``person:ann@v3``, ``person:ann#merged``, ``task``, or the base."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from mta.personalize.adapters import BASE, TASK, Nobody
from mta.serving.engine import Version

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


_SEAL = 16  # digits of one that tell two versions of one number apart
_WIRE = re.compile(r"(?P<model>.+)~(?P<seal>[0-9a-f]{16})", re.DOTALL)


def wire_name(who: Version | Nobody) -> str:
    """What vLLM calls a person's version, ``person:ann@v3#merged~<seal>``: one name, one content, for ever."""
    if isinstance(who, Nobody):
        return who.value
    return f"person:{quote(who.person, safe='')}@v{who.number}" + "#merged" * (not who.stacked) + f"~{who.seal[:_SEAL]}"


def from_wire(name: str) -> Version | Nobody | None:
    """The inverse of ``wire_name``; None for whatever is no such name."""
    found = _WIRE.fullmatch(name)
    who = named(found["model"] if found else name, BASE.value)
    if found and isinstance(who, Named) and who.version:
        return Version(who.person, who.version, who.stacked, found["seal"])
    return who if isinstance(who, Nobody) and not found else None

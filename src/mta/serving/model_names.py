"""Model names of requests: ``person:ann``, ``person:ann@v3``, ``person:ann#merged``, ``task``, or the base's name."""

from __future__ import annotations

import re
from dataclasses import replace
from urllib.parse import quote, unquote

from mta.personalize.adapters import BASE, TASK, SharedModel
from mta.serving.engine import ServedModel, Version

_PERSON = re.compile(r"person:(?P<id>.+?)(?:@v(?P<version>[1-9][0-9]{0,8}))?(?P<merged>#merged)?", re.DOTALL)


def named(model: str, base: str) -> ServedModel | None:
    """Parse a model name; return None if it is neither a person, the pooled model, nor the base.

    Ids are percent-decoded. Callers that build names from arbitrary ids must encode the ids, as ``person_name`` does,
    because an id may end like a version.
    """
    if model == base:
        return BASE
    if model == TASK.value:
        return TASK
    if parts := _PERSON.fullmatch(model):
        return Version(unquote(parts["id"]), int(parts["version"] or 0), parts["merged"] is None)
    return None


_ZERO = "zero"
_SEAL = 16  # hex digits of the seal, enough to distinguish contents of the same version number
_WIRE = re.compile(r"(?P<model>.+)~(?P<seal>[0-9a-f]{16})", re.DOTALL)


def person_name(id: str) -> str:
    """Return the name of a person's newest version in requests."""
    return f"person:{quote(id, safe='')}"


def model_name(who: Version) -> str:
    """Return the name of a version in requests: the inverse of ``named``."""
    return f"{person_name(who.person)}@v{who.number}" + "#merged" * (not who.stacked)


def wire_name(who: ServedModel) -> str:
    """Return the name of a version in vLLM, ``person:ann@v3#merged~<seal>``. A name always means the same content.

    The base is an adapter of zeros, ``zero``: beside people's rows, vLLM on a CPU computes rows without an adapter with
    the adapter in its last slot.
    """
    if who is BASE:
        return _ZERO
    return who.value if isinstance(who, SharedModel) else f"{model_name(who)}~{who.seal[:_SEAL]}"


def from_wire(name: str) -> ServedModel | None:
    """Inverse of ``wire_name``; None if ``name`` is not such a name."""
    if name == _ZERO:
        return BASE
    sealed = _WIRE.fullmatch(name)
    who = named(sealed["model"] if sealed else name, BASE.value)
    if isinstance(who, Version):
        return replace(who, seal=sealed["seal"]) if sealed and who.number else None
    return None if sealed else who

"""Public names keep the signatures in public_api.txt (one per line) unless they are changed on purpose.

After an intended change, ``python tests/project/test_signatures.py --write`` writes the file: its diff shows what users
meet.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_origin

import mta
from mta.config import Settings

FILE = Path(__file__).parents[1] / "public_api.txt"


def public_api() -> list[str]:
    """A line for each public name, and for each public method, field and property of the classes among them.

    Settings within settings, and what methods return, are described as well: people write the ones and read the others.
    """
    lines, known = [], {}
    for name in sorted(mta.__all__):
        thing = getattr(mta, name)
        if inspect.isclass(thing):
            known[thing] = f"mta.{name}"
        elif inspect.isfunction(thing):
            lines.append(f"mta.{name}{signature(thing)}")
            known |= {inner: f"{inner.__module__}.{inner.__qualname__}" for inner in returned(thing)}
        elif name != "__version__":
            lines.append(f"mta.{name}: {type(thing).__name__}")
    for thing in list(known):
        for inner in sorted(within(thing), key=lambda one: one.__qualname__):
            known.setdefault(inner, f"{inner.__module__}.{inner.__qualname__}")
    lines += [line for thing, name in known.items() for line in described(thing, name)]
    return sorted(lines)


def within(thing: type) -> Iterator[type]:
    """Settings that are fields of these, at any depth; dataclasses of ours that its methods return."""
    if issubclass(thing, Settings):
        for field in thing.model_fields.values():
            for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if inspect.isclass(inner) and issubclass(inner, Settings):
                    yield inner
                    yield from within(inner)
        return
    for _, member in members(thing):
        yield from returned(getattr(member, "__func__", member))


def returned(function: Any) -> Iterator[type]:
    """The dataclasses that a function says it returns."""
    for word in re.findall(r"\w+", str(getattr(function, "__annotations__", {}).get("return", ""))):
        inner = vars(sys.modules[function.__module__]).get(word)
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            yield inner


def described(thing: type, name: str) -> Iterator[str]:
    """The lines of one class: how it is made, its fields, methods and properties."""
    bases = [base.__name__ for base in thing.__bases__ if base is not object]
    head = f"class {name}({', '.join(bases)})"
    made = any("__init__" in vars(one) for one in own_bases(thing)) and not dataclasses.is_dataclass(thing)
    yield head + (f": __init__{signature(thing.__init__)}" if made else "")
    notes = inspect.get_annotations(thing)
    if issubclass(thing, Settings):
        for field, about in thing.model_fields.items():
            if field in notes:
                one_of = get_origin(about.annotation) is Literal  # described in full, by whatever name it goes
                note = str(about.annotation).removeprefix("typing.") if one_of else notes[field]
                yield f"{name}.{field}: {note}{default(about.default)}"
    elif dataclasses.is_dataclass(thing):
        for field in dataclasses.fields(thing):
            about = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            given = "" if about is dataclasses.MISSING else default(about)
            yield f"{name}.{field.name}: {field.type}{given}"
    for word, member in members(thing):
        if isinstance(member, property):
            yield f"{name}.{word}: {inspect.get_annotations(member.fget)['return']}  [property]"
        elif hasattr(member, "func"):  # a cached property
            yield f"{name}.{word}: {inspect.get_annotations(member.func)['return']}  [property]"
        else:
            kind = {classmethod: "  [classmethod]", staticmethod: "  [staticmethod]"}.get(type(member), "")
            yield f"{name}.{word}{signature(getattr(member, '__func__', member))}{kind}"


class Note:
    """An annotation as it stands in the source."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def signature(function: Any) -> inspect.Signature:
    """The signature without quotes around annotations."""
    whole = inspect.signature(function)
    given = [
        one.replace(annotation=Note(one.annotation)) if one.annotation is not one.empty else one
        for one in whole.parameters.values()
    ]
    back = whole.return_annotation
    return whole.replace(parameters=given, return_annotation=back if back is whole.empty else Note(back))


def members(thing: type) -> Iterator[tuple[str, Any]]:
    """Its public functions and properties, as the bodies of its classes have them, and how long it is."""
    callables = (types.FunctionType, classmethod, staticmethod, property)
    for word, member in {word: member for one in own_bases(thing) for word, member in vars(one).items()}.items():
        if (word[0] != "_" or word == "__len__") and (isinstance(member, callables) or hasattr(member, "func")):
            yield word, member


def own_bases(thing: type) -> list[type]:
    """The class, and before it those of its bases that are only a part of it: public ones have their own lines."""
    public = {getattr(mta, name) for name in mta.__all__ if inspect.isclass(getattr(mta, name))}
    bases = [one for one in reversed(thing.__mro__[1:]) if one.__module__.startswith("mta.")]
    return [*([] if issubclass(thing, Settings) else [one for one in bases if one not in public]), thing]


def default(value: Any) -> str:
    """`` = value``; of settings only what is not their own default."""
    if not isinstance(value, Settings):
        return "" if repr(value) == "PydanticUndefined" else f" = {value!r}"
    own = {word: field.default for word, field in type(value).model_fields.items()}
    changed = [f"{word}{default(given).replace(' = ', '=', 1)}" for word, given in value if given != own[word]]
    return f" = {type(value).__name__}({', '.join(changed)})"


def test_public_signatures_equal_the_recorded_ones():
    found, written = public_api(), FILE.read_text().splitlines()
    gone, new = [line for line in written if line not in found], [line for line in found if line not in written]
    assert (gone, new) == ([], []), "meant?  python tests/project/test_signatures.py --write"
    assert found == written


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    FILE.write_text("\n".join(public_api()) + "\n")

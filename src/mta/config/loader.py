"""Base class of all settings, YAML input and output, and errors that name key and value."""

from __future__ import annotations

import difflib
import json
import reprlib
import shlex
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mta.errors import ConfigError


class Settings(BaseModel):
    """Base class: frozen, unknown keys are errors, and a partly given group keeps its other defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # Only if the field's type is the default's class: in a union, the defaults of one class do not fit another.
        fields = {name: field for name, field in cls.model_fields.items() if isinstance(field.default, Settings)}
        groups = {name: field.default for name, field in fields.items() if field.annotation is type(field.default)}
        return {
            name: merged_over(groups[name].model_dump(), value) if isinstance(value, dict) and name in groups else value
            for name, value in values.items()
        }


S = TypeVar("S", bound=Settings)
_BRIEF = reprlib.Repr()  # YAML aliases can make the values of a short file huge
vars(_BRIEF).update(maxlevel=2, maxstring=100, maxother=100)


def merged_over(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Merge ``more`` over ``values``, group by group.

    ``epochs`` given without ``steps`` resets ``steps``, and ``training`` of the stack what a calibration would say.
    """
    if "epochs" in more and "steps" not in more and "steps" in values:
        values = values | {"steps": None}
    if "training" in more and "calibrated" not in more and "calibrated" in values:
        values = values | {"calibrated": False}
    groups = [key for key, new in more.items() if isinstance(new, dict) and isinstance(values.get(key), dict)]
    return values | more | {key: merged_over(values[key], more[key]) for key in groups}


def checked(kind: type[S], values: dict[str, Any], source: str, hint: str = "") -> S:
    """Validate plain values. Raises ConfigError that names key, value and ``source``.

    Without ``hint``, the error's hint lists the known keys or gives the default.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key, given = ".".join(map(str, first["loc"])), first["input"]
        own = first.get("ctx", {}).get("error")  # raised by one of our validators, which may carry a hint
        reason = own.message if isinstance(own, ConfigError) else first["msg"].removeprefix("Value error, ")
        advice = own.hint if isinstance(own, ConfigError) else _advice(kind, first["loc"], first["type"])
        got = "" if isinstance(given, dict | BaseModel) else f" (got {_BRIEF.repr(given)})"
        raise ConfigError(f"{source}: {f'{key}: ' if key else ''}{reason}{got}", hint=hint or advice) from None


def _advice(kind: type[BaseModel], loc: tuple[int | str, ...], fault: str) -> str:
    """Return the hint: the known keys if the key is unknown, otherwise the key's default."""
    *parents, name = loc or ("",)
    for parent in parents:
        field = kind.model_fields.get(str(parent))
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        inner = next((one for one in kinds if isinstance(one, type) and issubclass(one, Settings)), None)
        if inner is None:  # in a list
            return f"Correct {'.'.join(map(str, loc))}, or leave it out to use the default."
        kind = inner
    if (field := kind.model_fields.get(str(name))) is None or fault == "missing":
        near = difflib.get_close_matches(str(name), kind.model_fields, n=1)
        meant = f"Did you mean {near[0]}? " if near and field is None else ""
        return f"{meant}Settings here are: {', '.join(kind.model_fields)}."
    key = ".".join(map(str, loc))
    if isinstance(field.default, Settings):
        return f"Set a key of the group, for example:  {key}.{next(iter(type(field.default).model_fields))}=…"
    about = f"{name}: {field.description}. " if field.description else ""
    return about + (
        f"Give {name} another value." if field.is_required() else f"The default:  {_as_word(key, field.default)}"
    )


def _as_word(key: str, value: object) -> str:
    """Return a setting as a word to type in a shell."""
    text = json.dumps(value) if value is None or isinstance(value, list | tuple | bool) else str(value)
    return shlex.quote(f"{key}={text}") if "[" in text else f"{key}={text}"


class _OneOfEachKey(yaml.SafeLoader):
    """Refuse two equal keys, of which PyYAML would keep the last: settings would get lost."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return the mapping as it is written, without what ``<<`` merges. Raises ConstructorError."""
        node, known = super().compose_mapping_node(anchor), set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in known:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} occurs twice", key.start_mark)
                known.add(key.value)
        return node


def read_yaml(path: str | Path | None, beside: Container[str] = ()) -> dict[str, Any]:
    """Read a mapping of settings from a YAML file, without the keys ``beside``; empty for an empty file or no file.

    Raises ConfigError.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _OneOfEachKey) if path else None  # noqa: S506
    except FileNotFoundError:
        raise ConfigError(
            f"no such configuration file: {path}", hint="Give the path of a YAML file, or settings as words:  key=value"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", hint="Give a file that you can read.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date such as 2020-99-99
        raise ConfigError(
            f"{path} is not readable YAML: {error}",
            hint="Correct that line. Quote a text that contains a colon or a bracket.",
        ) from None
    if values is not None and not isinstance(values, dict):
        raise ConfigError(
            f"{path}: expected a mapping of settings, got {type(values).__name__}", hint="Write lines such as  seed: 1"
        )
    return {key: value for key, value in (values or {}).items() if key not in beside}


def dump_yaml(settings: Settings) -> str:
    """Return the resolved settings as YAML, for --config."""
    return to_yaml(settings.model_dump(mode="json"))


def to_yaml(values: Mapping[str, Any]) -> str:
    """Return plain values as YAML, in their order."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)

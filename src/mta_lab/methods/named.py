"""Methods by their names in recipes: those of ``mta compare``, and those of the entry points ``mta.methods``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from mta.config import plugins
from mta.errors import ConfigError
from mta.evaluation import methods as standard
from mta.evaluation.methods import Method

_GROUP = "mta.methods"
_CLASSES = [getattr(standard, name) for name in standard.__all__ if name not in ("Method", "Outcome")]
_STANDARD: dict[str, type[Method]] = {kind.model_fields["method"].default: kind for kind in _CLASSES}


def parse_method(value: Any) -> Method:
    """Return the method of a recipe entry: a name, or a mapping with ``method`` and settings. Raises ConfigError."""
    if isinstance(value, Method):
        return value
    values = {"method": value} if isinstance(value, str) else value
    name = values.get("method") if isinstance(values, Mapping) else None
    kind = method_class(name) if isinstance(name, str) else None
    if kind is None:
        raise ConfigError(f"no such method: {value!r}", hint=f"Use one of: {', '.join(method_names())}.")
    over = {"over": parse_method(values["over"])} if "over" in values else {}
    return kind.model_validate({**values, **over})


def method_class(name: str) -> type[Method] | None:
    """Return the class of methods with this name; None without one."""
    return _STANDARD.get(name) or plugins.load(_GROUP, name)


def method_names() -> list[str]:
    """Return the names of all methods, those of other packages included."""
    return sorted({*_STANDARD, *plugins.names(_GROUP)})


AnyMethod = Annotated[SerializeAsAny[Method], BeforeValidator(parse_method)]

"""The base class of methods, and the registry that maps names in recipes to classes."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BeforeValidator, Field, SerializeAsAny

from mta.config.loader import Settings
from mta.data.tasks.task import Task
from mta.errors import ConfigError
from mta.evaluation.protocol import Outcome, Panel

__all__ = ["METHODS", "AnyMethod", "Method", "Outcome", "parse_method", "register"]


class Method(Settings, ABC):
    """One row of the table. ``method`` is the name of the class in recipes, ``name`` the name of the row."""

    paper: ClassVar[str] = ""

    method: str = Field(default="", description="name of the class; each class sets it")
    name: str

    @property
    def digest(self) -> str:
        """Hash of the method and its settings, without its name."""
        return hashlib.sha256(json.dumps(_unnamed(self.model_dump(mode="json"))).encode()).hexdigest()[:12]

    @property
    def seeded(self) -> bool:
        """Whether the seed affects the result: stacks start from the seed, and learned coefficients draw batches."""
        return False

    def fits(self, task: Task, anchors: int) -> bool:
        """Return whether the method works for this task and number of anchors; if not, experiments leave it out."""
        return True

    @property
    def of_bank(self) -> bool:
        """Whether the method uses the bank or its task LoRA."""
        return True

    def outcome(self, panel: Panel, seed: int) -> Outcome:
        """Return the outcome of ``run``, computed once per panel: ``Chosen`` reads outcomes of other methods again."""
        key = (self.digest, seed)
        if key not in panel.outcomes:
            panel.outcomes[key] = self.run(panel, seed)
        return panel.outcomes[key]

    @abstractmethod
    def run(self, panel: Panel, seed: int) -> Outcome:
        """Learn from the panel's shots and answer the panel's queries."""


def _unnamed(settings: Any) -> Any:
    """Return the settings without the row names of the method and of the methods inside it."""
    if isinstance(settings, dict):
        return {key: _unnamed(value) for key, value in settings.items() if key != "name"}
    return [_unnamed(value) for value in settings] if isinstance(settings, list) else settings


METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=Method)


def register(kind: type[M]) -> type[M]:
    """Class decorator: make the method available in recipes, under the default of its field ``method``."""
    METHODS[kind.model_fields["method"].default] = kind
    return kind


def parse_method(value: Any) -> Method:
    """Return the method of a recipe entry: a name, or a mapping with ``method`` and settings. Raises ConfigError."""
    if isinstance(value, Method):
        return value
    values = {"method": value} if isinstance(value, str) else value
    kind = METHODS.get(values.get("method", "")) if isinstance(values, Mapping) else None
    if kind is None:
        raise ConfigError(f"no such method: {value!r}", hint=f"Use one of: {', '.join(sorted(METHODS))}.")
    return kind.model_validate(values)


AnyMethod = Annotated[SerializeAsAny[Method], BeforeValidator(parse_method)]

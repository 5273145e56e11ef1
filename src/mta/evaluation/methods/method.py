"""What a method is, and the registry that recipes name them by."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BeforeValidator, Field, SerializeAsAny

from mta.config.loader import Settings
from mta.data.tasks.task import Task
from mta.errors import ConfigError
from mta.evaluation.metrics import Answers
from mta.evaluation.protocol import Panel
from mta.personalize.merge import Merge


@dataclass(frozen=True, slots=True)
class Outcome:
    """Answers for everybody, the seconds of preparing them (without answering), and bytes kept per person.

    ``chosen`` says for each person which candidate was taken, where a method chooses.
    """

    answers: list[Answers]
    seconds: float
    bytes_per_person: float
    merge: Merge | None = None
    chosen: tuple[str, ...] = ()


class Method(Settings, ABC):
    """One row of the table. ``method`` names the class in a recipe, ``name`` the row."""

    paper: ClassVar[str] = ""

    method: str = Field(default="", description="which class; set by each of them")
    name: str

    @property
    def digest(self) -> str:
        """Names the method and all of its settings, whatever it is called."""
        return hashlib.sha256(json.dumps(_unnamed(self.model_dump(mode="json"))).encode()).hexdigest()[:12]

    @property
    def seeded(self) -> bool:
        """Whether the seed can change anything: stacks start from it, and learned coefficients draw their batches."""
        return False

    def fits(self, task: Task, anchors: int) -> bool:
        """Whether it can do this task with so many anchors: where it cannot, an experiment leaves it out."""
        return True

    @property
    def of_bank(self) -> bool:
        """Whether it uses anything of the bank, its task LoRA included."""
        return True

    def outcome(self, panel: Panel, seed: int) -> Outcome:
        """What ``run`` gives, computed once for a panel: a choice among methods asks them again."""
        key = (self.digest, seed)
        if key not in panel.outcomes:
            panel.outcomes[key] = self.run(panel, seed)
        return panel.outcomes[key]

    @abstractmethod
    def run(self, panel: Panel, seed: int) -> Outcome:
        """Learn from the shots and answer the queries."""


def _unnamed(settings: Any) -> Any:
    """Settings without the names of the method and of those it stands over."""
    if isinstance(settings, dict):
        return {key: _unnamed(value) for key, value in settings.items() if key != "name"}
    return [_unnamed(value) for value in settings] if isinstance(settings, list) else settings


METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=Method)


def register(kind: type[M]) -> type[M]:
    """Class decorator: recipes can name the method from now on, by the default of its field ``method``."""
    METHODS[kind.model_fields["method"].default] = kind
    return kind


def parse_method(value: Any) -> Method:
    """A method from a recipe: its class's name alone, or a mapping with ``method`` and settings. Raises ConfigError."""
    if isinstance(value, Method):
        return value
    values = {"method": value} if isinstance(value, str) else value
    kind = METHODS.get(values.get("method", "")) if isinstance(values, Mapping) else None
    if kind is None:
        raise ConfigError(f"no such method: {value!r}", hint=f"There are: {', '.join(sorted(METHODS))}.")
    return kind.model_validate(values)


AnyMethod = Annotated[SerializeAsAny[Method], BeforeValidator(parse_method)]

"""mta: a language model for every person, without storing a model per person.

Implements MTA, "Merge-then-Adapt" (arXiv:2511.20072). ``import mta`` does not import torch: each name below imports its
module on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mta.bank.bank import Bank as Bank
    from mta.config import CompareSettings as CompareSettings
    from mta.config import Run as Run
    from mta.config import override as override
    from mta.data.history import Item as Item
    from mta.data.history import Person as Person
    from mta.data.readers import read_people as read_people
    from mta.data.tasks import load_task as load_task
    from mta.errors import MtaError as MtaError
    from mta.evaluation.compare import compare as compare
    from mta.model.base import BaseModel as BaseModel
    from mta.personalize import Personalizer as Personalizer
    from mta.personalize.adapters import BASE as BASE
    from mta.personalize.adapters import TASK as TASK
    from mta.system.process import keep_freed_memory as keep_freed_memory

_HOME = {
    "BASE": "mta.personalize.adapters",
    "TASK": "mta.personalize.adapters",
    "Bank": "mta.bank.bank",
    "BaseModel": "mta.model.base",
    "CompareSettings": "mta.config",
    "Item": "mta.data.history",
    "MtaError": "mta.errors",
    "Person": "mta.data.history",
    "Personalizer": "mta.personalize",
    "Run": "mta.config",
    "keep_freed_memory": "mta.system.process",
    "load_task": "mta.data.tasks",
    "override": "mta.config",
    "read_people": "mta.data.readers",
    "compare": "mta.evaluation.compare",
}
__all__ = [*_HOME, "__version__"]
__version__ = "0.1.0"


if not TYPE_CHECKING:  # otherwise a type checker would accept every misspelled name as Any

    def __getattr__(name: str) -> Any:
        """Import a public name from its module."""
        if name in _HOME:
            return getattr(import_module(_HOME[name]), name)
        raise AttributeError(f"module 'mta' has no attribute {name!r}")

    def __dir__() -> list[str]:
        """Return the public names, which are not imported yet."""
        return sorted(__all__)

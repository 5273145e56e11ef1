"""The methods that are compared. Each learns from the batch's shots and answers the batch's queries.

A method is one small class: its fields are its settings, ``paper`` links its source, and ``run`` computes the outcome.
``docs/how-to/add-a-method.md`` shows how to write one. Methods of other packages are found by the entry points of the
group ``mta.methods``.
"""

from mta.evaluation.methods.controls import OtherPerson, PopulationMerge
from mta.evaluation.methods.merged import Merged, MergeThenAdapt, OneLora
from mta.evaluation.methods.method import (
    METHODS,
    AnyMethod,
    Method,
    Outcome,
    method_class,
    method_names,
    parse_method,
    register,
)
from mta.evaluation.methods.plain import Base, GlobalConstant, OwnConstant, TaskLora

__all__ = [
    "METHODS",
    "AnyMethod",
    "Base",
    "GlobalConstant",
    "MergeThenAdapt",
    "Merged",
    "Method",
    "OneLora",
    "OtherPerson",
    "Outcome",
    "OwnConstant",
    "PopulationMerge",
    "TaskLora",
    "method_class",
    "method_names",
    "parse_method",
    "register",
]

"""The methods that are compared. Each learns from the panel's shots and answers the panel's queries.

A method is one small class: its fields are its settings, ``paper`` links its source, and ``run`` computes the outcome.
``docs/how-to/add-a-method.md`` shows how to write one.
"""

from mta.evaluation.methods.combined import Chosen, Pag, Rag
from mta.evaluation.methods.controls import OtherPerson, PopulationMerge
from mta.evaluation.methods.merged import Merged, MergedByLayer, MergeThenAdapt, OneLora
from mta.evaluation.methods.method import METHODS, AnyMethod, Method, Outcome, parse_method, register
from mta.evaluation.methods.plain import Base, GlobalConstant, OwnConstant, TaskLora
from mta.evaluation.methods.published import PerPcs, Prime

__all__ = [
    "METHODS",
    "AnyMethod",
    "Base",
    "Chosen",
    "GlobalConstant",
    "MergeThenAdapt",
    "Merged",
    "MergedByLayer",
    "Method",
    "OneLora",
    "OtherPerson",
    "Outcome",
    "OwnConstant",
    "Pag",
    "PerPcs",
    "PopulationMerge",
    "Prime",
    "Rag",
    "TaskLora",
    "parse_method",
    "register",
]

"""The methods that are compared. Each learns from the batch's shots and answers the batch's queries.

A method is one small class: its fields are its settings, ``paper`` links its source, and ``run`` computes the outcome.
``docs/how-to/add-a-method.md`` shows how to write one.
"""

from mta.evaluation.methods.controls import OtherPerson, PopulationMerge
from mta.evaluation.methods.merged import Merged, MergeThenAdapt, OneLora
from mta.evaluation.methods.method import Method
from mta.evaluation.methods.plain import Base, GlobalConstant, NoHistory, OwnConstant, TaskLora
from mta.evaluation.methods.rivals import CalibratedLora, LabelBias
from mta.evaluation.protocol import Outcome

__all__ = [
    "Base",
    "CalibratedLora",
    "GlobalConstant",
    "LabelBias",
    "MergeThenAdapt",
    "Merged",
    "Method",
    "NoHistory",
    "OneLora",
    "OtherPerson",
    "Outcome",
    "OwnConstant",
    "PopulationMerge",
    "TaskLora",
]

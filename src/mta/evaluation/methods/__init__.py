"""The methods that are compared. Each gets the panel's shots and answers the panel's queries.

A method is one small class in one of these files: its settings are its fields, ``paper`` says where it comes from, and
``run`` does it. ``docs/how-to/add-a-method.md`` walks through one.
"""

from mta.evaluation.methods.choice import Chosen
from mta.evaluation.methods.merged import Merged, MergedByLayer, MergeThenAdapt
from mta.evaluation.methods.method import METHODS, AnyMethod, Method, Outcome, parse_method, register
from mta.evaluation.methods.per_pcs import PerPcs
from mta.evaluation.methods.plain import Base, GlobalConstant, OwnConstant, TaskLora
from mta.evaluation.methods.prime import Prime
from mta.evaluation.methods.prompted import Profile, Retrieved
from mta.evaluation.methods.trained import OneLora

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
    "Outcome",
    "OwnConstant",
    "PerPcs",
    "Prime",
    "Profile",
    "Retrieved",
    "TaskLora",
    "parse_method",
    "register",
]

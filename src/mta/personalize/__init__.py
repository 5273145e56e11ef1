"""Stages 2 and 3 for many people together: merge, adapt, answer, export, forget."""

from mta.personalize.personalizer import Forgotten, Personalizer, forget_person

__all__ = [
    "Forgotten",
    "Personalizer",
    "forget_person",
]

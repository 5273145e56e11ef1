"""Stages 2 and 3 for many people together: merge, adapt, answer, export, forget."""

from mta.personalize.forgetting import Forgotten, forget_person
from mta.personalize.personalizer import Personalizer

__all__ = ["Forgotten", "Personalizer", "forget_person"]

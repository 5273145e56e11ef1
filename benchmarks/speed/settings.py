"""What a run of the benchmark is asked for; every module's ``rows`` takes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from mta.kernels.compile import obstacle, switched_off

MODULES = ("adaptation", "multi_lora", "coefficients", "limit", "merging", "decoding")  # in the order of the table


@dataclass(frozen=True, slots=True)
class Settings:
    """``full`` is the night's run, ``quick`` the smallest one that touches everything (for tests, not for figures).

    ``repeats`` turns of A and B per row; ``people`` in a cohort of short prompts; ``memory`` bounds a cohort, as
    ``mta`` writes it. ``done`` names rows that need not be measured again.
    """

    full: bool = False
    repeats: int = 3
    people: int = 32
    memory: str = "4GiB"
    quick: bool = False
    done: frozenset[str] = frozenset()

    @property
    def reviewers(self) -> int:
        """People in a cohort of long prompts, eight times as dear: half as many, in a short run an eighth."""
        return max(self.people // (2 if self.full else 8), 1)

    @property
    def steps(self) -> int:
        """Optimizer steps of a few-shot adaptation."""
        return 2 if self.full else 1

    def wanted(self, name: str) -> bool:
        """Whether the row of that name is still to be measured."""
        return name not in self.done

    def as_dict(self) -> dict[str, Any]:
        """As the JSON keeps it, and what a kept row must agree in."""
        values = asdict(self)
        del values["done"]
        return values | {
            "threads": torch.get_num_threads(),
            "kernels": obstacle() or f"without {sorted(switched_off())}",
        }

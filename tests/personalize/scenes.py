"""People with shots, a bank, and a task LoRA, in float64."""

import pytest
from tiny import base_of, random_examples, random_loras

from mta.personalize.shots import ShotsJob


@pytest.fixture(scope="module")
def scene():
    """A base, a task LoRA, a bank of four anchors, and three people with shots."""
    base = base_of()
    jobs = [ShotsJob(f"p{n}", random_examples(n, seed=n)) for n in (3, 1, 5)]
    return base, random_loras(base, 1, seed=1, size=0.2), random_loras(base, 4, seed=2, size=0.2), jobs

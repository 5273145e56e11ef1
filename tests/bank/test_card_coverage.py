"""Simulated banks in a quadratic world, where the true gain of a new person is known: does the card's interval hold?"""

import math
from collections import Counter

import pytest
import torch

from mta.bank.calibration.crossfit import Calibrator
from mta.bank.calibration.laplace import Calibration
from mta.bank.calibration.people import Subject
from mta.config import CalibrationSettings
from mta.data.tasks.prompt import Example

ANCHORS, PEOPLE, SHOTS, QUERIES, BANKS = 12, 48, 8, 4, 300
ITEMS = SHOTS + QUERIES
POOLED = -1.4  # log-likelihood of an item under the pooled model
NEWCOMERS = 2000


def drawn(*shape: int, random: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, ANCHORS, generator=random, dtype=torch.float64)


class World:
    """Items whose log-likelihood at coefficients w is POOLED + g.w - |w|^2 / 2.

    An item's g is ``effect`` in each direction, plus what its person adds (variance ``between``), plus noise of
    variance 1. One item is one token, and an example's only token is its item's number.
    """

    def __init__(self, seed: int, effect: float, between: float) -> None:
        random = torch.Generator().manual_seed(seed)
        self.effect, self.between = torch.full((ANCHORS,), effect).double(), between
        people = self.effect + math.sqrt(between) * drawn(PEOPLE, 1, random=random)
        self.items = (people + drawn(PEOPLE, ITEMS, random=random)).flatten(0, 1)
        examples = [Example((0, number), 1) for number in range(len(self.items))]
        starts = range(0, len(examples), ITEMS)
        self.subjects = [
            Subject(tuple(examples[a : a + SHOTS]), tuple(examples[a + SHOTS : a + ITEMS])) for a in starts
        ]

    def measure(self, pieces):
        for piece in pieces:
            found = []
            for examples, w in zip(piece.examples, piece.w):
                g = self.items[[example.tokens[1] for example in examples]]
                loglik = POOLED + g @ w - w @ w / 2
                found.append(
                    torch.cat([g - w, loglik[:, None]], 1) if piece.kind == "gradients" else loglik.sum()[None]
                )
            yield piece, torch.cat(found)

    def calibrated(self) -> Calibration:
        words = {"anchors": ANCHORS, "settings": CalibrationSettings(), "measure": self.measure, "stacks": False}
        return Calibrator(self.subjects, **words).run()

    def gain(self, calibration: Calibration, shots: int) -> float:
        """The mean gain of new people with so many shots, each with as many later items as they like."""
        random = torch.Generator().manual_seed(1)
        people = self.effect + math.sqrt(self.between) * drawn(NEWCOMERS, random=random)
        mean, mu = people + drawn(NEWCOMERS, random=random) / math.sqrt(shots), calibration.mu
        loglik = POOLED + mean @ mu - mu @ mu / 2
        w = calibration.coefficients(shots * (mean - mu), shots * loglik, torch.full((NEWCOMERS,), shots))
        return float(((people * w).sum(1) - w.square().sum(1) / 2).mean())


@pytest.mark.slow
@pytest.mark.parametrize("between", [0.0, 0.03, 0.125], ids=lambda between: f"between={between}")
@pytest.mark.parametrize("effect", [0.0, 0.05, 0.1, 0.15], ids=lambda effect: f"effect={effect}")
def test_the_true_gain_is_rarely_below_the_interval_of_the_card(effect, between):
    """In at most 10% of the banks whose card shows the row: by a merge for everybody, and by people's own merges."""
    shown, below = Counter[tuple[bool, int]](), Counter[tuple[bool, int]]()
    for seed in range(BANKS):
        world = World(seed, effect, between)
        calibration = world.calibrated()
        if not calibration.mu.any() and not calibration.personal:
            assert not any(gain.mean for gain in calibration.info.gains)
            continue
        for gain in calibration.info.gains:
            row = calibration.personal, gain.shots
            shown[row] += 1
            below[row] += world.gain(calibration, gain.shots) < gain.low
    often = {row for row in shown if below[row] > max(1, 0.1 * shown[row])}
    assert not often, (shown, below)

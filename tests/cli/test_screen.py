"""What people see while something runs: plain lines where there is no terminal, with a rate and the time left."""

import itertools

import pytest

from mta.cli import screen
from mta.cli.screen import Screen
from mta.training.trainer import Step


@pytest.fixture
def lines(monkeypatch, capsys):
    """What a screen says when every step takes 20 seconds."""
    ticks = itertools.count(100, 20)
    monkeypatch.setattr(screen.time, "monotonic", lambda: float(next(ticks)))

    def told(*steps: Step) -> list[str]:
        with Screen() as shown:
            for step in steps:
                shown.step("stack", step)
        return capsys.readouterr().err.splitlines()

    return told


def test_a_line_has_progress_loss_rate_and_time_left(lines):
    told = lines(Step(1, 2, 10, 50, 0.5), Step(2, 2, 30, 50, 0.25))
    assert told == [
        "stack: 10/50 examples  2 people  loss 0.500",
        "stack: 30/50 examples  2 people  loss 0.250  1.0 examples/s  about 20 s left",
    ]


def test_the_next_cohort_has_a_rate_of_its_own(lines):
    cohort = (Step(1, 1, 20, 40), Step(2, 1, 40, 40))
    told = lines(*cohort, *cohort)
    assert told[:2] == told[2:]
    assert "1.0 examples/s" in told[3]

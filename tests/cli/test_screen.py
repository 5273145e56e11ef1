"""Progress: a bar for each stage on a terminal, plain lines with rate and remaining time elsewhere."""

import io
import itertools
from types import SimpleNamespace

import pytest
from rich.console import Console

from mta.cli import screen
from mta.cli.screen import Screen
from mta.system.progress import Step


@pytest.fixture
def lines(monkeypatch, capsys):
    """Return the lines that a Screen prints if every step takes 20 seconds."""
    ticks = itertools.count(100, 20)
    monkeypatch.setattr(screen, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))

    def printed(*steps: Step) -> list[str]:
        with Screen() as shown:
            for step in steps:
                shown.step("stack", step)
        return capsys.readouterr().err.splitlines()

    return printed


def test_a_line_has_progress_loss_rate_and_time_left(lines):
    found = lines(Step(1, 2, 10, 50, 0.5), Step(2, 2, 30, 50, 0.25))
    assert found == [
        "stack: 10/50 examples  2 people  loss 0.500",
        "stack: 30/50 examples  2 people  loss 0.250  1.0 examples/s  about 20 s left",
    ]


def test_each_cohort_has_its_own_rate(lines):
    cohort = (Step(1, 1, 20, 40), Step(2, 1, 40, 40))
    found = lines(*cohort, *cohort)
    assert found[:2] == found[2:]
    assert "1.0 examples/s" in found[3]


def test_each_row_on_a_terminal_has_one_time_left(monkeypatch):
    wide = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(screen, "console", wide)
    with Screen() as shown:
        shown.whole("whole demo", 0.5, 260.0)
        shown.step("stack", Step(1, 2, 10, 50, 0.5))
        shown._progress.refresh()
        whole, stage = (str(row).split() for row in _rows(shown))
    assert (whole.count("left"), " ".join(whole[-4:])) == (1, "about 4.3 min left")
    assert (stage.count("left"), stage[-2:]) == (1, ["-:--:--", "left"])


def _rows(shown):
    plain = Console(file=io.StringIO(), width=120)
    plain.print(shown._progress.get_renderable())
    return plain.file.getvalue().rstrip().splitlines()

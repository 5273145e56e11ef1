"""Progress: a bar for each stage on a terminal, plain lines with rate and remaining time elsewhere."""

import io
import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from mta.cli import screen
from mta.cli.screen import Screen
from mta.system.progress import Step


def terminal(width, kind="xterm"):
    """A terminal whose output can be read."""
    return Console(file=io.StringIO(), force_terminal=True, width=width, _environ={"TERM": kind})


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


def test_work_of_other_processes_is_said_once(lines, monkeypatch):
    used = iter([0.1, 1.8, 1.9])
    monkeypatch.setattr(screen.OtherProcesses, "cores", lambda _: next(used))
    found = lines(*(Step(n, 2, 10 * n, 90) for n in range(1, 5)))
    assert [line for line in found if "cores" in line] == [found[2]]
    assert found[2].startswith("Other processes use 1.8 of ")
    assert "set OMP_NUM_THREADS" in found[2]


def test_names_in_brackets_are_shown_as_they_are(capsys):
    Screen().say("MTA [k=2] [/old]")
    assert capsys.readouterr().err == "MTA [k=2] [/old]\n"


def test_each_cohort_has_its_own_rate(lines):
    cohort = (Step(1, 1, 20, 40), Step(2, 1, 40, 40))
    found = lines(*cohort, *cohort)
    assert found[:2] == found[2:]
    assert "1.0 examples/s" in found[3]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_time_left_stays_readable_on_a_narrow_terminal(monkeypatch, width):
    monkeypatch.setattr(screen, "console", terminal(width))
    with Screen() as shown:
        shown.step("task LoRA", Step(1, 423, 8, 1200, 0.5))
        shown._progress.update(0, note="     8/1200 examples  423 people  loss 1.234  27.5 examples/s")
        plain = Console(file=io.StringIO(), width=width)
        plain.print(shown._progress.get_renderable())
    (row,) = plain.file.getvalue().rstrip().splitlines()
    assert row.rstrip().endswith(" 0:00:00 -:--:-- left")
    assert "…" in row


def test_a_file_gets_no_bars_even_if_colours_are_forced():
    script = "from mta.cli.screen import Screen; from mta.system.progress import Step\n"
    script += "with Screen() as shown: shown.step('stack', Step(1, 2, 3, 4))"
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm"}
    said = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "stack: 3/4 examples  2 people" in said.stderr
    assert "\x1b[2K" not in said.stderr

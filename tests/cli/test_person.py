"""The chart of a person's coefficients."""

import io
from types import SimpleNamespace

from rich.console import Console

from mta.cli.person import SHOWN, _chart
from mta.tools.inspect import Weight


def drawn(*weights):
    console = Console(file=io.StringIO(), width=80)
    console.print(_chart(SimpleNamespace(weights=[Weight(n, w) for n, w in enumerate(weights)])))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_negative_coefficients_have_bars_to_the_left_of_zero():
    high, low = drawn(0.2, -0.1)
    assert high == " anchor 0  +0.200            ████████████████████"
    assert low == " anchor 1  -0.100  ██████████"


def test_the_weakest_anchors_are_a_sum_without_a_bar():
    lines = drawn(*[0.5] * (SHOWN - 1), 0.01, -0.02, -0.3)
    assert [line.split()[1] for line in lines] == [*map(str, range(SHOWN - 1)), str(SHOWN + 1), "others"]
    assert lines[-1].split() == ["2", "others", "-0.010", "in", "sum"]

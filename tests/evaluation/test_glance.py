"""The final screen of the demo, and the answers of people's models that it shows."""

import io
import re

import pytest
from compared import ASKED, EVERY, comparison_of
from conftest import people_of
from crowd import knowing
from rich.console import Console

from mta.data.tasks import load_task
from mta.evaluation.reports.glance import bars, before, show_glance
from mta.evaluation.sample_answers import PersonAnswers, SampleAnswers, sample_answers
from mta.personalize.adapters import TASK

FIELDS = [{"title": "Alien", "genres": "Horror"}, {"title": "Heat", "genres": "Crime"}]


@pytest.fixture
def screen():
    console = Console(file=io.StringIO(), width=80)
    show_glance(comparison_of(load_task("movielens-rating")), ASKED, ["mta serve"], console)
    return console.file.getvalue()


def test_the_screen_shows_people_before_and_after_scores_and_what_to_do_next(screen):
    lines = [" ".join(line.split()) for line in screen.splitlines()]
    assert "Person c1, 3 shots, 1.7 on average:" in lines
    assert "gave 1: Alien" in lines
    assert f"Fargo {bars(EVERY, ASKED.labels)} 3.4 {bars(EVERY, ASKED.labels)} 3.4" in lines
    assert [line for line in lines if line.startswith("OPPU ") and "worse" in line]
    (ours,) = [line for line in lines if line.startswith("MTA ") and "better" in line]
    assert "1.2 MB" in ours
    assert "mta serve" in lines
    assert not re.search(
        r"[a-z0-9]…", "\n".join(screen[screen.index("method") :].splitlines()[:6])
    )  # nothing is cut off


def test_bars_have_one_character_per_label_and_grow_with_the_probability():
    found = bars({"1": 0.0, "2": 0.5, "3": 1.0}, ("1", "2", "3"))
    assert found == "▁▄█"
    assert bars("a text", ()) == "a text"
    many = {str(n): 0.05 for n in range(19)} | {"19": 0.05}
    assert bars({**many, "7": 0.4}, tuple(many)) == "7 40%"


def test_items_are_listed_by_label_or_as_texts():
    person = ASKED.people[0]
    assert before(person, ASKED.labels)[1] == "  gave 1: Alien"
    assert before(person, ())[1] == "  Alien  ->  1"
    assert before(person, ("[1]", "[2]"))[1] == "  Alien  ->  1"  # the history has no labels, as LaMP-1's


def test_texts_and_ids_with_markup_are_shown_as_they_are():
    person = PersonAnswers(
        "[b]", "with 1 shots", (("[/INST] a", "[red]"),), ("[/b] an answer that is longer than a title",)
    )
    console = Console(file=io.StringIO(), width=120)
    made = SampleAnswers(("[/INST] why?",), (), ("[i]",), (person,))
    show_glance(comparison_of(load_task("movielens-rating")), made, [], console)
    for text in ("Person [b], with 1 shots", "[/INST] a  ->  [red]", "[/b] an answer that is longer than a title"):
        assert text in console.file.getvalue()
    assert "mean" not in console.file.getvalue().partition("method")[0]


def test_equal_answers_have_equal_bars_for_every_person():
    """The highest bar of the screen is the most likely answer of anybody, not of one person."""
    sure, unsure = ({"1": share, "2": 1 - share} for share in (0.9, 0.5))
    two = [PersonAnswers(name, "one shot", (("Heat", "1"),), (own,)) for name, own in (("a", sure), ("b", unsure))]
    console = Console(file=io.StringIO(), width=80)
    made = SampleAnswers(("Fargo",), ("1", "2"), (unsure,), tuple(two))
    show_glance(comparison_of(load_task("movielens-rating")), made, [], console)
    shown = [line.split()[1] for line in console.file.getvalue().splitlines() if line.strip().startswith("Fargo")]
    assert shown == [bars(unsure, ("1", "2"), 0.9)] * 2


def test_sample_answers_have_the_answers_of_the_library(tiny_personal):
    personal, people = tiny_personal
    found = sample_answers(personal, people[:2], FIELDS)
    assert found.questions == ("Alien", "Heat")

    def answers(who):
        return [pytest.approx(shares) for shares in personal.shares([(who, fields) for fields in FIELDS])]

    assert list(found.pooled) == answers(TASK)
    for person, asked in zip(people, found.people, strict=False):
        assert list(asked.answers) == answers(person.id)
        assert all(list(answer) == ["1", "2", "3", "4", "5"] for answer in asked.answers)
        assert len(asked.shots) == len(person.items)


@pytest.fixture
def tiny_personal(tiny, tmp_path):
    people = people_of(2, prefix="x")
    return knowing(*tiny, tmp_path / "people", people), people

"""The final screen of the demo, and the two people that it shows."""

import io
import re
from types import SimpleNamespace

import torch
from compared import ASKED, EVERY, LABELS, comparison_of, rated
from conftest import people_of
from rich.console import Console

from mta.data.tasks import load_task
from mta.evaluation.reports.glance import before, said, show_glance
from mta.evaluation.reports.two_people import Asked, two_people
from mta.evaluation.statistics import Comparison


def screen_of(people):
    console = Console(file=io.StringIO(), width=100)
    show_glance(comparison_of(load_task("movielens-rating")), people, ["mta serve"], console)
    return console.file.getvalue()


def test_the_screen_shows_people_with_true_answers_scores_and_what_to_do_next():
    screen = screen_of(ASKED)
    lines = [" ".join(line.split()) for line in screen.splitlines()]
    assert "Person c1 gave 2 answers:" in lines
    assert "1: Alien" in lines
    assert "true everybody's their own" in lines
    assert "Fargo 4 3.4 3.4" in lines
    assert "mean error, all 2 1.50 0.30" in lines  # |1 - 3.4| and |4 - 3.4|; |1 - 1| and |4 - 3.4|
    assert [line for line in lines if line.startswith("OPPU ") and "worse" in line]
    (ours,) = [line for line in lines if line.startswith("MTA ") and "better" in line]
    assert "1.2 MB" in ours
    assert "mta serve" in lines
    table = screen[screen.index("method") :].splitlines()[:6]
    assert not re.search(r"[a-z0-9]…", "\n".join(table))  # nothing is cut off


def test_an_answer_is_a_number_the_most_likely_label_or_a_text():
    assert said(EVERY) == "3.4"
    assert said({"dog": 0.25, "cat": 0.75}) == "cat 75%"
    assert said("a  text") == "a text"


def test_items_are_listed_by_label_or_as_texts():
    person = ASKED[0]
    assert before(person)[1] == "  1: Alien"
    unlabelled = Asked(0, "c", (), person.shots, (), (), {})
    assert before(unlabelled)[1] == "  Alien  ->  1"


def test_texts_and_ids_with_markup_are_shown_as_they_are():
    person = Asked(
        0, "[b]", (), (("[/INST] a", "[red]"),), ("[/INST] why?",), ("[i]",), {"MTA": ("[/b] an answer like a title",)}
    )
    shown = screen_of([person])
    for text in ("Person [b] gave", "[/INST] a  ->  [red]", "[i]", "[/b] an answer like a title"):
        assert text in shown
    assert "mean error" not in shown


def test_the_two_people_have_the_models_that_differ_most_in_content():
    """Not those whose models differ by the same number for each question: that is a habit."""
    task = load_task("movielens-rating")
    rows = [rated(task, name, people=3, queries=4) for name in ("task LoRA", "MTA")]
    for person, ratings in zip(rows[1].answers, ([0, 1, 2, 3], [1, 2, 3, 4], [3, 2, 1, 0])):
        person.scores[:] = 50.0 * torch.eye(5)[ratings]
    people = people_of(3, items=8, prefix="x")
    asked = [tuple(people[0].items[4:])] * 3  # all answer the same questions
    golds = [["1", "2", "3", "4"], ["5", "5", "5", "5"], ["3", "3", "3", "3"]]
    batch = SimpleNamespace(task=task, people=people, queries=asked, golds=golds)
    first, second = two_people(batch, Comparison(task, rows))
    assert (first.id, second.id) == (people[0].id, people[2].id)
    assert (first.golds, first.labels) == (tuple(golds[0]), LABELS)
    assert list(first.answers) == ["task LoRA", "MTA"]
    shares = torch.tensor([list(answer.values()) for answer in second.answers["MTA"]])
    torch.testing.assert_close(shares, rows[1].answers[2].scores.softmax(1))


def test_people_who_were_asked_other_questions_are_the_first_and_the_last():
    task = load_task("movielens-rating")
    rows = [rated(task, name, people=3, queries=1) for name in ("task LoRA", "MTA")]
    people = people_of(3, items=2, prefix="x")
    batch = SimpleNamespace(task=task, people=people, queries=[one.items[:1] for one in people], golds=[["1"]] * 3)
    assert [one.place for one in two_people(batch, Comparison(task, rows))] == [0, 2]

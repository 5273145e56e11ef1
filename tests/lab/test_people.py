"""Who is tested and who trains: parts of an experiment's people, also of people from another file."""

from dataclasses import replace
from functools import cache

import pytest
from conftest import people_of

from mta.config import override
from mta.data.history import Item, Person
from mta.data.sharing import connected
from mta.data.splits import PARTS
from mta.data.tasks import load_task
from mta.errors import InputError
from mta_lab.experiments.people import draw_splits, with_tested
from mta_lab.experiments.recipe import Experiment, Part, load_experiment

recipe = cache(load_experiment)


@cache
def authors(pairs: int, items: int = 12) -> list[Person]:
    """Pairs of people with copies of one long text; every fifth person has few items."""
    made = []
    for n in range(2 * pairs):
        texts = [f"{'written with somebody ' * 5}{n // 2}", *(f"{'alone ' * 20}{n}/{k}" for k in range(items))]
        fields = [{"abstract": text, "title": f"About {n // 2}"} for text in texts]
        made.append(
            Person.of(f"p{n:03}", [Item(one, float(t)) for t, one in enumerate(fields)][: 2 if n % 5 == 0 else 99])
        )
    return connected(made, load_task("lamp5"))[0]


def recipe_of(*words: str) -> Experiment:
    people = ["people.test=12", "people.candidates=16", "people.development=4", "people.task=30"]
    return override(recipe("lamp5"), ["queries=12", "shots=1", "run.bank.min_items=3", *people, *words])


def test_people_who_share_items_are_in_one_part():
    people = authors(40)
    splits, sizes = draw_splits(recipe_of(), load_task("lamp5"), people)
    part = {id: name for name in PARTS for id in getattr(splits, name)}
    for one, other in zip(people[::2], people[1::2]):
        assert len({part[p.id] for p in (one, other) if p.id in part}) <= 1
    assert (len(splits.test), len(splits.candidates)) == (12, 16)
    assert (sizes["people who share items"], sizes["groups"], sizes["test queries trained on"]) == (80, 40, 0)


def test_people_whom_settings_were_chosen_on_are_never_tested():
    people = authors(40)
    usual, later = (
        draw_splits(recipe_of(*words), load_task("lamp5"), people)[0] for words in ((), ("people.never_tested=12",))
    )
    assert len(later.test) == 12
    assert not {*usual.test} & {*later.test, *later.development, *later.candidates}
    assert {*usual.test} <= {*later.task}


def test_too_few_people_beside_those_who_are_never_tested_is_an_error_that_names_the_setting():
    people, task = authors(40), load_task("lamp5")
    draw_splits(recipe_of("people.never_tested=30"), task, people)
    for count, others in ((40, 24), (400, 0)):
        with pytest.raises(InputError, match=f"of the other {others} people with enough items, 32 are") as caught:
            draw_splits(recipe_of(f"people.never_tested={count}"), task, people)
        assert "people.never_tested=0" in caught.value.hint


def test_tested_people_are_counted_as_they_are_asked():
    """Where questions differ from history items, only own questions are asked: shots are all they need besides."""
    task, recipe = load_task("lamp1"), override(recipe_of("shots=4"), ["run.task=lamp1", "queries=2"])
    history = [Item({"title": f"Paper {n}", "abstract": f"About {n}"}, float(n)) for n in range(4)]
    own = Item({"title": "Mine", "ref1": "A", "ref2": "B", "reference": "[1]"}, is_query=True)
    people = [Person.of(f"p{n}", history, [own]) for n in range(40)]
    splits, sizes = draw_splits(recipe, task, people)
    assert splits.test
    assert sizes["test people with shots"] == {1: len(splits.test), 4: len(splits.test), 8: 0, 16: 0}


def test_separated_groups_are_counted_as_queries_trained_on(caplog):
    people, recipe = authors(40), recipe_of("people.together=false")
    _, sizes = draw_splits(recipe_of("people.together=false"), load_task("lamp5"), people)
    assert sizes["test queries trained on"] == 0  # the copy is the oldest item: a shot, and no query
    reversed_people = [Person(p.id, p.items[::-1], group=p.group) for p in people]
    _, sizes = draw_splits(recipe, load_task("lamp5"), reversed_people)
    assert sizes["test queries trained on"] > 0
    assert "test queries also occur in the histories of training people" in caplog.text


def test_people_of_another_source_are_tested_and_their_copies_train_nothing():
    people = authors(40)
    # Copies of the first pair, of others with few items, and somebody new; all with ids that the data has, too.
    tested = [Person(f"p{n:03}", people[n].items) for n in (1, 5, 7)]
    tested.append(Person("p009", tuple(Item({"abstract": f"{'new ' * 30}{n}", "title": "New"}) for n in range(14))))
    task, recipe = load_task("lamp5"), recipe_of()
    known, new = with_tested(recipe, task, people, tested)
    splits, sizes = draw_splits(recipe, task, known, new)
    assert [id.partition("/")[2] for id in splits.test] == ["p001", "p007", "p009"]  # the other has too few items
    used = {*splits.task, *splits.candidates, *splits.development}
    assert not used & {"p000", "p001", "p006", "p007"}  # nor those who share items with them
    assert (len(splits.candidates), len(splits.task)) == (16, 30)
    assert sizes["test queries trained on"] == 0
    changed = [replace(tested[0], items=tested[0].items[::-1]), *tested[1:]]
    assert draw_splits(recipe, task, *with_tested(recipe, task, people, changed))[0].digest != splits.digest
    with pytest.raises(InputError, match="none of the 1 people to test has 1 shots and 12 queries"):
        with_tested(recipe, task, people, tested[1:2])


def test_people_who_hold_a_tested_history_train_nothing_even_if_answers_are_independent():
    """Ratings of the same films connect nobody, but an excerpt of somebody's history is that somebody."""
    task, people = load_task("movielens-rating"), people_of(40, items=60)
    recipe = recipe_of("run.task=movielens-rating", "queries=2")
    known, _ = with_tested(recipe, task, people, [Person("0", people[7].items[20:30])])
    assert [p.id for p in people if p.id not in {one.id for one in known}] == [people[7].id]


def test_parts_with_own_seeds_run_with_the_first_of_other_seeds():
    part, whole = Part(methods=(), seeds=(0,)), Part(methods=())
    for seeds, own in (((0, 1, 2), (0,)), ((1, 2), (1,)), ((2, 0), (0,))):
        recipe = recipe_of(f"seeds={list(seeds)}")
        assert (recipe.seeds_of(part), recipe.seeds_of(whole)) == (own, seeds)

"""Earlier items of a person in front of items and questions."""

from dataclasses import replace

import pytest
from conftest import people_of
from tiny import base_of

from mta.data.earlier import as_shown, with_history
from mta.data.history import PROFILE
from mta.data.tasks import load_task
from mta.training.packing import tree

TASK = load_task("movielens-rating")
(PERSON,) = people_of(1, items=12)


def shown(item):
    """The texts of the earlier items that an item's prompt shows."""
    text = item.fields.get(PROFILE, "").removeprefix("Earlier answers of this person: ").removesuffix(". ")
    return text.split("; ") if text else []


@pytest.mark.parametrize("most", [0, 1, 3, 20])
def test_an_item_shows_the_items_of_its_block_and_a_query_the_latest(most):
    person = with_history(TASK, replace(PERSON, queries=PERSON.items[:2]), most)
    said = [TASK.sentence(item) for item in PERSON.items]
    for n, item in enumerate(person.items):
        first = n - n % (most + 1)
        assert shown(item) == said[first:n]
        assert {name: text for name, text in item.fields.items() if name != PROFILE} == PERSON.items[n].fields
    assert all(shown(query) == (said[-most:] if most else []) for query in person.queries)


def test_a_persons_items_share_the_beginning_of_their_prompts():
    prompts = base_of().prompts
    person = with_history(TASK, PERSON, 11)
    examples = [prompts.example(TASK, item) for item in person.items]
    alone = sum(len(example.tokens) for example in examples)
    assert len(tree(examples, range(len(examples))).tokens) < 0.6 * alone


def test_chosen_items_are_shown_as_in_their_persons_whole_history():
    people = people_of(3, items=7)
    chosen = [people[2].items[5], people[0].items[0], people[2].items[1]]
    whole = [with_history(TASK, person, 3) for person in people]
    assert as_shown(TASK, people, chosen, 3).items == [whole[2].items[5], whole[0].items[0], whole[2].items[1]]
    assert as_shown(TASK, people, chosen, 0) == (chosen, [0, 1, 2])
    assert as_shown(TASK, people, [*people[1].items[::-1], chosen[0]], 3).blocks == [0, 0, 0, 1, 1, 1, 1, 2]


def test_a_text_that_holds_the_separator_stays_one_item():
    titled = replace(PERSON.items[0], fields={**PERSON.items[0].fields, "title": "Red; White; Blue"})
    person = with_history(TASK, replace(PERSON, items=(titled, *PERSON.items[1:])), 4)
    assert len(shown(person.items[2])) == 2


def test_what_prompts_show_changes_no_digest():
    person = with_history(TASK, PERSON, 4)
    assert person != PERSON
    assert person.digest() == PERSON.digest()
    assert person.grown_from(PERSON.first(5).digest()) == 5


def test_a_long_history_is_cut_before_the_question():
    prompts = base_of().prompts
    prompts.max_tokens = 200
    item = with_history(TASK, PERSON, 11).items[-1]
    example = prompts.example(TASK, item)
    assert example.cut > 0
    assert len(example.tokens) <= 200
    kept = prompts.decode(example.prompt).count(" stars for ")
    assert 0 < kept < 11
    latest = with_history(TASK, replace(PERSON, items=PERSON.items[-kept - 1 :]), kept).items[-1]
    assert example.tokens == prompts.example(TASK, latest).tokens

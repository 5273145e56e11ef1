"""The items of the task LoRA: a few of each person, independent of the order of people."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from conftest import people_of
from hypothesis import given
from hypothesis import strategies as st

from mta.bank.selection import pooled_items
from mta.config import TaskLoraSettings
from mta.data.history import Item, Person


def people(*sizes: int) -> list[Person]:
    return [
        Person(f"p{n}", tuple(Item({"who": f"p{n}", "what": str(i)}) for i in range(size)))
        for n, size in enumerate(sizes)
    ]


def pool(people, seed=0, **settings) -> list[tuple[str, str]]:
    items, _ = pooled_items(people, TaskLoraSettings(**settings), seed)
    return [(item.fields["who"], item.fields["what"]) for item in items]


def counts(pooled) -> Counter:
    return Counter(who for who, _ in pooled)


def test_everything_is_pooled_where_nothing_binds():
    assert sorted(pool(people(2, 3))) == [("p0", "0"), ("p0", "1"), ("p1", "0"), ("p1", "1"), ("p1", "2")]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 20), st.integers(1, 5), st.integers(0, 3))
def test_the_pool_is_bounded_per_person_and_in_all_and_as_even_as_it_can_be(sizes, items, per_person, seed):
    found = pool(people(*sizes), seed, items=items, per_person=per_person)
    theirs = counts(found)
    able = {f"p{n}": min(size, per_person) for n, size in enumerate(sizes)}
    assert len(set(found)) == len(found) == min(items, sum(able.values()))
    most = max(theirs.values(), default=0)
    assert most <= per_person
    assert all(theirs[who] >= min(most - 1, able[who]) for who in able)


def test_the_pool_does_not_depend_on_the_order_of_people():
    given, first = people(5, 2, 9, 4), pool(people(5, 2, 9, 4), items=9, per_person=3)
    for seed in range(4):
        random.Random(seed).shuffle(given)
        assert pool(given, items=9, per_person=3) == first


def test_another_seed_draws_another_pool():
    drawn = {tuple(sorted(pool(people(9, 9, 9), seed, items=6))) for seed in range(5)}
    assert len(drawn) == 5
    assert pool(people(9, 9, 9), 4, items=6) == pool(people(9, 9, 9), 4, items=6)


def test_a_person_who_joins_moves_nobody_elses_lot():
    few, more = pool(people(9, 9), per_person=2), pool(people(9, 9, 9), per_person=2)
    assert [entry for entry in more if entry[0] != "p2"] == few


@pytest.mark.parametrize("items", [1, 5, 24])
def test_a_pool_is_the_beginning_of_every_larger_pool(items):
    everyone = people_of(4)
    larger, _ = pooled_items(everyone, TaskLoraSettings(), 0)
    assert pooled_items(everyone, TaskLoraSettings(items=items), 0) == (larger[:items], [])


@pytest.mark.parametrize("groups", [19, 20, 45])
def test_a_tenth_of_the_people_is_held_out_with_those_who_share_items(groups):
    twins = [replace(one, group=f"g{n // 2}") for n, one in enumerate(people(*[3] * (2 * groups)))]
    pools = pooled_items(twins, TaskLoraSettings(rounds=2), 0)
    trained, tested = ({int(item.fields["who"][1:]) // 2 for item in pool} for pool in pools)
    assert len(tested) == (groups // 10 if groups > 19 else 0)
    assert not trained & tested
    assert len(trained) + len(tested) == groups

"""People's items in the order of time, those without a time included."""

from hypothesis import given
from hypothesis import strategies as st

from mta.data.history import Item, Person


def person(*times: float | None) -> Person:
    return Person.of("ann", [Item({"text": f"{n}"}, time) for n, time in enumerate(times)])


def order(*times: float | None) -> list[int]:
    return [int(item.fields["text"]) for item in person(*times).items]


def test_an_item_without_a_time_follows_the_newest_item_before_it():
    assert order(3.0, None, 1.0, None, 4.0) == [2, 0, 1, 3, 4]
    assert order(None, 2.0, 1.0) == [0, 2, 1]
    assert order(None, None) == [0, 1]


@given(times=st.lists(st.none() | st.integers(0, 9), max_size=9), cut=st.integers(0, 9))
def test_items_that_are_appended_in_parts_stand_where_they_do_at_once(times, cut):
    whole = person(*times)
    assert Person.of("ann", whole.items) == whole
    first = person(*times[:cut])
    new = [Item({"text": f"{cut + n}"}, time) for n, time in enumerate(times[cut:])]
    assert Person.of("ann", (*first.items, *new)) == whole
    assert Person.of("ann", (*whole.items, Item({"text": "new"}))).items[-1:] == (Item({"text": "new"}),)

"""Who has shots and queries, where questions of a benchmark differ from history items."""

import pytest

from mta.data.history import Item, Person
from mta.data.shots_and_queries import has_enough_items, shots_and_queries
from mta.data.tasks import load_task


@pytest.mark.parametrize("ask", ["next", "last"])
def test_titles_of_papers_are_not_asked_where_the_task_asks_for_references(ask) -> None:
    task = load_task("lamp1")
    history = tuple(Item({"title": f"Paper {n}", "abstract": f"About {n}"}) for n in range(9))
    question = {"title": "Mine", "ref1": "A", "ref2": "B"}
    own, without = Item({**question, "reference": "[1]"}, is_query=True), Item(question, is_query=True)
    assert not has_enough_items(task, Person("ann", history), 3, 1, ask)
    assert not has_enough_items(task, Person("ann", history, (without,)), 3, 1, ask)
    assert shots_and_queries(task, Person("ann", history, (own,)), 3, 1, ask)[1] == (own,)

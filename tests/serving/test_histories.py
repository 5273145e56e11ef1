"""Items in memory: how much they take, and where items without a time stand."""

import tracemalloc

import pytest

from mta.data.history import Item
from mta.serving.api.histories import Histories
from mta.serving.engine import Refused
from mta.store import Store

DATED = [Item({"text": f"{n}"}, 1_700_000_000 + n) for n in range(3)]


def items(count, fields, characters, person):
    texts = [[f"{person} {n} {name} " + "x" * characters for name in range(fields)] for n in range(count)]
    return [Item({f"field {n}": text for n, text in enumerate(one)}, 1e9 + n) for n, one in enumerate(texts)]


@pytest.mark.parametrize(
    ("count", "fields", "characters"), [(1, 1, 10), (20, 1, 10), (20, 2, 10), (20, 3, 100), (5, 6, 1000)]
)
def test_the_memory_of_items_is_counted_as_it_is(tmp_path, count, fields, characters):
    histories, people = Histories(Store(tmp_path), 50), 300
    histories.append("warm", items(1, 1, 1, 0), False)
    before, _ = histories._shares.used.total(), tracemalloc.start()
    for person in range(people):
        histories.append(f"team/{person}", items(count, fields, characters, person), False)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.8 * taken < histories._shares.used.total() - before < 1.3 * taken


@pytest.mark.parametrize("keep", [False, True])
def test_an_item_without_a_time_follows_all_known_ones(tmp_path, keep):
    histories, new = Histories(Store(tmp_path), 50), Item({"text": "new"})
    histories.append("ann", DATED, True)
    histories.append("ann", [new], keep)
    assert histories.of("ann").items == (*DATED, new)
    assert histories.of("ann").latest(1).items == (new,)
    later = Item({"text": "later"}, 1_700_000_009)
    histories.append("ann", [later], True)
    assert set(histories.of("ann").latest(2).items) == {new, later}


@pytest.mark.parametrize("keep", [False, True])
def test_the_limit_counts_stored_items_and_those_in_memory(tmp_path, keep):
    histories = Histories(Store(tmp_path), 3)
    histories.append("ann", DATED[:2], not keep)
    histories.append("ann", DATED[1:], keep)  # one of these is known
    with pytest.raises(Refused, match="at most 3 items, this one would have 4"):
        histories.append("ann", [Item({"text": "new"})], keep)
    assert histories.of("ann").items == tuple(DATED)

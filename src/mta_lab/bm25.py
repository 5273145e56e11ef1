"""BM25 retrieval of a person's own earlier items for a prompt, as in LaMP and in the paper."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from mta.data.history import PROFILE, Item, Person
from mta.data.tasks.task import Task
from mta.system.extras import require


def retrieve(task: Task, item: Item, earlier: Sequence[Item], k: int) -> list[Item]:
    """Return the ``k`` of a person's ``earlier`` items with the texts nearest to the text of ``item``, nearest first.

    Texts are those that encoders see: without targets, so an answer does not influence retrieval.
    Source: BM25 with the library's defaults, as in LaMP (arXiv:2304.11406) and, with k = 1, in the paper's README.
    """
    require("lab", "bm25s")
    import bm25s

    if k < 1 or not earlier:
        return []
    texts = [task.text_of(one) for one in (*earlier, item)]
    *corpus, query = bm25s.tokenize(texts, return_ids=False, show_progress=False)
    if not any(corpus):  # bm25s cannot index an empty corpus
        return list(earlier[-k:])
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # after its import, bm25s logs every index
    index = bm25s.BM25()
    index.index(corpus, show_progress=False)
    numbers, _ = index.retrieve([query], k=min(k, len(earlier)), show_progress=False)
    return [earlier[int(number)] for number in numbers[0]]


def with_profile(task: Task, item: Item, earlier: Sequence[Item], k: int, before: str = "") -> Item:
    """Return the item behind the text of its field ``profile``: ``before``, then the ``k`` nearest items."""
    nearest = ", and ".join(task.sentence(one) for one in retrieve(task, item, earlier, k))
    profile = f"{before}{nearest}. " if nearest else before
    return Item({**item.fields, PROFILE: profile}, item.time, item.id, item.is_query)


def with_profiles(task: Task, person: Person, k: int, before: str = "") -> Person:
    """Return the person with a field ``profile`` in every item and query.

    The profile of an item is made of the items before it, the profile of a query of all items.
    """
    items = person.items
    with_earlier = tuple(with_profile(task, item, items[:n], k, before) for n, item in enumerate(items))
    queries = tuple(with_profile(task, query, items, k, before) for query in person.queries)
    return replace(person, items=with_earlier, queries=queries)

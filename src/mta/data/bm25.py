"""A person's own earlier items that fit a question: BM25, as the prompts of LaMP and of the paper have them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from mta.data.history import Item, Person
from mta.data.tasks.task import Task


def retrieve(task: Task, item: Item, earlier: Sequence[Item], k: int) -> list[Item]:
    """The ``k`` of a person's ``earlier`` items whose texts are nearest to the text of ``item``, nearest first.

    Texts are those that encoders see: no target, so an answer cannot find itself.
    Source: BM25 with the library's defaults; LaMP (arXiv:2304.11406) retrieves so, and the paper's README with k = 1.
    """
    import bm25s

    if k < 1 or not earlier:
        return []
    corpus, query = (_words([task.text_of(one) for one in items]) for items in (earlier, [item]))
    if not any(corpus):  # bm25s cannot index nothing
        return list(earlier[-k:])
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # on import it begins to tell of every index
    index = bm25s.BM25()
    index.index(corpus, show_progress=False)
    found, _ = index.retrieve(query, k=min(k, len(earlier)), show_progress=False)
    return [earlier[int(number)] for number in found[0]]


def with_profile(task: Task, item: Item, earlier: Sequence[Item], k: int, before: str = "") -> Item:
    """The item with a field ``profile``, for ``task.profiled()``: ``before`` and the ``k`` nearest earlier items."""
    told = ", and ".join(task.told(one) for one in retrieve(task, item, earlier, k))
    profile = f"{before}{told}. " if told else before
    return Item({**item.fields, "profile": profile}, item.time, item.id, item.is_query)


def with_profiles(task: Task, person: Person, k: int, before: str = "") -> Person:
    """The person with a field ``profile`` in every item: each sees the items before it, a query all of them."""
    items, queries = person.items, person.queries
    seen = [with_profile(task, item, items[:n], k, before) for n, item in enumerate(items)]
    asked = tuple(with_profile(task, item, items, k, before) for item in queries)
    return replace(person, items=tuple(seen), queries=asked)


def _words(texts: Sequence[str]) -> list[list[str]]:
    from bm25s import tokenize

    return [list(words) for words in tokenize(list(texts), return_ids=False, show_progress=False)]

"""People who hold copies of the same items are one group."""

import logging
import random

import pytest
from files import ASK, dumped, jsonl, prose, review, shared_data

from mta.data.history import Item, Person
from mta.data.readers import read_people
from mta.data.sharing import CROWD, Copies, connected
from mta.data.tasks import load_task

LAMP3 = load_task("lamp3")


def people(*texts: list[str], score: str = "4") -> list[Person]:
    """A person for each list of texts."""
    return [Person.of(f"p{n}", [Item({"text": text, "score": score}) for text in mine]) for n, mine in enumerate(texts)]


def test_people_who_hold_copies_of_an_item_are_one_group_directly_or_through_others() -> None:
    a, b, c = prose(1), prose(2), prose(3)
    found, shared = connected(people([a], [a, b], [b], [c]), LAMP3)
    assert [person.group for person in found] == ["p0", "p0", "p0", ""]
    assert (shared.items, shared.people, shared.groups, shared.largest) == (2, 3, 1, 3)


def test_a_group_does_not_depend_on_the_order_of_people() -> None:
    everybody = people([prose(1)], [prose(1), prose(2)], [prose(2)], [prose(3)])
    found, again = connected(everybody, LAMP3)[0], connected(everybody[::-1], LAMP3)[0]
    assert found == again[::-1]


def test_a_query_that_stands_in_another_history_connects_two_people() -> None:
    one, other = people([prose(1)], [prose(2)])
    asked = Item({"text": prose(1), "score": "4"}, is_query=True)
    found, _ = connected([one, Person.of("p1", other.items, [asked])], LAMP3)
    assert [person.group for person in found] == ["p0", "p0"]


def test_a_short_text_connects_no_people() -> None:
    found, shared = connected(people(["Great product"], ["Great product"]), LAMP3)
    assert ([person.group for person in found], shared.items) == (["", ""], 0)


def test_a_text_with_different_answers_connects_no_people() -> None:
    copies = people(*([prose(n)] * 1 for n in range(20)), *([prose(n)] for n in range(20)))
    copies[0] = Person.of("p0", [Item({"text": prose(0), "score": "1"})])
    many = [Person.of(f"q{n}", [Item({"text": prose(99 + n), "score": score})]) for n, score in enumerate("12345" * 9)]
    found, shared = connected(copies + many, LAMP3)
    assert (found[0].group, shared.items, shared.largest) == ("", 19, 2)


def test_common_boilerplate_connects_no_people() -> None:
    _, shared = connected(people(*([prose(1)] for _ in range(CROWD + 1))), LAMP3)
    assert shared.items == 0
    _, shared = connected(people(*([prose(1)] for _ in range(CROWD))), LAMP3)
    assert (shared.items, shared.largest) == (1, CROWD)


def test_one_different_label_does_not_separate_the_people_who_copied_text_and_label() -> None:
    scores = ["4", "4", "1"]
    copied = [Person.of(f"p{n}", [Item({"text": prose(1), "score": score})]) for n, score in enumerate(scores)]
    assert [person.group for person in connected(copied, LAMP3)[0]] == ["p0", "p0", ""]


def test_films_that_many_people_rate_connect_no_people_even_where_ratings_agree() -> None:
    lots, task = random.Random(0), load_task("movielens-rating")
    films = [{"title": f"{prose(n, 6)} (1999)", "genres": "Drama, Science Fiction"} for n in range(60)]
    everybody = [
        Person.of(f"p{n}", [Item({**film, "rating": str(lots.randint(3, 5))}) for film in lots.sample(films, 4)])
        for n in range(90)
    ]
    found, shared = connected(everybody, task)
    assert not any(person.group for person in found)
    assert shared.items == 0


def test_free_text_counts_where_input_and_answer_agree() -> None:
    task = load_task("text")
    answers = [prose(1), prose(1), prose(2)]
    everybody = [Person.of(f"p{n}", [Item({"input": "Write.", "output": text})]) for n, text in enumerate(answers)]
    assert [person.group for person in connected(everybody, task)[0]] == ["p0", "p0", ""]


def test_a_paraphrase_that_is_another_person_s_tweet_connects_both() -> None:
    task, tweet = load_task("lamp7"), prose(1)
    one = Person.of("a", [Item({"text": tweet})])
    other = Person.of("b", [Item({"text": prose(2)})], [Item({"tweet": "x", "paraphrase": tweet}, is_query=True)])
    assert [person.group for person in connected([one, other], task)[0]] == ["a", "a"]


def test_queries_in_histories_of_others_are_counted() -> None:
    everybody = people([prose(1), prose(2)], [prose(1)], [prose(3)])
    copies = Copies(everybody, LAMP3)
    assert copies.in_histories(everybody[:1], everybody[1].items + everybody[2].items) == 1
    assert copies.in_histories(everybody[2:], everybody[1].items) == 0


@pytest.mark.parametrize("format", ["jsonl", "per-pcs", "lamp"])
def test_every_format_reports_shared_items_in_counts_alone(tmp_path, caplog, format) -> None:
    rows = {"ann": [review(1), review(2)], "bob": [review(2)], "eve": [review(3)]}
    if format == "jsonl":
        path = jsonl(tmp_path, *({"person": id, **row} for id, mine in rows.items() for row in mine))
    elif format == "per-pcs":
        path = jsonl(tmp_path, *({"user_id": id, "profile": mine, "query": []} for id, mine in rows.items()))
    else:
        asked = {"input": f"{ASK}{prose(9)}"}
        path = dumped(
            tmp_path / "q.json", [{"id": id, "user_id": id, **asked, "profile": mine} for id, mine in rows.items()]
        )
    with caplog.at_level(logging.WARNING, "mta"):
        found = read_people(path, "lamp3")
    assert [person.group for person in found] == ["ann", "ann", ""]
    said = "1 items belong to more than one person and connect 2 people in 1 groups of at most 2"
    assert said in caplog.text
    assert not any(text in caplog.text for text in (prose(2), "ann", "bob"))


# -- real data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task", "expected"),
    [
        ("lamp3_amazon", "lamp3", (0, 0, 0, 0)),
        ("lamp4_huffpost", "lamp4", (0, 0, 0, 0)),
        ("lamp2n_huffpost", "lamp2n", (0, 0, 0, 0)),
        ("lamp5_papers", "lamp5", (134, 110, 12, 80)),
        ("lamp4_authors/test_100.json", "lamp4", (550, 100, 50, 2)),
    ],
)
def test_real_people_who_share_items(name, task, expected) -> None:
    people = read_people(shared_data(name), task)
    shared = connected(people, people.task)[1]
    assert (shared.items, shared.people, shared.groups, shared.largest) == expected

"""Records of one user are one person, and people who hold copies of the same items are one group."""

import json
import logging
import random
import string
from pathlib import Path

import pytest
from files import ASK, dumped, jsonl, lamp

from mta.data.history import Item, Person
from mta.data.readers import read_people
from mta.data.sharing import CROWD, Copies, connected, same_users
from mta.data.tasks import load_task

DATA = Path(__file__).parents[3] / "shared" / "data"
LAMP3 = load_task("lamp3")


def prose(seed: int, words: int = 20) -> str:
    """A text that nobody writes twice by coincidence."""
    lots = random.Random(seed)
    return " ".join("".join(lots.choices(string.ascii_lowercase, k=6)) for _ in range(words))


def review(seed: int, score: str = "4") -> dict[str, str]:
    return {"text": prose(seed), "score": score}


def user(first: int, reviews: int = 8) -> list[dict[str, object]]:
    """LaMP's records of one user: each question asks about one review, and its profile holds all others."""
    written = [review(first + n) for n in range(reviews)]
    return [
        {
            "id": f"{first}{n}",
            "input": f"{ASK}{asked['text']}",
            "profile": [{"id": f"{first}{n}{k}", **one} for k, one in enumerate(written) if one is not asked],
        }
        for n, asked in enumerate(written[:3])
    ]


def golds(records: list[dict[str, object]]) -> dict[str, str]:
    return {str(record["id"]): "4" for record in records}


def people(*texts: list[str], score: str = "4") -> list[Person]:
    """A person for each list of texts."""
    return [Person.of(f"p{n}", [Item({"text": text, "score": score}) for text in mine]) for n, mine in enumerate(texts)]


# -- one user, several records -----------------------------------------------------------------------------------------


def test_questions_of_one_user_without_user_id_are_one_person(tmp_path, caplog) -> None:
    records = user(100) + user(200)
    with caplog.at_level(logging.WARNING, "mta"):
        found = read_people(lamp(tmp_path, records, golds(records)), "lamp3")
    assert [(person.id, len(person.queries)) for person in found] == [("1000", 3), ("2000", 3)]
    assert "6 questions without user_id belong to 2 people" in caplog.text


def test_a_merged_history_holds_each_item_once_and_no_answer_to_an_own_question(tmp_path) -> None:
    records = user(100)
    [one] = read_people(lamp(tmp_path, records, golds(records)), "lamp3")
    assert [item.fields["text"] for item in one.items] == [prose(n) for n in range(103, 108)]
    assert [query.fields["text"] for query in one.queries] == [prose(100), prose(101), prose(102)]


def test_a_merged_person_does_not_depend_on_the_order_of_the_file(tmp_path) -> None:
    records = user(100) + user(200)
    found = read_people(lamp(tmp_path, records, golds(records)), "lamp3")
    other = read_people(lamp(tmp_path, records[::-1], golds(records)), "lamp3")
    assert found == other[::-1]


def test_equal_item_ids_do_not_merge_records(tmp_path) -> None:
    records = [user(100)[0], user(200)[0]]
    for record in records:
        for number, item in enumerate(record["profile"]):
            item["id"] = str(number)
    assert len(read_people(lamp(tmp_path, records, golds(records)), "lamp3")) == 2


def test_records_of_one_user_differ_at_most_by_their_own_questions() -> None:
    items = [Item(review(n), float(n)) for n in range(9)]
    assert same_users([items[:8], items[:8][::-1]]) == [[0, 1]]
    assert same_users([items[:7], items[:8], items[1:9]]) == [[0, 1, 2]]
    assert same_users([items[:7], items[1:8], items[2:9]]) == [[0, 1, 2]]
    assert same_users([items[:7], items[2:9]]) == [[0], [1]]
    assert same_users([items[:5], items[:5], items[:6]]) == [[0, 1, 2]]
    assert same_users([items[:4], items[:4], items[:5], items[1:6]]) == [[0], [1], [2], [3]]  # too few items


def test_questions_with_one_user_id_do_not_repeat_items_under_new_ids(tmp_path) -> None:
    records = [{**record, "user_id": "u"} for record in user(100)]
    [one] = read_people(lamp(tmp_path, records, golds(records)), "lamp3")
    assert [item.fields["text"] for item in one.items] == [prose(n) for n in range(103, 108)]


# -- several people, one item ------------------------------------------------------------------------------------------


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
    assert (found[0].group, shared.judged, shared.items, shared.largest) == ("", 1, 19, 2)


def test_common_boilerplate_connects_no_people_and_is_counted() -> None:
    _, shared = connected(people(*([prose(1)] for _ in range(CROWD + 1))), LAMP3)
    assert (shared.items, shared.crowded) == (0, 1)
    _, shared = connected(people(*([prose(1)] for _ in range(CROWD))), LAMP3)
    assert (shared.items, shared.crowded, shared.largest) == (1, 0, CROWD)


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
    assert (shared.items, shared.judged > 50) == (0, True)


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


def shared_data(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no data at {path}")
    return path


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


def test_coauthors_without_user_ids_stay_different_people(tmp_path) -> None:
    records = json.loads((shared_data("lamp5_papers") / "dev_questions.json").read_text(encoding="utf-8"))
    path = dumped(tmp_path / "q.json", [{k: v for k, v in one.items() if k != "user_id"} for one in records])
    assert len(read_people(path, "lamp5")) == 200


def test_real_questions_of_one_author_are_one_person(tmp_path) -> None:
    records = json.loads(shared_data("lamp4_authors/test_100.json").read_text(encoding="utf-8"))
    questions = [{**one["query"][0], "id": one["user_id"], "profile": one["profile"]} for one in records]
    people = read_people(dumped(tmp_path / "q.json", questions), "lamp4")
    assert (len(people), {len(person.queries) for person in people}) == (50, {2})

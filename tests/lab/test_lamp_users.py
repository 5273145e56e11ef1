"""LaMP's records of one user are one person."""

import json
import logging

from files import ASK, dumped, lamp, prose, review, shared_data

from mta.data.history import Item
from mta.data.readers import read_people
from mta_lab.readers.lamp import same_users


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


def test_coauthors_without_user_ids_stay_different_people(tmp_path) -> None:
    records = json.loads((shared_data("lamp5_papers") / "dev_questions.json").read_text(encoding="utf-8"))
    path = dumped(tmp_path / "q.json", [{k: v for k, v in one.items() if k != "user_id"} for one in records])
    assert len(read_people(path, "lamp5")) == 200


def test_real_questions_of_one_author_are_one_person(tmp_path) -> None:
    records = json.loads(shared_data("lamp4_authors/test_100.json").read_text(encoding="utf-8"))
    questions = [{**one["query"][0], "id": one["user_id"], "profile": one["profile"]} for one in records]
    people = read_people(dumped(tmp_path / "q.json", questions), "lamp4")
    assert (len(people), {len(person.queries) for person in people}) == (50, {2})

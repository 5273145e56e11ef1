import json
from pathlib import Path
from typing import Any

import pytest
from files import ASK, dumped, fails, jsonl, lamp, question, shared_data

from mta.data.describe import describe
from mta.data.history import Item
from mta.data.readers import read_people
from mta.data.tasks import load_task
from mta.errors import DataError
from mta_lab.readers.lamp import read_answers


def test_lamp_questions_and_outputs(tmp_path: Path) -> None:
    path = lamp(
        tmp_path, [question("1"), question("2", None), question("3", user_id="u")], {"1": "5", "2": "4", "3": "1"}
    )
    u, second = read_people(path, "lamp3")
    assert read_people(tmp_path, "LaMP-3") == [u, second]
    assert (u.id, second.id, len(u.items), len(second.items)) == ("u", "2", 3, 3)
    assert [item.time for item in u.items] == sorted(item.time or 0 for item in u.items)
    assert u.queries == (
        Item({"text": "Now 1", "score": "5"}, id="1", is_query=True),
        Item({"text": "Now 3", "score": "1"}, id="3", is_query=True),
    )


def test_items_shared_by_questions_are_counted_once(tmp_path: Path) -> None:
    first = question("1")
    second = question("2", profile=[*first["profile"], {"id": "new", "text": "t", "score": "1"}])
    [u] = read_people(lamp(tmp_path, [first, second], None), "lamp3")
    assert len(u.items) == 4
    second["profile"][0] = {**second["profile"][0], "score": "1"}  # another item: ids say nothing about content
    [u] = read_people(lamp(tmp_path, [first, second], None), "lamp3")
    assert len(u.items) == 5


def test_without_outputs_queries_have_no_target(tmp_path: Path) -> None:
    [u] = read_people(lamp(tmp_path, [question("1")], None), "lamp3")
    assert u.queries[0].fields == {"text": "Now 1"}
    assert not load_task("lamp3").has_target(u.queries[0])


def test_queries_have_their_own_prompt_in_some_tasks(tmp_path: Path) -> None:
    ask = load_task("lamp1").query.prompt.format(title="T", ref1="A", ref2="B")  # type: ignore[union-attr]
    row = {"id": "1", "input": ask, "profile": [{"id": "a", "title": "P", "abstract": "We.", "citation": "?"}]}
    [one] = read_people(lamp(tmp_path, [row], {"1": "[2]"}, "LaMP_1"), "lamp1")
    assert one.items[0].fields == {"abstract": "We.", "title": "P"}
    assert one.queries[0].fields == {"title": "T", "ref1": "A", "ref2": "B", "reference": "[2]"}
    tweet = {
        "id": "1",
        "input": load_task("lamp7").query.prompt.format(tweet="hi"),
        "profile": [{"id": "a", "text": "ho"}],
    }  # type: ignore[union-attr]
    [one] = read_people(lamp(tmp_path, [tweet], {"1": "hey"}, "LaMP_7"), "lamp7")
    assert (one.items[0].fields, one.queries[0].fields) == ({"text": "ho"}, {"tweet": "hi", "paraphrase": "hey"})


PROFILE = question("1")["profile"]
BAD_LAMP: list[tuple[dict[str, Any], str]] = [
    ({"id": ...}, "field 'id': missing"),
    ({"id": "0"}, "field 'id': duplicate question id '0'"),
    ({"user_id": ""}, "field 'user_id': empty; expected some text"),
    ({"profile": {}}, "field 'profile': expected a list, got an object"),
    ({"profile": []}, "field 'profile': no item; a person needs at least one"),
    ({"profile": [*PROFILE, 3]}, "field 'profile[3]': expected an object, got a number"),
    (
        {"profile": [{**PROFILE[0], "score": "0"}, *PROFILE[1:]]},
        "field 'profile[0].score': unknown label '0'; expected one of: 1, 2, 3, 4, 5",
    ),
    ({"input": ASK}, "field 'input': text is empty; expected some text"),
    (
        {"input": "Guess: x"},
        "field 'input': not a question of task 'lamp3': 'Guess: x'; "
        "expected 'What is the score of the following review on a scale of 1 to…'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_LAMP)
def test_a_bad_question_is_reported_or_written_to_the_rejects(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = lamp(tmp_path, [question("0", "v"), question("1", **changes)], None)
    with pytest.raises(DataError) as caught:
        read_people(path, "lamp3")
    assert caught.value.message == f"{path}:27: element 2: {message}"
    people = read_people(path, "lamp3", skip_bad=tmp_path / "bad.jsonl")
    assert (people[0].id, len(people[0].items)) == ("v", 3)
    assert len((tmp_path / "bad.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_outputs_that_do_not_match_their_questions_are_refused(tmp_path: Path) -> None:
    path, outputs = lamp(tmp_path, [question("1")], {"2": "5"}), tmp_path / "dev_outputs.json"
    fails(path, "lamp3", f"{path}:2: element 1: field 'id': the outputs file has no answer for question '1'")
    people = read_people(path, "lamp3", skip_bad=tmp_path / "bad.jsonl")
    assert (len(people[0].items), people[0].queries) == (3, ())
    lamp(tmp_path, [question("1")], {"1": "4", "2": "5"})
    fails(path, "lamp3", f"{outputs}:8: element 2: field 'id': no question has the id '2'")
    lamp(tmp_path, [question("1")], {"1": "good"})
    fails(
        path, "lamp3", f"{outputs}:4: element 1: field 'output': unknown label 'good'; expected one of: 1, 2, 3, 4, 5"
    )
    lamp(tmp_path, [question("1")], {"1": "4"}, "LaMP_5")
    fails(path, "lamp3", f"{outputs}:1: field 'task': holds answers for 'LaMP_5'; task 'lamp3' is 'LaMP_3'")
    for rows, message in [
        ([{"id": "1"}], "4: element 1: field 'output': missing"),
        ([{"id": "1", "output": "4"}] * 2, "8: element 2: field 'id': duplicate question id '1'"),
        (["1"], "4: element 1: expected a JSON object, got text"),
    ]:
        dumped(outputs, {"task": "LaMP_3", "golds": rows})
        fails(path, "lamp3", f"{outputs}:{message}")
    dumped(outputs, {"task": "LaMP_3"})
    with pytest.raises(DataError, match="found no LaMP outputs: "):
        read_people(path, "lamp3")


def test_a_folder_with_several_files_of_questions(tmp_path: Path) -> None:
    lamp(tmp_path, [question("1")], None)
    dumped(tmp_path / "train_questions.json", [question("1")])
    names = "dev_questions.json, train_questions.json"
    fails(tmp_path, "lamp3", f"{tmp_path}: expected one file *questions.json, got {names}")


@pytest.mark.parametrize(
    ("name", "folder", "expected"),
    [
        ("lamp3", "lamp3_amazon", (282, 9, 12, 89)),
        ("lamp4", "lamp4_huffpost", (118, 9, 35.5, 200)),
        ("lamp5", "lamp5_papers", (200, 11, 25, 40)),
    ],
)
def test_real_lamp_data(name: str, folder: str, expected: tuple[float, ...]) -> None:
    people, task = read_people(shared_data(folder), name), load_task(name)
    counts = describe(people)
    assert tuple(counts[key] for key in ("people", "min", "median", "max")) == expected
    assert counts["queries"] == len(people)
    for person in people:
        times = [item.time for item in person.items]
        assert None not in times
        assert times == sorted(time or 0.0 for time in times)
        assert all(task.wrong(item) is None for item in (*person.items, *person.queries))
        assert all(task.has_target(query) for query in person.queries)


@pytest.mark.parametrize("lines", [False, True])
def test_per_pcs_files(tmp_path: Path, lines: bool) -> None:
    query = [{"id": n, "input": f"{ASK}Now {n}", "gold": gold} for n, gold in enumerate(["5", 4, None])]
    rows = [{"user_id": user, "profile": PROFILE, "query": query} for user in (1, 2)]
    path = jsonl(tmp_path, *rows) if lines else dumped(tmp_path / "people.json", rows)
    one, two = read_people(path, "lamp3")
    assert (one.id, two.id, one.items) == ("1", "2", two.items)
    assert [dict(item.fields) for item in one.queries] == [
        {"text": "Now 0", "score": "5"},
        {"text": "Now 1", "score": "4"},
        {"text": "Now 2"},
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user_id": "a"}, "field 'user_id': duplicate person 'a'"),
        ({"user_id": None}, "field 'user_id': empty; expected some text"),
        ({"query": None}, "field 'query': expected a list, got null"),
        ({"query": [3]}, "field 'query': expected a list of objects, got a number"),
        (
            {"query": [{"id": 1, "input": f"{ASK}x", "gold": "9"}]},
            "field 'gold': unknown label '9'; expected one of: 1, 2, 3, 4, 5",
        ),
        ({"query": [{"id": 1, "input": f"{ASK}x", "gold": "1"}] * 2}, "field 'id': duplicate question id '1'"),
    ],
)
def test_a_bad_person_file(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    row = {"user_id": "a", "profile": PROFILE, "query": []}
    path = jsonl(tmp_path, row, {**row, "user_id": "b", **changes})
    fails(path, "lamp3", f"{path}:2: {message}")


def test_true_answers_are_not_read_where_questions_are_to_be_answered(tmp_path) -> None:
    """Wrong ones are no obstacle, and answers files do not repeat them."""
    profile, question = [{"text": "Warm sound.", "score": "4"}], {"id": "1", "input": f"{ASK}Broke."}
    lamp, perpcs = tmp_path / "dev_questions.json", tmp_path / "perpcs.json"
    lamp.write_text(json.dumps([{"user_id": "ann", "profile": profile, **question}]))
    outputs = {"task": "LaMP_3", "golds": [{"id": "another", "output": "no label"}]}
    (tmp_path / "dev_outputs.json").write_text(json.dumps(outputs))
    perpcs.write_text(json.dumps([{"user_id": "ann", "profile": profile, "query": [question | {"gold": "no label"}]}]))
    for path in (lamp, perpcs):
        (person,) = read_people(path, load_task("lamp3"), questions=True)
        assert [dict(query.fields) for query in person.queries] == [{"text": "Broke."}]
        with pytest.raises(DataError):
            read_people(path, load_task("lamp3"))


def test_a_gold_answer_may_be_written_like_a_label_of_an_item(tmp_path) -> None:
    profile, asked = [{"text": "Warm sound.", "score": "4.0"}], {"id": "1", "input": f"{ASK}Broke."}
    path = tmp_path / "dev_questions.json"
    path.write_text(json.dumps([{"user_id": "ann", "profile": profile, **asked}]))
    outputs = {"task": "LaMP_3", "golds": [{"id": "1", "output": "4.0"}]}
    (tmp_path / "dev_outputs.json").write_text(json.dumps(outputs))
    (ann,) = read_people(path, load_task("lamp3"))
    assert [item.fields["score"] for item in (*ann.items, *ann.queries)] == ["4", "4"]
    assert read_answers(tmp_path / "dev_outputs.json", load_task("lamp3")) == {"1": "4"}


@pytest.mark.parametrize("profile", [None, {}, 3])
def test_a_bad_first_record_does_not_decide_the_format(tmp_path, profile) -> None:
    asked = {"id": "1", "input": f"{ASK}Broke."}
    records = [{"user_id": "bad", "profile": profile, **asked}]
    records += [{"user_id": "ann", "profile": [{"text": "Warm sound.", "score": "4"}], **asked, "id": "2"}]
    path = tmp_path / "dev_questions.json"
    path.write_text(json.dumps(records))
    (ann,) = read_people(path, "lamp3", skip_bad=tmp_path / "bad.jsonl")
    assert ann.id == "ann"
    with pytest.raises(DataError, match="element 1: field 'profile': expected a list"):
        read_people(path, "lamp3")

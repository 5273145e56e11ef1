"""Times that do not belong together, and question ids that say nothing about content."""

import pytest
from files import jsonl

from mta.data.readers import read_people
from mta.errors import DataError


def test_seconds_since_1970_can_stand_beside_dates(tmp_path):
    rows = [("b", 1717113600), ("c", "2024-06-01"), ("a", "2009-01"), ("d", None)]
    rows = [{"person": "ann", "text": f"text {name}", "score": "4", "time": time} for name, time in rows]
    (ann,) = read_people(jsonl(tmp_path, *rows), "lamp3")
    assert [item.fields["text"] for item in ann.items] == ["text a", "text b", "text c", "text d"]


@pytest.mark.parametrize(
    ("task", "row", "fields"),
    [
        ("lamp3", {"text": "T", "score": "no label"}, {"text": "T"}),
        ("lamp3", {"input": "T", "output": "1"}, {"text": "T"}),
        ("lamp1", {"title": "T", "ref1": "A", "ref2": "B", "output": "[2]"}, {"title": "T", "ref1": "A", "ref2": "B"}),
        ("lamp7", {"input": "T"}, {"tweet": "T"}),
    ],
)
def test_questions_have_the_fields_of_the_tasks_questions(tmp_path, caplog, task, row, fields):
    (ann,) = read_people(jsonl(tmp_path, {"person": "ann"} | row), task, questions=True)
    assert (ann.items, [dict(query.fields) for query in ann.queries]) == ((), [fields])
    assert "ignored fields" not in caplog.text


@pytest.mark.parametrize("answer", ["output", "score"])
def test_one_mapping_of_columns_serves_items_and_questions(tmp_path, answer):
    path = jsonl(tmp_path, {"who": "ann", "review": "T", "stars": "4"})
    columns = {"person": "who", "input": "review", answer: "stars"}
    (ann,) = read_people(path, "lamp3", columns=columns)
    (asking,) = read_people(path, "lamp3", columns=columns, questions=True)
    assert (len(ann.items), [dict(query.fields) for query in asking.queries]) == (1, [{"text": "T"}])


def test_an_answer_is_not_taken_for_a_question(tmp_path):
    row = {"person": "ann", "output": "secret", "ref1": "A", "ref2": "B"}
    with pytest.raises(DataError, match="field 'title': missing; task 'lamp1' needs title, ref1, ref2"):
        read_people(jsonl(tmp_path, row), "lamp1", questions=True)

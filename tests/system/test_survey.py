"""The survey's answers, read from a pickled table that is never unpickled."""

import hashlib
import json
import lzma
import math
import pickle
import struct

import pytest

from mta.data.readers import read_people
from mta.errors import AssetError
from mta.system import assets
from mta.system.survey import STATEMENTS, SURVEY, convert_survey

PEOPLE = 5


def packed(path, answers, whole=(7, 22)):
    """Write a table as the wheel has it: columns with gaps are floats, ``whole`` ones and row names are integers."""
    columns = {0: [9] * PEOPLE} | dict(enumerate(answers, 1))
    parts = []
    for kind, places in (("d", [n for n in columns if n and n not in whole]), ("q", [0, *whole])):
        values = [value for n in places for value in columns[n]]
        parts += [struct.pack(f"<{len(values)}{kind}", *values), struct.pack(f"<{len(places)}q", *places)]
    path.write_bytes(lzma.compress(pickle.dumps([bytearray(part) for part in parts], protocol=5)))
    return path


def test_people_without_gaps_are_written_in_an_order_of_their_own(tmp_path):
    answers = [[(n + person) % 6 + 1 for person in range(PEOPLE)] for n in range(len(STATEMENTS))]
    answers[3][1] = math.nan
    folder = convert_survey(packed(tmp_path / "table", answers), tmp_path / "survey")
    people = {person.id: person for person in read_people(folder / SURVEY, "survey")}
    assert sorted(people) == ["1", "3", "4", "5"]
    for id, person in people.items():
        given = {item.fields["statement"]: int(item.fields["answer"]) for item in person.items}
        assert given == {text: answers[n][int(id) - 1] for n, text in enumerate(STATEMENTS)}
    first = {id: person.items[0].fields["statement"] for id, person in people.items()}
    assert len(set(first.values())) > 1
    order = sorted(range(len(STATEMENTS)), key=lambda n: hashlib.sha256(f"3/{n}".encode()).digest())
    assert [item.fields["statement"] for item in people["3"].items] == [STATEMENTS[n] for n in order]


def test_another_table_is_an_error(tmp_path):
    (tmp_path / "table").write_bytes(lzma.compress(pickle.dumps([bytearray(8)], protocol=5)))
    with pytest.raises(AssetError, match="holds no answers to 25 statements"):
        convert_survey(tmp_path / "table", tmp_path / "survey")


@pytest.mark.integration
def test_the_real_survey_has_the_people_without_gaps():
    if not assets.is_present("survey"):
        pytest.skip("the survey is not cached: mta data describe survey --task survey fetches it")
    with open(assets.resolve("survey"), encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert len({row["person"] for row in rows}) == 2436
    love = [int(row["answer"]) for row in rows if row["statement"] == "Love children."]
    assert round(sum(love) / len(love), 2) == 4.69

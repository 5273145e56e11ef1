"""Files as people have them: a table whose columns have other names."""

import pytest
from world import mta, run

TABLE = "user;body;stars;day\nann;Fine.;4;2024-05-31\nbob;Bad.;1;\nann;Good.;5;2024-06-01\n"
COLUMNS = ["--columns", "person=user,input=body", "--columns", "score=stars, time=day"]


def test_a_table_with_other_columns_is_read(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text(TABLE)
    said = mta("data", "describe", path, "--task", "lamp3", *COLUMNS)
    assert said.out.startswith("people 2  items 3")
    assert "people with a time on every item: 1" in said.out
    path.write_text(TABLE.replace("body", "in, words"))
    assert mta("data", "describe", path, "--task", "lamp3", "--columns", "person=user,input=in, words,score=stars").out
    path.write_text(TABLE.replace("2024-05-31", "soon"))
    failed = run("data", "describe", path, "--task", "lamp3", *COLUMNS)
    assert failed.code == 1
    assert "reviews.csv:2: field 'day': bad time 'soon'" in failed.err


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("user", "--columns has 'user'; expected a name, =, and a column"),
        ("person=", "--columns has 'person='; expected a name, =, and a column"),
        ("output=stars,score=day", "two columns were given for 'score': 'stars' and 'day'"),
        ("person=user,input=stars,output=stars", "column 'stars' was given for the answer 'score' and for 'text'"),
    ],
)
def test_bad_names_of_columns_are_refused(tmp_path, columns, message):
    path = tmp_path / "reviews.csv"
    path.write_text(TABLE)
    said = run("data", "describe", path, "--task", "lamp3", "--columns", columns)
    assert (said.code, message.format(path=path) in said.err) == (1, True), said.err

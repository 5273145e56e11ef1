import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mta.errors import DataError, InputError
from mta.history import Item, Person
from mta.splits import PARTS, Splits, draw


def crowd(n: int, items: int = 3) -> list[Person]:
    return [Person.of(f"person-{i}", [Item({"input": "a"})] * items) for i in range(n)]


IDS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1), unique=True, min_size=8, max_size=40)


@given(ids=IDS, seed=st.integers(), sizes=st.tuples(*[st.integers(0, 2)] * 3), shuffled=st.randoms())
def test_parts_are_disjoint_and_blind_to_order(ids, seed, sizes, shuffled) -> None:
    people = [Person.of(id, [Item({})]) for id in ids]
    task, development, test = sizes
    splits = draw(people, seed, task=task, development=development, test=test)
    drawn = [id for part in PARTS for id in getattr(splits, part)]
    assert sorted(drawn) == sorted(ids)
    assert (len(splits.task), len(splits.development), len(splits.test)) == sizes
    shuffled.shuffle(people)
    again = draw(people, seed, task=task, development=development, test=test)
    assert (again, again.digest) == (splits, splits.digest)


def test_sizes_seeds_and_few_items() -> None:
    people = [*crowd(20), Person.of("quiet", [Item({})])]
    splits = draw(people, 0, task=4, development=3, test=5, candidates=2, min_items=2)
    assert [len(getattr(splits, part)) for part in PARTS] == [4, 3, 2, 5]
    assert draw(people, 1, task=4, development=3, test=5, candidates=2, min_items=2) != splits
    rest = draw(people, 0, task=2, development=2, test=5, min_items=2)
    assert rest.test == splits.test
    assert len(rest.candidates) == 11
    assert "quiet" not in rest.candidates
    assert draw(people, 0, task=0, development=0, test=1, candidates=0).candidates == ()


def test_the_draw_is_the_same_in_every_release() -> None:
    splits = draw(crowd(6), 7, task=1, development=1, test=2)
    assert splits == Splits(("person-2",), ("person-1",), ("person-4", "person-0"), ("person-5", "person-3"))
    assert splits.digest == "5720f93228debd8f2fcb8cd1d7b6f04e9ad98f0cfc613c87fd2b7e070cbbbfe3"


def test_too_few_people_are_counted() -> None:
    with pytest.raises(InputError) as caught:
        draw([*crowd(9), Person.of("quiet", [])], 0, task=4, development=3, test=5)
    assert caught.value.message == (
        "12 people were asked for (test 5, development 3, task 4), but only 9 of the 10 given qualify (min_items=1)"
    )
    assert caught.value.hint == "Ask for fewer people, or lower min_items."
    with pytest.raises(InputError, match="test is -1; expected 0 or more people"):
        draw(crowd(3), 0, task=0, development=0, test=-1)
    with pytest.raises(InputError, match="candidates is -2; expected 0 or more people"):
        draw(crowd(3), 0, task=0, development=0, test=1, candidates=-2)
    with pytest.raises(InputError, match="two people have the same id; ids must be distinct"):
        draw(crowd(3) * 2, 0, task=0, development=0, test=1)
    with pytest.raises(InputError, match="splits must be disjoint: a person is in them twice"):
        Splits(("a",), (), ("a",), ())


def test_select_gives_the_people_of_a_part() -> None:
    people = crowd(8)
    splits = draw(people, 0, task=2, development=2, test=2)
    assert tuple(person.id for person in splits.select("test", people)) == splits.test
    with pytest.raises(
        InputError, match="no part 'dev' of the splits; expected one of: task, development, candidates, test"
    ):
        splits.select("dev", people)
    with pytest.raises(InputError, match="2 of 2 people of part 'test' are not among those given"):
        splits.select("test", [])


def test_saved_splits_hold_no_id_and_come_back(tmp_path: Path) -> None:
    people = crowd(12)
    splits = draw(people, 3, task=3, development=2, test=4)
    path = tmp_path / "splits.json"
    splits.save(path)
    text = path.read_text(encoding="utf-8")
    assert "person-" not in text
    assert Splits.load(path, reversed([*people, Person.of("new", [])])) == splits
    splits.save(str(path))
    assert path.read_text(encoding="utf-8") == text
    assert [file.name for file in tmp_path.iterdir()] == ["splits.json"]


def test_changed_files_are_refused(tmp_path: Path) -> None:
    people, path = crowd(12), tmp_path / "splits.json"
    draw(people, 3, task=3, development=2, test=4).save(path)
    saved = json.loads(path.read_text(encoding="utf-8"))

    def refused(message: str, **changes: object) -> None:
        path.write_text(json.dumps({**saved, **changes}), encoding="utf-8")
        with pytest.raises(DataError, match=message):
            Splits.load(path, people)

    changed = "digest is [0-9a-f]{12}…, expected [0-9a-f]{12}…: the file was changed"
    refused(changed, task=saved["task"][:-1])
    refused(changed, task=saved["test"], test=saved["task"])
    refused(changed, test=saved["test"][::-1])
    refused("a person is in the splits twice: the file was changed", task=saved["task"] + saved["test"][:1])
    refused("1 of 12 people are not in the data given", task=[*saved["task"][:-1], "0" * 64])
    refused("12 of 12 people are not in the data given\n  Give the data the splits were drawn from", digest="0" * 64)
    refused("is no file of splits of schema 1; got 2", schema=2)
    refused("expected schema, digest and the lists task, development, candidates, test; got schema", task="abc")
    refused("expected schema, digest and the lists .*; got schema, .*, extra", extra=1)


def test_files_that_are_no_splits(tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    with pytest.raises(DataError, match=r"no such file of splits: .*splits\.json"):
        Splits.load(path, [])
    for content, message in [
        (b"{", "is not a readable file of splits"),
        (b"\xff", "is not a readable file of splits"),
        (b"[]", "is no file of splits of schema 1; got 'list'"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            Splits.load(path, [])
    with pytest.raises(DataError, match="is not a readable file of splits"):
        Splits.load(tmp_path, [])

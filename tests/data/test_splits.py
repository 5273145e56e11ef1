import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mta.data.history import Item, Person
from mta.data.splits import PARTS, Splits, draw
from mta.errors import DataError, InputError


def crowd(n: int, items: int = 3) -> list[Person]:
    return [Person.of(f"person-{i}", [Item({"input": "a"})] * items) for i in range(n)]


IDS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1), unique=True, min_size=8, max_size=40)


@given(ids=IDS, seed=st.integers(), sizes=st.tuples(*[st.integers(0, 2)] * 3), shuffled=st.randoms())
def test_parts_are_disjoint_and_independent_of_order(ids, seed, sizes, shuffled) -> None:
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
        "12 people were requested (test 5, development 3, task 4), but only 9 of the 10 given qualify (min_items=1)"
    )
    assert caught.value.hint == "Ask for fewer people, or lower min_items."
    with pytest.raises(InputError, match="3 people are given twice"):
        draw(crowd(3) * 2, 0, task=0, development=0, test=1)
    with pytest.raises(InputError, match="2 of 2 people of part 'test' are not among those given"):
        draw(crowd(8), 0, task=2, development=2, test=2).select("test", [])
    with pytest.raises(InputError, match="splits must be disjoint: a person is in them twice"):
        Splits(("a",), (), ("a",), ())


def test_saved_splits_hold_no_id_and_are_saved_again(tmp_path: Path) -> None:
    people = crowd(12)
    splits = draw(people, 3, task=3, development=2, test=4)
    path = tmp_path / "splits.json"
    splits.save(path)
    text = path.read_text(encoding="utf-8")
    assert "person-" not in text
    assert json.loads(text)["digest"] == splits.digest
    draw(people[::-1], 3, task=3, development=2, test=4).save(str(path))
    assert path.read_text(encoding="utf-8") == text
    assert [file.name for file in tmp_path.iterdir()] == ["splits.json"]


def test_other_or_changed_splits_are_refused_and_kept(tmp_path: Path) -> None:
    people, path = crowd(12), tmp_path / "splits.json"
    splits = draw(people, 3, task=3, development=2, test=4)
    splits.save(path)
    saved = json.loads(path.read_text(encoding="utf-8"))

    def refused(content: bytes, splits: Splits = splits) -> None:
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"splits\.json holds other splits .*, or was changed\n  Choose another"):
            splits.save(path)
        assert path.read_bytes() == content

    refused(json.dumps(saved).encode(), draw(people, 4, task=3, development=2, test=4))
    refused(json.dumps(saved).encode(), draw(people, 3, task=3, development=2, test=5))
    for changes in (
        {"task": saved["task"][:-1]},
        {"task": saved["test"], "test": saved["task"]},
        {"test": saved["test"][::-1]},
        {"digest": "0" * 64},
    ):
        refused(json.dumps({**saved, **changes}).encode())
    refused(b"{")


# -- people who share items --------------------------------------------------------------------------------------------


def grouped(*sizes: int, alone: int = 0) -> list[Person]:
    """Groups of these sizes, and people who share nothing."""
    groups = [Person(f"g{g}-{n}", (Item({}),), group=f"g{g}-0") for g, size in enumerate(sizes) for n in range(size)]
    return [*groups, *(Person(f"alone-{n}", (Item({}),)) for n in range(alone))]


def parts_of(splits: Splits, people: list[Person]) -> dict[str, set[str]]:
    """Group -> the parts its people are in."""
    part = {id: name for name in PARTS for id in getattr(splits, name)}
    found: dict[str, set[str]] = {}
    for person in people:
        if person.group and person.id in part:
            found.setdefault(person.group, set()).add(part[person.id])
    return found


@given(
    sizes=st.lists(st.integers(2, 4), max_size=8), seed=st.integers(), test=st.integers(1, 9), task=st.integers(1, 9)
)
def test_people_of_a_group_are_in_one_part_whatever_the_order(sizes, seed, test, task) -> None:
    people = grouped(*sizes, alone=30)
    splits = draw(people, seed, task=task, development=2, test=test)
    assert all(len(parts) == 1 for parts in parts_of(splits, people).values())
    assert draw(people[::-1], seed, task=task, development=2, test=test) == splits
    assert sorted(id for part in PARTS for id in getattr(splits, part)) == sorted(person.id for person in people)


def test_a_large_group_is_drawn_only_among_the_candidates(caplog) -> None:
    people = grouped(40, alone=60)
    splits = draw(people, 0, task=20, development=10, test=30)
    assert all(id.startswith("alone") for id in (*splits.test, *splits.development, *splits.task))
    assert len(splits.candidates) == 40
    assert not caplog.text
    assert len(draw(people, 0, task=0, development=0, test=30, candidates=35).candidates) == 40
    assert "candidates: 40 people instead of 35, because people who share items stay together" in caplog.text


def test_a_giant_group_is_an_error_that_names_the_setting() -> None:
    people = grouped(50)
    with pytest.raises(InputError) as caught:
        draw(people, 0, task=10, development=0, test=10)
    assert "in groups of up to 50 people" in caught.value.message
    assert "people.together=false" in str(caught.value.hint)
    assert len(draw(people, 0, task=10, development=0, test=10, together=False).test) == 10


def test_saved_splits_that_separate_a_group_are_refused(tmp_path: Path) -> None:
    people, path = grouped(2, 2, alone=6), tmp_path / "splits.json"
    apart = draw(people, 0, task=3, development=2, test=3, together=False)
    apart.save(path)
    assert any(len(parts) > 1 for parts in parts_of(apart, people).values())
    with pytest.raises(DataError, match=r"people\.together=false in a recipe splits as before"):
        draw(people, 0, task=3, development=2, test=3).save(path)

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import fsspec
import pytest
from files import folder_of
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from stores import ANN, everything, person, state
from test_state import FILE

from mta.errors import InputError, PersonForgotten, PersonNotFound, StateCorrupt, StoreError
from mta.personalize.forgetting import forget_person
from mta.store import Session, Store
from mta.store.maintenance import check


def test_a_store_keeps_versions(url: str) -> None:
    store = Store(url)
    assert (store.latest(ANN), store.versions(ANN), ANN in store) == (None, [], False)
    assert (store.nbytes(ANN), store.time_of(ANN, 1)) == (0, None)
    assert store.save(ANN, state(0)) == 1
    assert datetime.fromisoformat(store.time_of(ANN, 1)).tzinfo
    assert store.save(ANN, state(1)) == 2
    assert store.save("bob", state(0)) == 1
    again = Store(url)
    assert again.load(ANN) == state(1)
    assert again.load(ANN, 1) == state(0)
    assert (again.latest(ANN), again.versions(ANN), ANN in again, check(again).people) == (2, [1, 2], True, 2)
    assert again.nbytes(ANN) == len(state(0).to_bytes()) + len(state(1).to_bytes())


def test_the_same_work_again_is_a_no_op(url: str) -> None:
    store = Store(url)
    store.save(ANN, state(0))
    store.save(ANN, state(1))
    before = store.nbytes(ANN)
    assert store.save(ANN, state(1)) == 2
    assert (store.versions(ANN), store.nbytes(ANN)) == ([1, 2], before)
    assert store.save(ANN, state(0)) == 3  # an earlier one is not the latest


def test_a_state_whose_answer_was_lost_is_not_kept_of_a_person_forgotten_meanwhile(tmp_path, monkeypatch):
    """Object stores repeat a request whose answer was lost, and then find the file that they wrote."""
    store = Store(tmp_path)
    write = store.files.write

    def written(name, data, new):
        write(name, data, new=new)
        monkeypatch.undo()
        Store(tmp_path).tombstones.add(ANN)
        raise FileExistsError

    monkeypatch.setattr(type(store.files), "write", lambda _, name, data, new: written(name, data, new))
    with pytest.raises(PersonForgotten):
        store.save(ANN, state(0))
    assert store.versions(ANN) == []


def test_tombstones_of_others_cost_a_person_no_request_each(tmp_path, monkeypatch):
    store, asked = Store(tmp_path), []
    store.save(ANN, state(0))
    for n in range(300):
        store.tombstones.add(f"other {n}")
    monkeypatch.setattr(
        LocalFileSystem, "info", lambda *args, real=LocalFileSystem.info: asked.append(args) or real(*args)
    )
    store.save(ANN, state(1))
    forget_person(ANN, store)
    assert len(asked) < 100
    assert store.tombstones.since([ANN, "other 7", "unknown"], ()) == {ANN, "other 7"}
    assert len(store.tombstones.names()) == 301


def test_a_listing_that_fails_does_not_look_as_if_nobody_was_forgotten(tmp_path, monkeypatch):
    store = Store(f"memory://{tmp_path.name}/people")
    store.save(ANN, state(0))

    def fails(self, path, detail=True, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(MemoryFileSystem, "ls", fails)
    with pytest.raises(StoreError, match="no network"):
        Session(store, frozenset()).save(ANN, state(1))
    fsspec.filesystem("memory").store.clear()


def test_rollback_makes_an_earlier_version_the_newest(url: str) -> None:
    store = Store(url)
    for n in range(3):
        store.save(ANN, state(n))
    assert store.versions(ANN) == [1, 2, 3]
    assert store.rollback(ANN, 1) == 4
    assert Store(url).load(ANN) == state(0)
    assert [store.load(ANN, n) for n in (1, 2, 3)] == [state(0), state(1), state(2)]
    before = store.nbytes(ANN)
    assert [store.rollback(ANN, n) for n in (4, 1)] == [4, 4]  # the latest, and one of the same work
    assert (store.versions(ANN), store.nbytes(ANN)) == ([1, 2, 3, 4], before)
    assert store.rollback(ANN, 2) == 5
    assert store.load(ANN) == state(1)


@pytest.mark.parametrize("version", [0, 3, -1])
def test_rollback_to_a_missing_version_lists_the_versions(url: str, version: int) -> None:
    store = Store(url)
    store.save(ANN, state(0))
    store.save(ANN, state(1))
    with pytest.raises(PersonNotFound, match=rf"'{ANN}' has no version {version}; expected one of: 1, 2\n"):
        store.rollback(ANN, version)
    with pytest.raises(PersonNotFound, match="no state of 'bob'"):
        store.rollback("bob", 1)
    assert store.versions(ANN) == [1, 2]


def test_a_missing_person_is_reported(url: str) -> None:
    store = Store(url)
    with pytest.raises(PersonNotFound, match=r"^no state of 'bob' in the store .*people\n  Personalize first:  mta"):
        store.load("bob")
    store.save(ANN, state(0))
    store.save(ANN, state(1))
    with pytest.raises(PersonNotFound, match=rf"'{ANN}' has no version 7; expected one of: 1, 2\n  .*example 2,"):
        store.load(ANN, 7)
    with pytest.raises(InputError, match="id is '', expected a non-empty text\n  Give every person an id"):
        store.save("", state())
    with pytest.raises(InputError, match="id is 5"):
        store.load(5)


def test_reading_creates_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "people")
    assert "bob" not in store
    assert store.history("bob") is None
    assert forget_person("bob", store).states_removed is False
    assert not list(tmp_path.iterdir())


def test_ids_are_distinguished_and_never_written(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ids = [ANN, "../../etc/passwd", "имя ✓", "a/b", "é", "e\u0301", "\ud800", "x" * 500]
    for n, id in enumerate(ids):
        store.save(id, state(n))
        store.save_history(person(id))
    assert [store.load(id).seed for id in ids] == list(range(len(ids)))
    assert check(store).people == len(ids)
    for path, content in everything(tmp_path):
        for id in (ANN, "passwd", "имя", "x" * 500):
            assert id not in str(path.relative_to(tmp_path))
            assert id.encode() not in content
            assert json.dumps(id).strip('"').encode() not in content
    key = folder_of(store, ANN)
    assert len(key) == 64
    assert (tmp_path / key[:2] / key / "1.safetensors").exists()
    assert folder_of(Store(tmp_path), ANN) == key
    assert folder_of(Store(tmp_path / "other"), ANN) != key  # every store has its own key


def test_a_damaged_state_is_refused_and_can_be_replaced(url: str) -> None:
    store = Store(url)
    store.save(ANN, state(0))
    key = folder_of(store, ANN)
    store.files.fs.pipe_file(f"{store.files.root}/{key[:2]}/{key}/1.safetensors", FILE[:-1])
    with pytest.raises(StateCorrupt, match=rf"{key}/1\.safetensors was changed or cut short"):
        store.load(ANN)
    assert store.save(ANN, state(0)) == 2
    assert store.load(ANN) == state(0)


def test_a_stored_history_is_read_back(url: str) -> None:
    store = Store(url)
    assert store.history(ANN) is None
    store.save_history(person())
    back = Store(url).history(ANN)
    assert back == person()
    assert ANN not in store  # a history is no state
    assert check(store).people == 0
    store.save_history(person().first(1))
    assert store.history(ANN) == person().first(1)


def test_forgetting_leaves_nothing(url: str) -> None:
    store = Store(url)
    for n in range(3):
        store.save(ANN, state(n))
    store.save_history(person())
    store.save("bob", state(5))
    assert forget_person(ANN, store).states_removed is True
    assert forget_person(ANN, store).states_removed is False
    assert (ANN in store, store.history(ANN), store.versions(ANN), store.nbytes(ANN)) == (False, None, [], 0)
    assert folder_of(store, ANN) not in " ".join(store.files.fs.find(store.files.root, withdirs=True))
    assert (store.load("bob"), check(store).people) == (state(5), 1)
    assert store.save(ANN, state(9)) == 1
    forget_person(ANN, store)
    store.save_history(person())
    assert forget_person(ANN, store).states_removed is True


@pytest.mark.parametrize("done", range(6))
def test_an_interrupted_forgetting_is_seen_and_can_be_repeated(tmp_path: Path, done: int) -> None:
    store = Store(tmp_path)
    for n in range(3):
        store.save(ANN, state(n))
    store.save_history(person())
    calls: list[str] = []

    def until_killed(remove: Callable[[str], None]) -> Callable[[str], None]:
        def once(name: str) -> None:
            if len(calls) == done:
                raise KeyboardInterrupt
            calls.append(name)
            remove(name)

        return once

    store.files.remove, store.files.remove_folder = map(until_killed, (store.files.remove, store.files.remove_folder))
    with pytest.raises(KeyboardInterrupt):
        forget_person(ANN, store)
    again = Store(tmp_path)
    assert (ANN in again) is (done < 5)  # exports, 4 files; then only an empty folder is left
    if ANN in again:
        assert again.load(ANN) == state(2)  # never an older one
    assert forget_person(ANN, again).states_removed is (done < 5)
    assert [path.name for path, content in everything(tmp_path) if content] == ["store.json"]
    key = folder_of(again, ANN)
    assert not (tmp_path / key[:2] / key).exists()


BAD = [b"", b"[]", b'{"schema": 2, "key": "00"}', b'{"schema": 1, "key": "zz"}', b'{"key": 3}', b"\xff"]


@pytest.mark.parametrize("content", BAD)
def test_a_bad_store_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "store.json").write_bytes(content)
    with pytest.raises(
        StoreError, match=r"json is damaged or missing: expected schema 1 and a 64-digit key\n  Restore the file"
    ):
        Store(tmp_path).load(ANN)


def test_a_lost_store_json_is_not_recreated(tmp_path: Path) -> None:
    Store(tmp_path).save(ANN, state())
    (tmp_path / "store.json").unlink()
    for act in (lambda: Store(tmp_path).save("bob", state()), lambda: ANN in Store(tmp_path)):
        with pytest.raises(StoreError, match=r"missing: .*\n  Restore the file from a backup"):
            act()
    assert not (tmp_path / "store.json").exists()


def test_an_unusable_address_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot be opened: .*nosuch.*\n  Give a folder, or a URL"):
        Store("nosuch://people")
    (tmp_path / "people").write_text("a file")
    with pytest.raises(StoreError, match=r"people/.* cannot be read or written: Not a directory\n  Check"):
        Store(tmp_path / "people").save(ANN, state())

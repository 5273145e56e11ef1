"""Adapters that were exported: noted without a name, found and removed with the person, and nobody else's."""

import contextlib
import errno
import os
from pathlib import Path

import pytest
from files import folder_of
from hypothesis import given
from hypothesis import strategies as st
from test_state import ANN, adapter, state
from test_store import everything, url

from mta import exports as module
from mta.errors import InputError, StateCorrupt
from mta.exports import Export, exports_from_bytes, exports_to_bytes
from mta.lora.peft import CONFIG, WEIGHTS, write_peft
from mta.store import Store

__all__ = ["url"]  # a fixture

KEY = b"k" * 32
LIST = [Export("here", "/data/ann/adapter", "ab" * 32), Export("there", "/Grüße/\udcff", "cd" * 32)]


def exported(folder: Path, seed: int = 0) -> Export:
    write_peft(folder, adapter(seed), "base")
    return Export.begun(folder).done()


def export_from(store: Store, folder: Path, seed: int = 0) -> Export:
    with store.exports.writing(ANN, folder):
        return exported(folder, seed)


@given(st.lists(st.builds(Export, st.text(), st.text(), st.text()), max_size=4), st.binary(min_size=1, max_size=40))
def test_a_list_comes_back_under_its_key(exports: list[Export], key: bytes) -> None:
    assert exports_from_bytes(exports_to_bytes(exports, key), key) == exports


def test_a_list_says_nothing_without_its_key_and_never_looks_alike() -> None:
    data = exports_to_bytes(LIST, KEY)
    assert data != exports_to_bytes(LIST, KEY)
    for word in ("here", "ann", "adapter", "abab"):
        assert word.encode() not in data
        assert word.encode().hex().encode() not in data
    with pytest.raises(StateCorrupt, match="x was changed or cut short: got another key"):
        exports_from_bytes(data, b"other", "x")


FILE = exports_to_bytes(LIST, KEY)


@given(st.integers(0, len(FILE) - 1), st.integers(0, 255), st.booleans())
def test_a_damaged_list_is_refused_or_the_same(place: int, byte: int, cut: bool) -> None:
    damaged = FILE[:place] if cut else FILE[:place] + bytes([byte]) + FILE[place + 1 :]
    try:
        assert exports_from_bytes(damaged, KEY, "x") == LIST
    except StateCorrupt as error:
        assert str(error).startswith("x was changed or cut short: got ")  # noqa: PT017
        assert "must then be found and removed by hand" in str(error)  # noqa: PT017


def test_a_store_notes_exports_without_naming_anybody(tmp_path: Path) -> None:
    store = Store(tmp_path / "people")
    assert store.exports.of(ANN) == []
    first, second = (export_from(store, tmp_path / f"{ANN}-{n}", n) for n in range(2))
    assert store.exports.of(ANN) == [first, second]
    assert export_from(store, tmp_path / f"{ANN}-0", 0) == first
    assert Store(tmp_path / "people").exports.of(ANN) == [second, first]
    assert store.exports.of("bob") == []
    again = export_from(store, tmp_path / f"{ANN}-0", 7)
    assert store.exports.of(ANN) == [second, again]  # one entry a folder
    for path, content in everything(tmp_path / "people"):
        for word in (ANN, str(tmp_path), first.host or "-"):
            assert word not in str(path.relative_to(tmp_path))
            assert word.encode() not in content


def test_nobodys_path_is_the_key_of_anybodys_exports(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store._secret("ann").hex() not in {folder_of(store, id) for id in ("ann", "exports/ann", "exportsann")}


def test_exports_leave_with_their_person(url: str, tmp_path: Path) -> None:
    store, folder = Store(url), tmp_path / "out" / "ann-adapter"
    store.save(ANN, state())
    export_from(store, folder)
    assert store.nbytes(ANN) > state().nbytes + 200
    assert store.exports.remove(ANN) == {}
    assert list((tmp_path / "out").iterdir()) == []
    gone = f"{folder} (not there any more: it was removed before, or moved)"
    assert list(store.exports.remove(ANN).values()) == [gone]  # a crash may come before the store has forgotten
    assert store.forget(ANN)
    assert store.exports.of(ANN) == []


def test_an_export_that_is_refused_is_not_noted(tmp_path: Path) -> None:
    store = Store(tmp_path / "people")
    kept = export_from(store, tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        export_from(store, tmp_path / "file")
    assert store.exports.of(ANN) == [kept]
    with pytest.raises(InputError, match="is a file"), store.exports.writing("bob", tmp_path / "file"):
        exported(tmp_path / "file")
    assert len([path for path in (tmp_path / "people").rglob("*.json")]) == 2  # no file for bob


@pytest.mark.parametrize("there", [False, True])
def test_an_export_that_was_killed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    store, folder = Store(tmp_path / "people"), tmp_path / "out [1]" / "ann"
    if there:
        exported(folder, 3)
    with monkeypatch.context() as patch:
        patch.setattr("mta.lora.peft._publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr("mta.lora.peft.shutil.rmtree", lambda *_, **__: None)  # nobody cleans up after a kill
        with pytest.raises(KeyboardInterrupt):
            export_from(store, folder)
    (folder.parent / ".ann.mine").mkdir()
    assert [path.name[:5] for path in folder.parent.iterdir() if path.name != "ann"] == [".ann."] * 2
    assert [export.sha256 for export in store.exports.of(ANN)] == [""]
    assert list(store.exports.remove(ANN).values()) == ([f"{folder} (it was interrupted)"] if there else [])
    assert {path.name for path in folder.parent.iterdir()} == {".ann.mine", *(["ann"] if there else [])}


def test_an_export_over_another_that_fails_leaves_that_one_findable(tmp_path: Path) -> None:
    store, folder = Store(tmp_path / "people"), tmp_path / "ann"
    export_from(store, folder)
    before = store.exports.of(ANN)
    with contextlib.suppress(OSError), store.exports.writing(ANN, folder):
        assert store.exports.of(ANN)[: len(before)] == before
        raise OSError("the disk is full")
    assert store.exports.of(ANN) == before
    assert store.exports.remove(ANN) == {}
    assert not folder.exists()


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    export = exported(tmp_path / "out")
    (tmp_path / "out" / "notes.md").write_text("mine")
    assert export.remove() == ""
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.md"]


def test_an_adapter_that_was_changed_since_stays(tmp_path: Path) -> None:
    export = exported(tmp_path / "out")
    exported(tmp_path / "out", 1)
    assert export.remove() == f"{tmp_path}/out (its adapter was changed since)"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CONFIG, WEIGHTS}


def test_another_hosts_export_is_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = exported(tmp_path / "out")
    monkeypatch.setattr(module.platform, "node", lambda: "elsewhere")
    assert export.remove() == f"{tmp_path}/out (on the host {export.host!r})"
    assert (tmp_path / "out" / WEIGHTS).exists()


def test_what_cannot_be_removed_is_told_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = exported(tmp_path / "out")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert export.remove() == f"{tmp_path}/out (Permission denied)"


@pytest.mark.parametrize("gone", [(CONFIG,), (CONFIG, WEIGHTS), (WEIGHTS,)])
def test_an_interrupted_removal_can_be_repeated(tmp_path: Path, gone: tuple[str, ...]) -> None:
    export = exported(tmp_path / "out")
    for name in gone:
        (tmp_path / "out" / name).unlink()
    assert export.remove() == ""
    assert not (tmp_path / "out" / WEIGHTS).exists()
    assert (tmp_path / "out").exists() is (
        gone == (WEIGHTS,)
    )  # no weights of ours: what else lies there is not touched


def test_a_damaged_list_keeps_nobody_from_being_forgotten(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(ANN, state())
    Path(store.files.at(f"{store._path(ANN)}/exports.json")).write_bytes(FILE[:-1])
    with pytest.raises(StateCorrupt, match=r"exports\.json was changed or cut short"):
        store.exports.of(ANN)
    (told,) = store.exports.remove(ANN).values()
    assert told.startswith("whatever was exported of them (")
    assert store.forget(ANN)
    assert [path.name for path, content in everything(tmp_path) if content] == ["store.json"]

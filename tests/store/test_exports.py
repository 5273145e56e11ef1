"""Adapters that were exported: noted without a name, found and removed with the person, and nobody else's."""

import contextlib
from pathlib import Path
from unittest.mock import Mock

import pytest
from files import path_of
from hypothesis import given
from hypothesis import strategies as st
from stores import ANN, adapter, everything, export_from, exported, state

from mta.errors import InputError, StateCorrupt
from mta.lora.peft import CONFIG, WEIGHTS, write_peft
from mta.personalize.forgetting import forget_person
from mta.store import Store
from mta.store import exports as module
from mta.store.exports import Export, exports_from_bytes, exports_to_bytes

LIST = [Export("here", "/data/ann/adapter", "ab" * 32), Export("there", "/Grüße/\udcff", "cd" * 32)]


@given(st.lists(st.builds(Export, st.text(), st.text(), st.text()), max_size=4))
def test_a_list_is_read_back(exports: list[Export]) -> None:
    assert exports_from_bytes(exports_to_bytes(exports)) == exports


def test_a_store_notes_exports_for_its_owner_alone(tmp_path: Path) -> None:
    store = Store(tmp_path / "people")
    assert store.exports.of(ANN) == []
    first, second = (export_from(store, tmp_path / f"{ANN}-{n}", n) for n in range(2))
    assert store.exports.of(ANN) == [first, second]
    assert export_from(store, tmp_path / f"{ANN}-0", 0) == first
    assert Store(tmp_path / "people").exports.of(ANN) == [second, first]
    assert store.exports.of("bob") == []
    again = export_from(store, tmp_path / f"{ANN}-0", 7)
    assert store.exports.of(ANN) == [second, again]  # one entry a folder
    assert (path_of(store, ANN) / "exports.json").stat().st_mode & 0o777 == 0o600
    for path, content in everything(tmp_path / "people"):
        assert ANN not in str(path.relative_to(tmp_path))
        assert ANN.encode() not in content or path.name == "exports.json"


FILE = exports_to_bytes(LIST)


@given(st.integers(0, len(FILE) - 1), st.integers(0, 255), st.booleans())
def test_a_damaged_list_is_refused_or_the_same(place: int, byte: int, cut: bool) -> None:
    damaged = FILE[:place] if cut else FILE[:place] + bytes([byte]) + FILE[place + 1 :]
    try:
        assert exports_from_bytes(damaged, "x") == LIST
    except StateCorrupt as error:
        assert str(error).startswith("x was changed or cut short: got ")  # noqa: PT017
        assert "then find and remove adapters" in str(error)  # noqa: PT017


def test_exports_leave_with_their_person(url: str, tmp_path: Path) -> None:
    store, folder = Store(url), tmp_path / "out" / "ann-adapter"
    store.save(ANN, state())
    export_from(store, folder)
    assert store.nbytes(ANN) > len(state().to_bytes()) + 200
    assert store.exports.forget(ANN) == {}
    assert list((tmp_path / "out").iterdir()) == []
    assert forget_person(ANN, store).states_removed
    assert store.exports.of(ANN) == []


def test_a_folder_with_files_stays_in_a_store_that_removes_whole_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """As HDFS does."""
    store = Store("memory://whole/people")
    store.save(ANN, state())
    monkeypatch.setattr(type(store.files.fs), "rmdir", lambda fs, path: fs.rm(path, recursive=True))
    assert store.exports.forget(ANN) == {}
    assert store.latest(ANN) == 1


def test_an_export_that_is_refused_is_not_noted(tmp_path: Path) -> None:
    store = Store(tmp_path / "people")
    kept = export_from(store, tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        export_from(store, tmp_path / "file")
    assert store.exports.of(ANN) == [kept]
    with pytest.raises(InputError, match="is a file"), store.session("bob").exporting("bob", tmp_path / "file"):
        exported(tmp_path / "file")
    assert len([path for path in (tmp_path / "people").rglob("*.json")]) == 2  # no file for bob


class Killed(BaseException):
    """In place of a kill: nobody handles it."""


@pytest.mark.parametrize("there", [False, True])
def test_a_killed_export_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    store, folder = Store(tmp_path / "people"), tmp_path / "out [1]" / "ann"
    if there:
        exported(folder, 3)
    with monkeypatch.context() as patch:
        patch.setattr("mta.lora.peft._publish", Mock(side_effect=Killed))
        patch.setattr("mta.lora.peft.shutil.rmtree", lambda *_, **__: None)  # nobody cleans up after a kill
        with pytest.raises(Killed), store.session(ANN).exporting(ANN, folder):
            write_peft(folder, adapter(0), "base")
    (folder.parent / ".ann.mine").mkdir()
    assert len([path for path in folder.parent.glob("**/.ann.*") if path.is_dir()]) == 2
    assert [export.sha256 for export in store.exports.of(ANN)] == [""]
    left = [(f"{folder} (it was interrupted)", False)] if there else []
    assert list(store.exports.forget(ANN).values()) == left
    assert {path.name for path in folder.parent.iterdir()} == {".ann.mine", *(["ann"] if there else [])}
    assert not list(folder.glob(".*"))


def test_an_export_that_was_killed_after_its_weights_appeared_is_removed(tmp_path: Path) -> None:
    store, folder = Store(tmp_path / "people"), tmp_path / "ann"
    with contextlib.suppress(Killed), store.session(ANN).exporting(ANN, folder) as written:
        write_peft(folder, adapter(0), "base", on_weights=written)
        raise Killed
    assert (folder / WEIGHTS).exists()
    assert store.exports.forget(ANN) == {}
    assert not folder.exists()


def test_an_export_over_another_that_fails_leaves_that_one_findable(tmp_path: Path) -> None:
    store, folder = Store(tmp_path / "people"), tmp_path / "ann"
    export_from(store, folder)
    before = store.exports.of(ANN)
    with contextlib.suppress(OSError), store.session(ANN).exporting(ANN, folder):
        assert store.exports.of(ANN)[: len(before)] == before
        raise OSError("the disk is full")
    assert store.exports.of(ANN) == before
    assert store.exports.forget(ANN) == {}
    assert not folder.exists()


def test_files_of_others_stay(tmp_path: Path) -> None:
    export = exported(tmp_path / "out")
    (tmp_path / "out" / "notes.md").write_text("mine")
    assert export.remove() is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.md"]


def test_another_hosts_export_is_removed_only_if_its_weights_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that writes to a volume has another host name than the next container."""
    same, changed, away = (exported(tmp_path / name) for name in ("same", "changed", "away"))
    exported(tmp_path / "changed", 1)
    (tmp_path / "away").rename(tmp_path / "elsewhere")
    monkeypatch.setattr(module.platform, "node", lambda: "elsewhere")
    assert same.remove() is None
    assert not (tmp_path / "same").exists()
    for export in (changed, away):
        assert export.remove() == (f"{export.folder} (on the host {export.host!r})", True)
    assert (tmp_path / "changed" / WEIGHTS).exists()


@pytest.mark.parametrize("gone", [(CONFIG,), (CONFIG, WEIGHTS), (WEIGHTS,)])
def test_an_interrupted_removal_can_be_repeated(tmp_path: Path, gone: tuple[str, ...]) -> None:
    export = exported(tmp_path / "out")
    for name in gone:
        (tmp_path / "out" / name).unlink()
    why = f"{tmp_path}/out (its weights are missing: removed, renamed, or on a disk that is not mounted)"
    assert export.remove() == ((why, False) if WEIGHTS in gone else None)
    assert not (tmp_path / "out" / WEIGHTS).exists()
    assert (tmp_path / "out").exists() is (WEIGHTS in gone)  # no weights of ours: what else lies there is not touched

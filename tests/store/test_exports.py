"""Adapters that were exported: noted without a name, found and removed with the person, and nobody else's."""

import contextlib
import errno
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
from files import folder_of, path_of
from hypothesis import given
from hypothesis import strategies as st
from stores import ANN, adapter, everything, export_from, exported, state

from mta.errors import InputError, StateCorrupt
from mta.lora.peft import CONFIG, WEIGHTS, write_peft
from mta.personalize.forgetting import forget_person
from mta.store import Store
from mta.store import exports as module
from mta.store.exports import Export, Exports, exports_from_bytes, exports_to_bytes
from mta.store.maintenance import check

KEY = b"k" * 32
LIST = [Export("here", "/data/ann/adapter", "ab" * 32), Export("there", "/Grüße/\udcff", "cd" * 32)]


@given(st.lists(st.builds(Export, st.text(), st.text(), st.text()), max_size=4), st.binary(min_size=1, max_size=40))
def test_a_list_is_read_back_with_its_key(exports: list[Export], key: bytes) -> None:
    assert exports_from_bytes(exports_to_bytes(exports, key), key) == exports


def test_an_encrypted_list_is_unreadable_and_always_different() -> None:
    data = exports_to_bytes(LIST, KEY)
    assert data != exports_to_bytes(LIST, KEY)
    for word in ("/data/ann", "adapter", "ab" * 8):
        assert word.encode() not in data
        assert word.encode().hex().encode() not in data
    with pytest.raises(StateCorrupt, match="x was changed or cut short: got another key"):
        exports_from_bytes(data, b"other", "x")


# A list as mta 0.1.0 wrote it, under the same key.
OLD = b"""{"schema": 1, "sha256": "7774688993942cef45565894f8e8c4ddc8949c4d896355cab721e3e5f7788ac7", "exports": [
"abe7371d122bf137c43b808461a1bb6e",
"336ef4de6af2997d7d47045649e9e778f9749bd7b339fe063beb0b7de07ec38f094a2e0664f0fc167a983dcf7f4d8d61cd44658de347e51b4068ea\
97fa83421916c7e7c54a1772457935454b1ae13d57d027ad038192143ee19d1ab46473bc75f4ed456c17cdbc307626493e48d2da0245d4416098c8\
7e50ee975e01f642e178f3c87d7f0e73db5a040cbe190916a2f2541528f1d5803825a0b8c30e0698095be72fdb52f0b8a769ad51875c320ddb50ae\
305b4db53634fed5ddd9ad7971ac5fdca0b5eb34fce7d7f26261b0cf790ca2827f8aeed9793ece6f24c862c055e57ce0bf730f5874fea85c904ce5\
9ddc0975cefaac7cda238cddfb34de5fba4b8e4391e448e286"]}"""


def test_a_list_of_the_first_release_is_read_and_rewritten() -> None:
    assert exports_from_bytes(OLD, KEY) == LIST
    with pytest.raises(StateCorrupt, match="got another key"):
        exports_from_bytes(OLD, b"other")
    with pytest.raises(StateCorrupt, match="another schema or sha256"):
        exports_from_bytes(OLD.replace(b"abe7", b"abe8"), KEY)


def written_by_the_first_release(exports: list[Export], key: bytes) -> bytes:
    nonce, plain = bytes(range(16)), json.dumps([asdict(export) for export in exports]).encode()
    stream = hashlib.shake_256(key + nonce).digest(len(plain))
    rows = [nonce.hex(), bytes(a ^ b for a, b in zip(plain, stream)).hex()]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return json.dumps({"schema": 1, "sha256": digest, "exports": rows}).encode()


def test_forgetting_reaches_an_export_that_the_first_release_noted(tmp_path: Path) -> None:
    store, folder = Store(tmp_path / "people"), tmp_path / "out"
    store.save(ANN, state())
    old = exported(folder)
    noted = written_by_the_first_release([old], store._secret(ANN))
    (path_of(store, ANN) / "exports.json").write_bytes(noted)
    assert check(store).damaged == {}
    assert store.exports.of(ANN) == [old]
    with store.exports.writing(ANN, tmp_path / "new"):
        new = exported(tmp_path / "new")
    assert store.exports.of(ANN) == [old, new]
    assert store.exports.forget(ANN) == {}
    assert not folder.exists()


FILE = exports_to_bytes(LIST, KEY)


@given(st.integers(0, len(FILE) - 1), st.integers(0, 255), st.booleans())
def test_a_damaged_list_is_refused_or_the_same(place: int, byte: int, cut: bool) -> None:
    damaged = FILE[:place] if cut else FILE[:place] + bytes([byte]) + FILE[place + 1 :]
    try:
        assert exports_from_bytes(damaged, KEY, "x") == LIST
    except StateCorrupt as error:
        assert str(error).startswith("x was changed or cut short: got ")  # noqa: PT017
        assert "then find and remove adapters" in str(error)  # noqa: PT017


def test_a_store_notes_exports_without_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.platform, "node", lambda: "a-host-of-ours")
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


def test_the_key_of_exports_is_not_a_path_of_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store._secret("ann").hex() not in {folder_of(store, id) for id in ("ann", "exports/ann", "exportsann")}


def test_exports_leave_with_their_person(url: str, tmp_path: Path) -> None:
    store, folder = Store(url), tmp_path / "out" / "ann-adapter"
    store.save(ANN, state())
    export_from(store, folder)
    assert store.nbytes(ANN) > state().nbytes + 200
    assert store.exports.remove(ANN) == {}
    assert list((tmp_path / "out").iterdir()) == []
    gone = f"{folder} (missing: it was removed before, or moved)"
    assert list(store.exports.remove(ANN).values()) == [gone]  # a crash may come before the store has forgotten
    assert forget_person(ANN, store).states_removed
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


class Killed(BaseException):
    """In place of a kill: nobody handles it."""


def killed(*_: object) -> None:
    raise Killed


@pytest.mark.parametrize("there", [False, True])
def test_a_killed_export_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    store, folder = Store(tmp_path / "people"), tmp_path / "out [1]" / "ann"
    if there:
        exported(folder, 3)
    with monkeypatch.context() as patch:
        patch.setattr("mta.lora.peft._publish", killed)
        patch.setattr("mta.lora.peft.shutil.rmtree", lambda *_, **__: None)  # nobody cleans up after a kill
        with pytest.raises(Killed):
            export_from(store, folder)
    (folder.parent / ".ann.mine").mkdir()
    assert len([path for path in folder.parent.glob("**/.ann.*") if path.is_dir()]) == 2
    assert [export.sha256 for export in store.exports.of(ANN)] == [""]
    assert list(store.exports.remove(ANN).values()) == ([f"{folder} (it was interrupted)"] if there else [])
    assert {path.name for path in folder.parent.iterdir()} == {".ann.mine", *(["ann"] if there else [])}
    assert not list(folder.glob(".*"))


def test_an_export_that_was_killed_after_its_weights_appeared_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, folder = Store(tmp_path / "people"), tmp_path / "ann"
    with monkeypatch.context() as patch:
        patch.setattr(Exports, "_keep_out", killed)
        with pytest.raises(Killed), store.exports.writing(ANN, folder) as written:
            write_peft(folder, adapter(0), "base", on_weights=written)
    assert (folder / WEIGHTS).exists()
    assert store.exports.remove(ANN) == {}
    assert not folder.exists()


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


def test_files_of_others_stay(tmp_path: Path) -> None:
    export = exported(tmp_path / "out")
    (tmp_path / "out" / "notes.md").write_text("mine")
    assert export.remove() == ""
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.md"]


def test_an_adapter_that_was_changed_later_stays(tmp_path: Path) -> None:
    export = exported(tmp_path / "out")
    exported(tmp_path / "out", 1)
    assert export.remove() == f"{tmp_path}/out (its adapter was changed since)"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CONFIG, WEIGHTS}


def test_another_hosts_export_is_removed_only_if_its_weights_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that writes to a volume has another host name than the next container."""
    same, changed, away = (exported(tmp_path / name) for name in ("same", "changed", "away"))
    exported(tmp_path / "changed", 1)
    (tmp_path / "away").rename(tmp_path / "elsewhere")
    monkeypatch.setattr(module.platform, "node", lambda: "elsewhere")
    assert same.remove() == ""
    assert not (tmp_path / "same").exists()
    for export in (changed, away):
        assert export.remove() == f"{export.folder} (on the host {export.host!r})"
        assert not export.is_final()
    assert (tmp_path / "changed" / WEIGHTS).exists()


def test_an_export_that_cannot_be_removed_is_reported_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    reported = f"{tmp_path}/out (its weights are missing: they were removed before, or renamed)"
    assert export.remove() == (reported if gone == (WEIGHTS,) else "")
    assert not (tmp_path / "out" / WEIGHTS).exists()
    assert (tmp_path / "out").exists() is (
        gone == (WEIGHTS,)
    )  # no weights of ours: what else lies there is not touched


def test_a_person_with_a_damaged_list_can_be_forgotten(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(ANN, state())
    (path_of(store, ANN) / "exports.json").write_bytes(FILE[:-1])
    with pytest.raises(StateCorrupt, match=r"exports\.json was changed or cut short"):
        store.exports.of(ANN)
    (reported,) = store.exports.remove(ANN).values()
    assert reported.startswith("all exports, if there are any (")
    assert forget_person(ANN, store).states_removed
    assert [path.name for path, content in everything(tmp_path) if content] == ["store.json"]

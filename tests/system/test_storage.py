"""Local storage: removals that last, no way out of it by links, and who else can read it."""

import errno
import os
from pathlib import Path

import fsspec
import pytest
from files import path_of, path_of_open
from fsspec.implementations.memory import MemoryFileSystem
from stores import ANN, state

from mta.errors import StoreError
from mta.personalize.forgetting import forget_person
from mta.store import Store
from mta.store.run_checkpoints import RunCheckpoints
from mta.system import storage
from mta.system.storage import Storage


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Each folder that was flushed, and what was in it then."""
    seen, fsync = list[tuple[str, list[str]]](), os.fsync

    def noted(fd: int) -> None:
        path = path_of_open(fd)
        if os.path.isdir(path):
            seen.append((path, sorted(os.listdir(path))))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    return seen


def test_a_created_file_has_its_name_when_its_folder_is_flushed(tmp_path: Path, synced: list) -> None:
    Storage(tmp_path).write("ab/1", b"data", new=True)
    assert synced[-1] == (str(tmp_path / "ab"), ["1"])


def test_removed_files_are_gone_when_their_folders_are_flushed(tmp_path: Path, synced: list) -> None:
    files = Storage(tmp_path)
    for name in ("ab/1", "ab/2", "cd/1"):
        files.write(name, b"data", new=True)
    synced.clear()
    for name in ("ab/1", "ab/2", "ab/3", "cd/1", "ef/1"):
        files.remove(name)
    assert synced == [(str(tmp_path / "ab"), ["2"]), (str(tmp_path / "ab"), []), (str(tmp_path / "cd"), [])]


def test_forgetting_is_on_disk_when_it_returns(tmp_path: Path, synced: list) -> None:
    store = Store(tmp_path)
    store.save(ANN, state())
    folder = path_of(store, ANN)
    synced.clear()
    assert forget_person(ANN, store).states_removed
    assert (str(folder.parent), []) in synced


def test_removing_a_linked_folder_keeps_its_target(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "work").symlink_to(tmp_path / "other")
    Storage(tmp_path / "store").remove_folder("work")
    assert not (tmp_path / "store" / "work").is_symlink()
    assert (tmp_path / "other" / "file").read_text() == "mine"


def test_a_folder_is_removed_while_another_process_removes_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, unlink, vanished = Storage(tmp_path), os.unlink, list[str]()
    for name in ("work/1/a", "work/1/b", "work/2/a", "work/2/b"):
        files.write(name, b"data", new=True)

    def another_is_first(path: str, *rest: object, dir_fd: int | None = None) -> None:
        unlink(path, dir_fd=dir_fd)
        if not vanished:
            vanished.append(str(path))
            unlink(path, dir_fd=dir_fd)  # raises FileNotFoundError

    monkeypatch.setattr(os, "unlink", another_is_first)
    files.remove_folder("work")
    assert vanished
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_or_removed_through_a_linked_folder(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "ab").symlink_to(tmp_path / "other")
    files = Storage(tmp_path / "store")
    for change in (
        lambda: files.write("ab/new", b"data", new=True),
        lambda: files.write("ab/file", b"data"),
        lambda: files.remove("ab/file"),
        lambda: files.remove_folder("ab/inner"),
        lambda: RunCheckpoints(files, "ab/run").checkpoint("digest"),
    ):
        with pytest.raises(StoreError, match=r"store/ab is a symbolic link"):
            change()
    assert [path.read_text() for path in (tmp_path / "other").iterdir()] == ["mine"]


@pytest.mark.parametrize("shared", ["", "group"])
def test_a_store_knows_whether_others_can_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: str) -> None:
    monkeypatch.setenv("MTA_SHARED", shared)
    (tmp_path / "people").mkdir()
    (tmp_path / "people").chmod(0o755)
    store = Store(tmp_path / "people")
    store.save(ANN, state())
    assert not store.files.exposed()
    (tmp_path / "people" / "store.json").chmod(0o644)
    assert store.files.exposed() == f"chmod -R {'o=' if shared else 'go='} {tmp_path}/people"
    (tmp_path / "people").chmod(0o700)
    assert not store.files.exposed()


def test_a_store_of_a_group_is_reported_as_open_without_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MTA_SHARED", "group")
        store = Store(tmp_path / "people")
        store.save(ANN, state())
        assert not store.files.exposed()
    assert store.files.exposed().endswith("   (or, if its group shares it: export MTA_SHARED=group)")


def test_a_file_system_that_knows_no_setting_of_ours_can_hold_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """sftp passes all settings on to its client, which refuses unknown ones."""

    class Strict(MemoryFileSystem):
        protocol = "strict"

        def __init__(self, **settings: object) -> None:
            if settings:
                raise TypeError(f"unexpected keyword arguments {settings}")
            super().__init__()

    fsspec.register_implementation("strict", Strict, clobber=True)
    store = Store("strict://people")
    store.save(ANN, state())
    assert Store("strict://people").latest(ANN) == 1


def test_a_store_that_cannot_be_locked_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise OSError(errno.ENOLCK, "no")

    monkeypatch.setattr(storage.FileLock, "acquire", refuse)
    with pytest.raises(StoreError, match="cannot be locked: no\n  Check the "), Storage(tmp_path).locked():
        pytest.fail("entered without the lock")

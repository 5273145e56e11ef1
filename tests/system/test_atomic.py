"""Written files: whole or not at all, readable by their owner alone, durable, and never through a planted link."""

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from files import path_of_open

from mta.errors import ConfigError, InputError, StoreError
from mta.system.atomic import owner_only, replacing, replacing_folder, write_json, write_text


@pytest.fixture(params=[0o022, 0o077, 0o000])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_new_files_and_folders_are_readable_by_their_owner_only(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "a" / "b" / "file"
    with replacing(path) as temporary:
        assert mode(Path(temporary.name)) == 0o600
        temporary.write(b"text")
    assert [mode(p) for p in (tmp_path / "a", tmp_path / "a" / "b", path)] == [0o700, 0o700, 0o600]
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_replaced_file_is_readable_by_its_owner_only(tmp_path: Path, umask: int) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "file").chmod(0o644)
    write_json(tmp_path / "file", "new")
    assert mode(tmp_path / "file") == 0o600


def test_a_file_of_appended_lines_is_readable_by_its_owner_only(tmp_path: Path, umask: int) -> None:
    (tmp_path / "old").write_text("1\n")
    (tmp_path / "old").chmod(0o644)
    for name in ("old", "new"):
        with open(tmp_path / name, "a", opener=owner_only) as file:
            file.write("2\n")
        assert mode(tmp_path / name) == 0o600
    assert (tmp_path / "old").read_text() == "1\n2\n"


def test_folders_that_exist_keep_their_mode(tmp_path: Path, umask: int) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine").chmod(0o755)
    write_text(tmp_path / "mine" / "inner" / "file", "text")
    assert (mode(tmp_path / "mine"), mode(tmp_path / "mine" / "inner")) == (0o755, 0o700)


def test_files_that_are_not_personal_follow_the_umask(tmp_path: Path, umask: int) -> None:
    write_json(tmp_path / "cache" / "file", 1, private=False)
    assert mode(tmp_path / "cache") == 0o777 & ~umask
    assert mode(tmp_path / "cache" / "file") == 0o666 & ~umask


def test_a_group_can_read_and_write_with_the_setting(
    tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTA_SHARED", "group")
    write_text(tmp_path / "a" / "b" / "file", "text")
    with open(tmp_path / "a" / "lines", "a", opener=owner_only) as file:
        file.write("1\n")
    assert [mode(tmp_path / name) for name in ("a", "a/b", "a/b/file", "a/lines")] == [0o2770, 0o2770, 0o660, 0o660]


def test_files_are_written_on_a_file_system_without_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setenv("MTA_SHARED", "group")
    monkeypatch.setattr(os, "fchmod", refuse)
    monkeypatch.setattr(Path, "chmod", refuse)
    write_text(tmp_path / "new" / "file", "text")
    assert (tmp_path / "new" / "file").read_text() == "text"


def test_another_value_of_the_setting_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTA_SHARED", "all")
    with pytest.raises(ConfigError, match="MTA_SHARED is 'all', expected 'group'"):
        write_text(tmp_path / "file", "text")
    assert list(tmp_path.iterdir()) == []


def test_a_link_at_the_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("mine")
    (tmp_path / "file").symlink_to(tmp_path / "other")
    write_text(tmp_path / "file", "text")
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "other").read_text() == "mine"


def test_lines_are_not_appended_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("mine")
    (tmp_path / "file").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic link"):
        open(tmp_path / "file", "a", opener=owner_only)  # noqa: SIM115
    assert (tmp_path / "other").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file to another user")
def test_lines_are_not_appended_to_a_file_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(0o666)
    os.chown(path, 12345, -1)
    with pytest.raises(StoreError, match="a file of user 12345, expected your own"):
        open(path, "a", opener=owner_only)  # noqa: SIM115
    with pytest.raises(StoreError, match="a file of user 12345"):
        open(path, "w", opener=owner_only)  # noqa: SIM115
    monkeypatch.setenv("MTA_SHARED", "group")
    with open(path, "a", opener=owner_only) as file:
        file.write("1\n")
    assert path.read_text() == "1\n"


def test_a_file_with_a_second_name_is_neither_appended_to_nor_emptied(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("mine")
    (tmp_path / "file").hardlink_to(tmp_path / "other")
    for way in ("a", "w"):
        with pytest.raises(StoreError, match="a file with 2 names"):
            open(tmp_path / "file", way, opener=owner_only)  # noqa: SIM115
    assert (tmp_path / "other").read_text() == "mine"


@pytest.mark.parametrize("read", [False, True])
def test_lines_are_not_appended_to_a_pipe(tmp_path: Path, read: bool) -> None:
    os.mkfifo(tmp_path / "file")
    reader = os.open(tmp_path / "file", os.O_RDONLY | os.O_NONBLOCK) if read else None
    with pytest.raises(StoreError, match="not a regular file"):
        open(tmp_path / "file", "a", opener=owner_only)  # noqa: SIM115
    if reader is not None:
        os.close(reader)


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), replacing(tmp_path / "file"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_whole_in_place_of_none_or_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with replacing_folder(tmp_path / name) as temporary:
            write_text(temporary / "file", "text")
            assert not (tmp_path / name / "file").exists()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "empty",
        "empty/file",
        "new",
        "new/file",
    ]


def test_a_folder_appears_in_place_of_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with replacing_folder(Path()) as temporary:
        temporary.mkdir()
        (temporary / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_not_published_over_another_or_after_an_error(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(OSError, match="full"), replacing_folder(tmp_path / "full") as temporary:
        write_text(temporary / "file", "text")

    def write_and_fail() -> None:
        with replacing_folder(tmp_path / "new") as temporary:
            write_text(temporary / "file", "text")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_fail()
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine"]


def test_a_file_is_flushed_before_it_has_its_name_and_its_folder_after(
    synced: list[tuple[str, bool]], tmp_path
) -> None:
    write_text(tmp_path / "new" / "file", "text")
    names = [(Path(path).name.partition(".file.")[0], there) for path, there in synced if str(tmp_path) in path]
    assert names == [(tmp_path.name, False), ("", False), ("new", True)]


@pytest.fixture
def synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """What was flushed, in order, and whether the file had its name by then."""
    seen, fsync = list[tuple[str, bool]](), os.fsync

    def noted(fd: int) -> None:
        seen.append((path_of_open(fd), (tmp_path / "new" / "file").exists()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    return seen


def test_a_pipe_and_standard_output_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out")
    with pytest.raises(InputError, match="is a device or a pipe"):
        write_text(tmp_path / "out", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").is_fifo()
    code = "from pathlib import Path; from mta.system.atomic import check_ordinary; check_ordinary(Path('/dev/stdout'))"
    with (tmp_path / "file").open("w") as out:
        done = subprocess.run([sys.executable, "-c", code], stdout=out, stderr=subprocess.PIPE, text=True)
    assert "/dev/stdout is a device or a pipe" in done.stderr


def test_a_name_that_is_not_utf_8_is_written_as_json(tmp_path: Path) -> None:
    """Names of files on Linux may be any bytes; a run records the command that named them."""
    write_json(tmp_path / "run.json", {"command": "mta data show caf\udce9.jsonl"})
    assert json.loads((tmp_path / "run.json").read_text()) == {"command": "mta data show caf\udce9.jsonl"}

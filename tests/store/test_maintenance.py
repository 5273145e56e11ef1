"""Looking after a store: nothing damaged goes unseen, nothing that is needed goes."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from files import path_of
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from stores import ANN, everything, person, record_export, state
from typer.testing import CliRunner

from mta.cli.app import app
from mta.errors import StoreError
from mta.personalize.forgetting import forget_person
from mta.store import Store
from mta.store.maintenance import check, collect


def filled(url: str | Path, versions: int = 2) -> Store:
    store = Store(url)
    for n in range(versions):
        store.save(ANN, state(n))
    store.save("bob", state(0))
    store.save_history(person())
    record_export(store)
    return store


def test_check_finds_no_damage_in_an_intact_store(url: str) -> None:
    store, reported = filled(url), []
    found = check(store, lambda done, total: reported.append((done, total)))
    assert (found.people, found.states, found.histories, found.exports) == (2, 3, 1, 1)
    assert (found.damaged, found.leftovers, found.strangers) == ({}, [], [])
    assert reported == [(n, 5) for n in range(1, 6)]
    assert found.bytes == sum(store.nbytes(id) for id in (ANN, "bob"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return filled(tmp_path_factory.mktemp("kept"))


def same_json(one: bytes, other: bytes) -> bool:
    """Whether both files have the same value; the escapes of a letter may differ, which is no damage."""
    try:
        return json.dumps(json.loads(one)) == json.dumps(json.loads(other))
    except ValueError:
        return False


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 4), st.integers(0), st.integers(0, 7))
def test_check_finds_a_changed_bit_and_names_the_file(kept: Store, which: int, byte: int, bit: int) -> None:
    names = sorted(name for name in kept.files.find() if name.endswith(("safetensors", "history.json", "exports.json")))
    path = Path(kept.files.at(names[which]))
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[byte % len(whole)] ^= 1 << bit
    assume(path.suffix != ".json" or not same_json(bytes(changed), whole))
    path.write_bytes(changed)
    found = check(kept)
    path.write_bytes(whole)
    assert list(found.damaged) == [names[which]]
    assert ANN not in str(found)


def test_check_lists_leftovers_and_unknown_files(tmp_path: Path) -> None:
    store = filled(tmp_path)
    folder = path_of(store, ANN)
    (folder / f".3.safetensors.{'0' * 32}").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    for run in ("0" * 24, "of-mine"):
        (tmp_path / "work" / run).mkdir(parents=True)
        (tmp_path / "work" / run / "plan.json").write_text("{}")
    found = check(store)
    assert [Path(name).name for name in found.leftovers] == [f".3.safetensors.{'0' * 32}"]
    assert {Path(name).name for name in found.strangers} == {"notes.txt", "plan.json"}
    assert "work/of-mine/plan.json" in found.strangers
    assert (found.states, found.damaged) == (3, {})


def test_collect_removes_only_old_leftovers(tmp_path: Path) -> None:
    store = filled(tmp_path)
    folder = path_of(store, ANN)
    young, old = (folder / f".3.safetensors.{digit * 32}" for digit in "01")
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    before = dict(everything(tmp_path))
    assert [Path(name).name for name in collect(store, dry=True)] == [old.name]
    assert dict(everything(tmp_path)) == before
    assert list(collect(store).values()) == [4]
    assert {*before} - {path for path, _ in everything(tmp_path)} == {old}


def test_collect_removes_a_stopped_run_after_a_week(tmp_path: Path) -> None:
    store = filled(tmp_path)
    old, young = "0" * 24, "1" * 24
    for days, run in ((8, old), (6, young), (8, "of-mine")):
        plan = tmp_path / "work" / run / "plan.json"
        plan.parent.mkdir(parents=True)
        plan.write_text("[]")
        os.utime(plan, (time.time() - days * 86400,) * 2)
    assert list(collect(store)) == [f"work/{old}/plan.json"]
    assert {path.name for path in (tmp_path / "work").iterdir()} == {young, "of-mine"}


def test_collect_keeps_the_plan_of_a_run_that_takes_longer_than_a_week(tmp_path: Path) -> None:
    store, run = filled(tmp_path), tmp_path / "work" / ("0" * 24)
    run.mkdir(parents=True)
    for name in ("plan.json", "0.safetensors"):
        (run / name).write_text("[]")
        os.utime(run / name, (time.time() - 8 * 86400,) * 2)
    assert len(collect(store, dry=True)) == 2
    (run / "0.safetensors").touch()  # the run writes on
    assert collect(store) == {}


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_collect_keeps_the_newest_versions_and_the_numbering(url: str, keep: int) -> None:
    store = filled(url, versions=4)
    collect(store, keep)
    assert store.versions(ANN) == [1, 2, 3, 4][-keep:]
    assert store.load(ANN) == state(3)
    assert (store.versions("bob"), store.history(ANN)) == ([1], person())
    assert store.save(ANN, state(9)) == 5
    assert not collect(Store(url), 9)


def test_an_interrupted_removal_leaves_no_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, remove, left = filled(tmp_path, versions=5), Store(tmp_path).files.remove, [2]

    def killed(name: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        remove(name)

    monkeypatch.setattr(store.files, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        collect(store, 1)
    assert Store(tmp_path).versions(ANN) == [3, 4, 5]


def test_a_damaged_newest_version_protects_the_older_ones(tmp_path: Path) -> None:
    store = filled(tmp_path, versions=3)
    (path_of(store, ANN) / "3.safetensors").write_bytes(b"half")
    assert collect(store, 1) == {}
    assert store.load(ANN, 2) == state(1)


def test_collect_keeps_a_first_version_written_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path, versions=3)
    find = store.files.find

    def and_then_comes_again() -> dict[str, int]:
        found = find()
        forget_person(ANN, Store(tmp_path))
        Store(tmp_path).save(ANN, state(7))
        return found

    monkeypatch.setattr(store.files, "find", and_then_comes_again)
    assert collect(store, 1) == {}
    assert Store(tmp_path).load(ANN) == state(7)


@pytest.mark.parametrize("look", [check, collect])
def test_a_damaged_key_and_a_mistyped_address_are_errors(tmp_path: Path, look: Callable[[Store], object]) -> None:
    store = filled(tmp_path)
    (tmp_path / "store.json").write_text("garbage")
    with pytest.raises(StoreError, match=r"store\.json is damaged"):
        look(Store(store.files.root))
    with pytest.raises(StoreError, match="no store"):
        look(Store(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_the_store_commands_print_their_findings(tmp_path: Path) -> None:
    store = filled(tmp_path)
    run = CliRunner().invoke
    said = "2 people, 3 states and 1 histories, 1 lists of exports read: "
    assert run(app, ["store", "check", str(tmp_path)]).stdout.startswith(said)
    would = run(app, ["store", "gc", str(tmp_path), "--keep", "1", "--dry-run"]).stdout
    assert "1.safetensors" in would
    assert "would be removed" in would
    assert store.versions(ANN) == [1, 2]
    assert json.loads(run(app, ["store", "gc", str(tmp_path), "--keep", "1", "--json"]).stdout)["removed"]
    assert store.versions(ANN) == [2]
    (path_of(store, ANN) / "2.safetensors").write_bytes(b"no state")
    broken = run(app, ["store", "check", str(tmp_path)])
    assert broken.exit_code == 1
    assert "damaged: " in broken.stdout
    assert ANN not in broken.stdout


def test_check_counts_people_by_the_bank_of_their_newest_state(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for id, banks in (("ann", "aab"), ("bob", "b"), ("cem", "ba")):
        for bank in banks:
            store.save(id, state(bank=bank * 64))
    assert check(store).banks == {"b" * 64: 2, "a" * 64: 1}
    printed = CliRunner().invoke(app, ["store", "check", str(tmp_path)]).stdout
    assert "newest state of bank bbbbbbbb…: 2 people" in printed


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, scandir = filled(tmp_path), os.scandir
    closed = str(path_of(store, ANN))

    def refuse(path: str) -> object:
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StoreError, match="Permission denied"):
        check(store)

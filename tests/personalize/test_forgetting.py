"""Forgetting goes on where a step fails, can be repeated, and holds against processes that are still at work."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from at_once import at_once
from conftest import people_of
from crowd import knowing

from mta.bank.format import INFO, STALE, read_info
from mta.bank.notes import parts_to_rebuild
from mta.errors import StoreError
from mta.personalize import forget_person
from mta.store import exports
from mta.system.storage import Storage

MEMBER = people_of(1, prefix="t")[0]  # the task LoRA learnt from this person


@pytest.fixture(params=["something in the way", "missing", "damaged"])
def unwritable(own_bank, request, tmp_path):
    """A person in a store, and a bank that cannot be marked; what makes it writable again."""
    base, bank = own_bank
    personal = knowing(base, bank, tmp_path / "people", [MEMBER])
    personal.store.save_history(MEMBER)
    personal.export(MEMBER.id, tmp_path / "out")
    mark, info = bank.folder / STALE, bank.folder / INFO
    if request.param == "something in the way":
        (mark / "in the way").mkdir(parents=True)
        yield personal, request.param, lambda: shutil.rmtree(mark)
    else:
        whole = info.read_bytes()
        info.unlink() if request.param == "missing" else info.write_bytes(whole[:-9])
        yield personal, request.param, lambda: info.write_bytes(whole)


def test_a_person_is_forgotten_though_the_bank_cannot_be_marked_and_the_bank_is_marked_the_next_time(unwritable):
    personal, why, mend = unwritable
    bank, store = personal.bank.folder, personal.store
    found = personal.forget(MEMBER.id)
    assert found.states_removed
    assert list(found.unmarked) == [str(bank)]
    assert not found.complete
    assert found.needs_rebuild == ([] if why in ("missing", "damaged") else ["task LoRA"])
    assert (MEMBER.id in store, store.history(MEMBER.id), (bank.parent / "out").exists()) == (False, None, False)
    mend()
    again = personal.forget(MEMBER.id)
    assert (again.states_removed, again.unmarked, again.complete) == (False, {}, True)
    assert parts_to_rebuild(bank) == ["task LoRA"]


def test_whatever_step_fails_the_others_are_done_and_all_failures_are_reported_together(
    own_bank, tmp_path, monkeypatch
):
    base, bank = own_bank
    personal = knowing(base, bank, tmp_path / "people", [MEMBER])
    personal.store.save_history(MEMBER)
    personal.export(MEMBER.id, tmp_path / "out")
    (tmp_path / "people" / "work" / ("0" * 24)).mkdir(parents=True)
    (bank.folder / STALE / "in the way").mkdir(parents=True)
    remove = Storage.remove_folder

    def refuse(storage: Storage, name: str) -> None:
        if name.startswith("work/"):
            raise StoreError("work/ cannot be removed", hint="-")
        remove(storage, name)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "remove_folder", refuse)
        with pytest.raises(StoreError) as caught:
            personal.forget(MEMBER.id)
    assert "work/ cannot be removed" in caught.value.message
    assert f"{bank.folder} could not be marked" in caught.value.message
    assert "orget" in caught.value.hint
    assert MEMBER.id not in caught.value.message
    assert (MEMBER.id in personal.store, personal.store.history(MEMBER.id)) == (False, None)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "people" / "work").exists()
    shutil.rmtree(bank.folder / STALE)
    assert personal.forget(MEMBER.id).needs_rebuild == ["task LoRA"]
    assert not (tmp_path / "people" / "work").exists()


# -- exports that were out of reach ------------------------------------------------------------------------------------


def test_an_export_that_was_out_of_reach_is_removed_by_the_next_forgetting(own_bank, tmp_path, monkeypatch):
    personal = knowing(*own_bank, tmp_path / "people", people_of(1))
    for name in ("disk/other host", "refused", "disk/not mounted"):
        with monkeypatch.context() as patch:
            if name == "disk/other host":
                patch.setattr(exports.platform, "node", lambda: "elsewhere")
            personal.export("p0", tmp_path / name)
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    kept = personal.store.exports.of("p0")
    unlink = Path.unlink

    def refuse(path: Path, **how: object) -> None:
        if path.parent.name == "refused":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        unlink(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        first = personal.forget("p0")
    assert (first.states_removed, first.complete) == (True, False)
    assert first.exports_left == [
        f"{tmp_path}/disk/other host (on the host 'elsewhere')",
        f"{tmp_path}/refused (Permission denied)",
        f"{tmp_path}/disk/not mounted (its weights are missing: removed, renamed, or on a disk that is not mounted)",
    ]
    assert personal.store.exports.of("p0") == kept
    monkeypatch.setattr(exports.platform, "node", lambda: "elsewhere")
    assert len(personal.forget("p0").exports_left) == 2  # on the disk
    monkeypatch.undo()
    (tmp_path / "unmounted").rename(tmp_path / "disk")
    again = personal.forget("p0")
    assert (again.states_removed, again.exports_left, again.complete) == (False, [], True)
    assert not any((tmp_path / name).exists() for name in ("disk/other host", "refused", "disk/not mounted"))
    assert not any((tmp_path / "people").glob("??/*"))


# -- marks of a bank, from many processes at once ----------------------------------------------------------------------


def marking(folder: Path, person: str, barrier: object) -> None:
    barrier.wait(60)
    forget_person(person, None, folder)


def test_people_who_are_forgotten_at_once_by_several_processes_are_all_in_the_marks(own_bank):
    folder = own_bank[1].folder
    members = read_info(folder).members
    people = [*people_of(4, prefix="t"), *people_of(12, prefix="c")]
    parts = sorted({part for person in people for part in members.parts_of(person.id)})
    for _ in range(2):
        at_once(marking, *((folder, person.id) for person in people))
        assert parts_to_rebuild(folder) == parts
        (folder / STALE).unlink()

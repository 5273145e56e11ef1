"""Who a bank is built from: anchors, the task LoRA's people, and that no file names anybody."""

from dataclasses import replace

import pytest
from builds import CANDIDATES, TASK_PEOPLE, UNCALIBRATED, build, changed, files_in
from conftest import TINY_RUN, HashEncoder, people_of
from tiny import base_of

from mta.bank.bank import Bank
from mta.bank.format import read_info
from mta.bank.members import Members
from mta.errors import InputError
from mta.evaluation.protocol import members_and_others


def test_any_id_can_be_looked_up():
    """Python reads bytes of the command line that are not UTF-8 as halves of surrogate pairs."""
    members = Members.of("secret", ["ann", "\udcff"], [], [], [])
    assert (members.parts_of("\udcff"), members.parts_of("\udcfe")) == (["task LoRA"], [])


def test_candidates_with_few_items_never_become_anchors(tmp_path):
    candidates = [person.first(2) if n % 2 else person for n, person in enumerate(people_of(24, prefix="somebody-c"))]
    info = read_info(build(tmp_path / "bank", candidates=candidates, run=UNCALIBRATED))
    assert info.members.candidates == 12
    assert info.items == (4, 4, 4)


def test_too_few_candidates_are_noticed_before_anything_is_trained(tmp_path):
    steps = []
    with pytest.raises(InputError, match=r"^2 of 2 candidates .* have 3 items or more; .* 4 such people .* 12 for 3 "):
        build(tmp_path / "bank", candidates=CANDIDATES[:2], on_step=lambda *_: steps.append(1))
    assert steps == []


def test_without_a_task_lora_nobody_is_behind_it(tmp_path, task):
    run = changed("task_lora", UNCALIBRATED, enabled=False)
    bank = Bank.build(base_of(), CANDIDATES, tmp_path / "b", task=task, encoder=HashEncoder(), run=run, anchors=2)
    parts = [bank.info.members.parts_of(person.id) for person in CANDIDATES]
    assert (bank.info.members.task, bank.info.members.candidates) == (0, 12)
    assert all("clusters" in part and "task LoRA" not in part for part in parts)
    assert read_info(build(tmp_path / "other", run=run)).members.task == 0


def test_without_task_people_half_of_all_train_the_task_lora(tmp_path, task, cache):
    everyone = people_of(24, prefix="somebody-")
    bank = Bank.build(base_of(), everyone, tmp_path / "b", task=task, encoder=HashEncoder(), run=TINY_RUN, anchors=2)
    members = bank.info.members
    assert (members.task, members.candidates, members.anchors, len(bank)) == (14, 12, 2, 2)
    parts = [bank.info.members.parts_of(person.id) for person in everyone]
    assert parts.count(["task LoRA"]) == 12
    assert sum("clusters" in part for part in parts) == 12
    assert parts.count(["task LoRA", "clusters", "anchor"]) == 2
    assert parts.count(["clusters", "calibration"]) == TINY_RUN.calibration.people


def test_people_who_are_held_out_are_no_members_and_share_nothing_with_them(tmp_path, task, cache):
    long = [replace(p, group=f"pair-{n // 2}" if n < 8 else "") for n, p in enumerate(people_of(14, items=20))]
    long[1] = long[1].first(6)
    everyone = [*long, *people_of(24, prefix="short")]
    how = {"task": task, "encoder": HashEncoder(), "run": TINY_RUN, "anchors": 2}
    bank = Bank.build(base_of(), everyone, tmp_path / "b", hold_out=9, **how)
    outside = [person for person in everyone if not bank.info.members.parts_of(person.id)]
    assert sum(len(person.items) >= 20 for person in outside) == 9
    assert not {p.group for p in outside if p.group} & {p.group for p in everyone if p not in outside}
    assert [person.id for person in members_and_others(bank, everyone)[1]] == [person.id for person in outside]
    with pytest.raises(InputError, match="15 of 38 people were to be held out, but only 13 have enough items"):
        Bank.build(base_of(), everyone, tmp_path / "c", hold_out=15, **how)
    assert not (tmp_path / "c").exists()


def test_the_halves_of_a_bank_do_not_separate_people_who_share_items(tmp_path, task, cache):
    people = [replace(p, group=f"pair-{n // 2}") for n, p in enumerate(people_of(24, prefix="somebody-p"))]
    bank = Bank.build(base_of(), people, tmp_path, task=task, run=UNCALIBRATED, encoder=HashEncoder())
    part = ["clusters" in bank.info.members.parts_of(person.id) for person in people]
    assert part[::2] == part[1::2]
    assert (sum(part), len(bank)) == (12, 3)


def test_a_bank_of_people_who_all_share_items_is_built_and_says_so(tmp_path, task, cache, caplog):
    people = [replace(person, group="all") for person in people_of(24, prefix="somebody-a")]
    assert len(Bank.build(base_of(), people, tmp_path, task=task, run=UNCALIBRATED, encoder=HashEncoder())) == 3
    assert "more than half of the people share items with each other" in caplog.text


def test_members_can_be_asked_for_but_not_listed():
    members = Members.of("work", ["ann"], ["bob", "cy"], [["cy"]], ["bob"])
    assert members.parts_of("ann") == ["task LoRA"]
    assert members.parts_of("bob") == ["clusters", "calibration"]
    assert members.parts_of("cy") == ["clusters", "anchor"]
    assert members.parts_of("dee") == []
    assert not any(name in members.hashed.to_bytes() for name in (b"ann", b"bob"))


def test_the_same_person_is_hashed_differently_in_another_bank():
    one, other = (Members.of(work, ["ann"], [], []) for work in ("one", "other"))
    assert one.hashed.key != other.hashed.key
    assert one.hashed.task != other.hashed.task


def test_no_file_contains_ids_or_texts(built):
    texts = {item.fields["title"] for person in (*TASK_PEOPLE, *CANDIDATES) for item in person.items}
    for name, data in files_in(built).items():
        assert b"somebody-" not in data, name
        assert not any(text.encode() in data for text in texts), name

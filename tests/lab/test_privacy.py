"""Attacks on a bank: the protocol on a bank that memorized its items."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from builds import changed
from conftest import TINY_RUN, HashEncoder, people_of, personalizer
from rich.console import Console
from sklearn.metrics import roc_auc_score
from tiny import base_of, unpacked

from mta.bank.bank import Bank
from mta.bank.build import build_bank
from mta.bank.context import Build
from mta.bank.task_lora import pooled_items
from mta.config import Lora, MergeSettings, StackSettings, Training, override
from mta.data.history import Item, Person
from mta.data.tasks import load_task
from mta.errors import AnchorNotFound, InputError
from mta.evaluation.context import Context
from mta.evaluation.protocol import TestBatch
from mta.lora.batch import join
from mta.lora.layers import Shared
from mta.lora.peft import read_peft
from mta.training.scoring import label_scores
from mta_lab.privacy import report as privacy_report
from mta_lab.privacy.report import judged, table
from mta_lab.privacy.runner import (
    ANCHORS,
    ANOTHER,
    OWN,
    PERSONAL,
    POOL,
    SHOTS,
    Findings,
    MembershipEvaluator,
    merges,
    privacy,
)
from mta_lab.privacy.sampling import NumberedItems, sample_people
from mta_lab.privacy.settings import AttackSettings

pytestmark = pytest.mark.integration

ANCHORS_KEPT, EACH = 6, 6
SETTINGS = AttackSettings(shots=2, targets=4, items=EACH)
TASK_PEOPLE = people_of(4, prefix="task-", seed=1)
CANDIDATES = people_of(4 * ANCHORS_KEPT, items=8, prefix="candidate-", seed=2)
STRANGERS = people_of(24, prefix="stranger-", seed=7)
EVERYBODY = [*STRANGERS, *CANDIDATES, *TASK_PEOPLE]


# -- selection of people ----------------------------------------------------------------------------------------------

STACK = StackSettings(lora=Lora(rank=4, alpha=8.0), training=Training(lr=2e-2, steps=80, batch_size=8))
HARD = {"lora": Lora(rank=8), "training": Training(lr=1e-2, epochs=150, batch_size=6)}
MEMORIZING = changed("bank", anchors=ANCHORS_KEPT, max_items=EACH, **HARD).model_copy(update={"stack": STACK})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Base and a bank whose anchors memorized their few items."""
    root = tmp_path_factory.mktemp("privacy")
    base, task = base_of(), "movielens-rating"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTA_CACHE", str(root / "cache"))
        build_bank(Build(base, load_task(task), HashEncoder(), TASK_PEOPLE, CANDIDATES, MEMORIZING, root / "bank"))
        yield base, Bank.open(root / "bank", base)


@pytest.fixture(scope="module")
def found(world) -> Findings:
    base, bank = world
    return privacy(base, bank, EVERYBODY, SETTINGS, run=MEMORIZING, encoder=HashEncoder())


def test_people_have_the_part_that_the_bank_records(world):
    bank = world[1]
    parts = sample_people(bank, EVERYBODY, SETTINGS, seed=0)
    kind = {person.id: bank.info.members.parts_of(person.id) for person in EVERYBODY}
    assert [kind[person.id] for person in parts.anchors] == [["task LoRA", "clusters", "anchor"]] * len(bank)
    assert [person.id for person in parts.anchors] == sorted(person.id for person in parts.anchors)
    for asked, whole in zip(parts.anchors, parts.trained):
        assert whole.items == next(p for p in EVERYBODY if p.id == whole.id).items[-EACH:]  # trained on the latest
        assert set(map(id, asked.items)) <= set(map(id, whole.items))
    strangers = {person.id for person in (*parts.targets, *parts.others)}
    assert strangers == {person.id for person in STRANGERS}
    assert len(strangers) == len(parts.targets) + len(parts.others)
    assert len(parts.targets) == 4
    assert sum(len(person.items) for person in parts.others) == 20 * 6  # all there are, for there are no thousand


def test_the_task_loras_items_are_those_it_was_trained_on(world):
    bank = world[1]
    parts = sample_people(bank, EVERYBODY, SETTINGS, seed=0)
    others, run = [one for one in CANDIDATES if one.id in {anchor.id for anchor in parts.anchors}], bank.info.run
    pooled = set(map(id, pooled_items(TASK_PEOPLE, run.task_lora, run.seed, candidates=others)[0]))
    assert {person.id for person in parts.pool} == {person.id for person in TASK_PEOPLE}
    assert set(map(id, (item for person in parts.pool for item in person.items))) <= pooled
    assert (
        sample_people(bank, EVERYBODY[:-1], SETTINGS, seed=0).pool == []
    )  # one is missing: who knows which items were pooled


def test_outsiders_who_share_items_do_not_change_what_trained_the_task_lora(tmp_path, cache):
    task, many = load_task("movielens-rating"), people_of(24, prefix="task-", seed=1)
    run = changed("task_lora", MEMORIZING, rounds=2, items=400)
    run = override(run, ["task_lora.training.epochs=1", "bank.training.epochs=1", "calibration.enabled=false"])
    base = base_of()
    build_bank(Build(base, task, HashEncoder(), many, CANDIDATES, run, tmp_path / "bank"))
    bank = Bank.open(tmp_path / "bank", base)

    def known(people):
        return {one.id for one in sample_people(bank, [*STRANGERS, *CANDIDATES, *people], SETTINGS, seed=0).pool}

    assert len(known(many)) == 22  # a tenth is held out
    assert known([replace(one, group="a") for one in many]) == known(many)  # as if a stranger held an item of each


def test_people_who_share_items_with_the_bank_or_a_target_are_not_among_the_others(world):
    member, anchor_s_kin = (replace(one, group="m") for one in (CANDIDATES[0], STRANGERS[0]))
    pairs = [replace(one, group=f"pair-{n // 2}") for n, one in enumerate(STRANGERS[2:])]
    parts = sample_people(world[1], [member, anchor_s_kin, *CANDIDATES[1:], *pairs, STRANGERS[1]], SETTINGS, seed=0)
    assert anchor_s_kin.id not in {person.id for person in (*parts.targets, *parts.others)}
    targets = {person.group for person in parts.targets}
    expected = [person.id for person in pairs if person.group not in targets]
    assert {person.id for person in parts.others} - {STRANGERS[1].id} == set(expected)


@pytest.mark.parametrize(
    ("people", "message", "hint"),
    [
        (
            STRANGERS,
            "6 people behind the bank's anchors are not among the 24 people given; all are needed",
            "built from, and others",
        ),
        (CANDIDATES, "0 of 24 people are outside the bank", "was not built from, in addition to its own"),
        ([*CANDIDATES, STRANGERS[0]], "1 of 25 people are outside the bank, 1 of them", "lower shots="),
        (
            [*CANDIDATES, *(person.first(2) for person in STRANGERS)],
            "24 of 48 people are outside the bank, 0 of them with more than 2 items",
            "lower shots=",
        ),
        (
            [*STRANGERS, *(person.first(5) for person in CANDIDATES)],
            "6 of 6 anchors have other items than when the bank was built",
            "Give the histories the bank was built from.",
        ),
    ],
)
def test_missing_people_are_refused(world, people, message, hint):
    with pytest.raises(InputError) as refused:
        sample_people(world[1], people, SETTINGS, seed=0)
    assert message in refused.value.message
    assert hint in refused.value.hint


def test_an_impossible_merge_is_refused_first(world):
    run = MEMORIZING.model_copy(update={"merge": MergeSettings(k=9)})
    with pytest.raises(AnchorNotFound, match=r"merge\.k is 9, but the bank has 6 anchors"):
        privacy(*world, STRANGERS, SETTINGS, run=run, encoder=HashEncoder())


def test_a_bank_whose_prompts_show_earlier_items_is_refused(world):
    base, bank = world
    shown = changed("task_lora", bank.info.run, history=2)
    with pytest.raises(InputError, match="attacks show no earlier items"):
        privacy(base, replace(bank, info=bank.info.model_copy(update={"run": shown})), STRANGERS, SETTINGS)


# -- findings -----------------------------------------------------------------------------------------------------


def row_of(found, about, model):
    return next(row for row in found.rows if (row.about, row.model) == (about, model))


def strongest(row):
    return judged(row, {"anchors pooled": 0})[1]


def test_a_task_lora_that_saw_the_anchors_items_is_no_reference_for_them(found):
    own, shots = row_of(found, ANCHORS, OWN), row_of(found, SHOTS, PERSONAL)
    apart, pooled = ({"anchors pooled": number} for number in (0, 3))
    assert judged(own, apart) == ("over task LoRA", own.attacks["over task LoRA"])
    assert judged(own, pooled) == ("over base", own.attacks["over base"])
    assert judged(shots, pooled)[0] == "over task LoRA"  # which did not see these
    base = row_of(found, ANCHORS, "base")
    assert judged(base, pooled)[0] == "loss"
    meta = found.meta | {"anchors pooled": 3}
    (*_, last) = table(Findings([own], meta)).columns
    tprs = [f"{own.attacks[name].tpr.mean:.3f}" for name in ("over base", "over task LoRA")]
    assert [tprs[0] in cell for cell in last.cells] == [False, True]  # below the heading of the section
    assert tprs[0] != tprs[1]


def test_memorized_items_are_found_and_the_base_shows_nothing(found):
    own, base = row_of(found, ANCHORS, OWN), row_of(found, ANCHORS, "base")
    assert own.attacks["loss"].auc.mean > 0.85
    assert own.attacks["over task LoRA"].auc.low > 0.7  # 0.749 or 0.75, by the processor's rounding
    assert base.attacks["loss"].auc.mean == pytest.approx(0.5, abs=0.15)  # nothing but what the items happen to be
    another = row_of(found, ANCHORS, ANOTHER)
    assert strongest(another).auc.mean < strongest(own).auc.mean - 0.2


def test_fewer_anchors_with_larger_weights_reveal_more(found):
    alone, everyone = (strongest(row_of(found, ANCHORS, f"uniform, K = {k}")).auc.mean for k in (1, 6))
    assert alone > everyone > 0.5


def test_a_heavily_trained_stack_reveals_shots(found):
    merged, personal = row_of(found, SHOTS, "posterior, K = 6"), row_of(found, SHOTS, PERSONAL)
    assert personal.attacks["loss"].auc.mean > 0.8
    assert strongest(personal).auc.mean > strongest(merged).auc.mean
    assert (personal.models, personal.members, personal.others) == (4, 8, 8)


def test_every_kind_of_model_has_its_row(found):
    names = {about: [row.model for row in found.rows if row.about == about] for about in (ANCHORS, POOL, SHOTS)}
    reference, of_run = ["base", "task LoRA"], ["posterior, K = 6", PERSONAL]
    uniform = [f"uniform, K = {k}" for k in (1, 2, 4, 6)]
    assert names[ANCHORS] == [*reference, OWN, ANOTHER, *uniform, *of_run]
    assert names[POOL] == reference
    assert names[SHOTS] == [*reference, *of_run]
    for row in found.rows:
        below = {"base": 0, "task LoRA": 1}.get(row.model, 2)
        assert list(row.attacks) == ["loss", "over base", "over task LoRA"][: 1 + below]


def test_others_are_never_targets_and_each_item_is_asked_once(world):
    base, bank = world
    items = evaluator_of(base, bank).items
    targets = {items.owners[n] for sets in (items.shots, items.later) for numbers in sets for n in numbers}
    assert not targets & {items.owners[n] for n in items.others}
    assert sorted(n for numbers in items.others_of(4) for n in numbers) == items.others


def evaluator_of(base, bank) -> MembershipEvaluator:
    sample = sample_people(bank, EVERYBODY, SETTINGS, seed=0)
    shots = [person.first(2) for person in sample.targets]
    context = Context(base, bank, HashEncoder(), MEMORIZING)
    batch = TestBatch(context, shots, [()] * len(shots), context.bank.task, write_texts=False)
    items = NumberedItems.of(sample, SETTINGS.shots)
    return MembershipEvaluator(batch, items, sample.trained, SETTINGS.items)


def test_the_row_of_an_anchor_equals_a_plain_computation(world):
    """Plain: one meta-LoRA at a time over the task LoRA, one item at a time, and scikit-learn's AUC."""
    base, bank = world
    evaluator = evaluator_of(base, bank)
    items = evaluator.items
    evaluator.attack_references()
    evaluator.attack_meta_loras()
    row = next(row for row in evaluator.rows if row.model == OWN)
    won, pairs = 0.0, 0
    for anchor, own in enumerate(items.anchors):
        others = items.others[anchor :: len(bank)]
        adapters = [Shared(join([bank.task_lora, bank.anchors.select([anchor])]))]
        asked = [items.items[n] for n in (*own, *others)]
        scores = label_scores(unpacked(base), bank.task, [[item] for item in asked], adapters)
        gold = [bank.task.labels.index(bank.task.target(item)) for item in asked]
        loss = [-float(one.log_softmax(1)[0, label]) for one, label in zip(scores, gold)]
        member = np.arange(len(asked)) < len(own)
        won += roc_auc_score(member, -np.array(loss)) * len(own) * len(others)
        pairs += len(own) * len(others)
    assert row.attacks["loss"].auc.mean == pytest.approx(won / pairs, abs=1e-9)


def test_without_task_lora_and_stack_their_rows_are_missing(tmp_path, cache, task):
    base = base_of()
    off = {"task_lora": TINY_RUN.task_lora.model_copy(update={"enabled": False})}
    run = TINY_RUN.model_copy(update=off | {"stack": StackSettings(enabled=False)})
    build_bank(Build(base, task, HashEncoder(), TASK_PEOPLE, CANDIDATES, run, tmp_path / "bank"))
    bank = Bank.open(tmp_path / "bank", base)
    found = privacy(base, bank, EVERYBODY, SETTINGS, run=run, encoder=HashEncoder())
    assert {row.about for row in found.rows} == {ANCHORS, SHOTS}
    assert not {"task LoRA", PERSONAL} & {row.model for row in found.rows}
    assert {name for row in found.rows for name in row.attacks} == {"loss", "over base"}
    assert "task LoRA" not in " ".join(privacy_report.sentences(found))


def test_free_text_is_attacked_by_its_loss_per_token(tmp_path, cache):
    base, task = base_of(), load_task("text")

    def wrote(prefix, people):
        return [
            Person.of(f"{prefix}{n}", [Item({"input": f"ask {n} {i}", "output": f"say {7 * n + i}"}) for i in range(6)])
            for n in range(people)
        ]

    build_bank(Build(base, task, HashEncoder(), wrote("t", 4), wrote("c", 12), TINY_RUN, tmp_path / "bank"))
    bank, people = Bank.open(tmp_path / "bank", base), [*wrote("t", 4), *wrote("c", 12), *wrote("s", 6)]
    found = privacy(base, bank, people, SETTINGS, run=TINY_RUN, encoder=HashEncoder())
    assert found.meta["loss"] == "NLL of the true answer, per token"
    assert all(0 <= row.attacks["loss"].auc.mean <= 1 for row in found.rows)


def test_the_runs_own_merge_is_last_and_unique():
    for run in (TINY_RUN, TINY_RUN.model_copy(update={"merge": MergeSettings(policy="learned", k=2)})):
        made = merges(run, anchors=5)
        assert list(made)[:4] == [f"uniform, K = {k}" for k in (1, 2, 4, 5)]
        assert list(made.values())[-1] == run.merge
        assert list(made.values()).count(run.merge) == 1
    assert list(merges(TINY_RUN, anchors=1)) == ["uniform, K = 1", "posterior, K = 1"]
    again = merges(TINY_RUN.model_copy(update={"merge": MergeSettings(policy="uniform", k=2)}), anchors=5)
    assert list(again) == ["uniform, K = 1", "uniform, K = 4", "uniform, K = 5", "uniform, K = 2"]


# -- reports ------------------------------------------------------------------------------------------------------


def test_the_table_fits_eighty_columns_and_shows_counts(found):
    file = io.StringIO()
    privacy_report.show(found, Console(width=80, file=file))
    assert max(map(len, file.getvalue().splitlines())) <= 80
    text = " ".join(file.getvalue().split())
    for words in (ANCHORS, POOL, SHOTS, OWN, "uniform, K = 1", "over task LoRA", "TPR at"):
        assert words in text
    assert "36 items of 6 anchors" in text
    assert "against 120 items of 20 people outside the bank; 4 targets with 2 shots each" in text
    assert "Warning: only 120 items of others, fewer than 1000" in text


def test_files_hold_no_ids_or_texts(found, tmp_path):
    privacy_report.write(found, tmp_path, "mta-lab attack everybody.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "privacy.svg", "privacy.png"}
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text)["meta"]["command"].startswith("mta-lab attack")
    assert len(json.loads(text)["rows"]) == len(found.rows)
    everything = text + (tmp_path / "privacy.svg").read_text()
    assert not any(word in everything for word in ("stranger-", "candidate-", "task-", "Film"))


def test_merged_items_come_from_the_anchors_of_each_merge(world):
    """A merge of one anchor uses items of that anchor only; a merge of all anchors uses items of all."""
    base, bank = world
    items = evaluator_of(base, bank).items
    one, everyone = torch.eye(6)[[1] * 4], torch.full((4, 6), 1 / 6)
    assert {items.owners[n] for numbers in items.merged_items(one, EACH) for n in numbers} == {1}
    assert all({items.owners[n] for n in numbers} == set(range(6)) for numbers in items.merged_items(everyone, EACH))


def test_an_exact_export_contains_the_factors_of_anchors_and_a_truncated_export_mixes_them(tiny, tmp_path):
    """As docs/explanation/privacy.md warns: an exact export holds each anchor's B times its coefficient."""
    bank, personal = tiny[1], personalizer(*tiny, merge=MergeSettings(policy="similarity", k=2))
    personal.personalize([STRANGERS[0].first(3)])
    state, rank = personal.state(STRANGERS[0].id), bank.anchors.rank
    for cut, same in ((None, True), (2 * rank, False)):
        personal.export(STRANGERS[0].id, tmp_path / str(cut), rank=cut)
        exported = read_peft(tmp_path / str(cut)).scaled_into_b()
        for name, (_, b) in bank.anchors.scaled_into_b().factors.items():
            found = exported.factors[name].b[0, :, :rank].double()
            assert torch.allclose(found, state.w[0] * b[state.anchors[0]].double(), atol=1e-6) == same

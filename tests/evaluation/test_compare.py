import dataclasses
from types import SimpleNamespace

import pytest
import torch
from batches import PEOPLE, QUERIES, SHOTS, batch_of
from batches import batch as batch  # the fixture
from conftest import TINY_RUN, HashEncoder, people_of

from mta.config import CompareSettings, Lora, MergeSettings, Training
from mta.data.history import Item, Person
from mta.errors import BankMismatch, Diverged, InputError
from mta.evaluation import context, run_methods
from mta.evaluation.compare import compare, standard_methods
from mta.evaluation.methods import (
    Base,
    GlobalConstant,
    LabelBias,
    Merged,
    MergeThenAdapt,
    Method,
    OneLora,
    OtherPerson,
    Outcome,
    OwnConstant,
    TaskLora,
    method,
)
from mta.evaluation.metrics import Answers, measure
from mta.evaluation.reports.summary import headline, verdict
from mta.evaluation.statistics import Comparison, Row, bootstrap
from mta_lab.experiments.results import Where
from mta_lab.experiments.runner import compute_records
from mta_lab.methods.combined import Chosen, Rag

ADAPT = OneLora(name="adapt only", lora=Lora(rank=1, alpha=4.0), training=Training(lr=1e-2, steps=2, batch_size=8))
MTA = MergeThenAdapt(name="MTA", merge=MergeSettings(policy="posterior", k=0), stack=TINY_RUN.stack)
ALL = [
    GlobalConstant(),
    OwnConstant(),
    Base(),
    TaskLora(),
    OneLora(name="OPPU", lora=Lora(rank=2, alpha=4.0), training=Training(lr=1e-2, steps=2, batch_size=8)),
    Merged(name="merge only, similarity", merge=MergeSettings(policy="similarity", k=2)),
    Merged(name="merge only, posterior", merge=MergeSettings(policy="posterior", k=0)),
    ADAPT,
    MTA,
]


def with_other_answers(person):
    """The same person with other answers to all items after the shots."""
    items = [
        item if n < SHOTS else Item({**item.fields, "rating": str(6 - int(item.fields["rating"]))}, time=item.time)
        for n, item in enumerate(person.items)
    ]
    return Person.of(person.id, items)


def test_all_methods_answer_the_same_queries_in_order_and_say_what_they_cost(batch, monkeypatch):
    asked, started = [], []

    def watched(base, task, queries, adapters=(), **how):
        asked.append(queries)
        return label_scores(base, task, queries, adapters, **how)

    label_scores = method.label_scores
    monkeypatch.setattr(method, "label_scores", watched)
    found = run_methods(batch, ALL, on_method=started.append)
    assert len(asked) == len(ALL) - 2  # constants need no model
    assert all(queries == batch.queries for queries in asked)
    for row in found.rows:
        assert [len(answers.texts) for answers in row.answers] == [QUERIES] * PEOPLE
        assert all(values.shape == (1, PEOPLE) for values in row.people.values())
        assert torch.stack(row.nll).shape == (PEOPLE, QUERIES)
        by_hand = [measure(batch.bank.task, a, golds).metrics["MAE"] for a, golds in zip(row.answers, batch.golds)]
        assert row.people["MAE"].tolist() == [pytest.approx(by_hand)]
    names = [row.name for row in found.rows]
    assert names == started == [method.name for method in ALL]
    assert len(set(names)) == len(names)
    assert found.primary == "MAE"
    stored = {row.name: row.bytes_per_person for row in found.rows}
    assert stored["base"] == stored["task LoRA"] == 0
    assert 0 < stored["merge only, posterior"] < stored["adapt only"] < stored["OPPU"]
    assert (
        stored["MTA"] == stored["merge only, posterior"] + stored["adapt only"]
    )  # the numbers of the merge, and the stack
    assert all(row.seconds > 0 for row in found.rows if row.name in {"MTA", "OPPU", "adapt only"})
    assert found.row("MTA").merge.ids.shape == (PEOPLE, 3)


def test_a_brief_comparison_has_what_its_guide_names(task):
    names = [method.name for method in standard_methods(TINY_RUN, CompareSettings(brief=True), task, 5)]
    merge = Merged(merge=TINY_RUN.merge).name
    assert names == ["global constant", "own constant", "task LoRA", "label bias", "rank 1 alone", "OPPU", merge, "MTA"]


def test_laplace_is_left_out_for_a_bank_without_calibration(task):
    names = [[m.name for m in standard_methods(TINY_RUN, CompareSettings(), task, 5, known)] for known in (True, False)]
    assert set(names[0]) - set(names[1]) == {"merge only, laplace"}


def test_controls_are_added_if_asked_for(task):
    def names(calibrated, **settings):
        methods = standard_methods(TINY_RUN, CompareSettings(**settings), task, 5, calibrated)
        return [method.name for method in methods]

    controls = ["population merge", "MTA, other person's shots"]
    for brief in (True, False):
        plain, both = (names(True, brief=brief, controls=found) for found in (False, True))
        assert [name for name in both if name not in plain] == controls
        assert [name for name in names(False, brief=brief, controls=True) if name in controls] == controls[1:]


def test_controls_of_one_person_are_refused_before_anything_is_computed(tiny):
    asked, settings = [], CompareSettings(shots=SHOTS, queries=QUERIES, controls=True)
    with pytest.raises(InputError, match="no other person to take shots from"):
        compare(*tiny, people_of(3, prefix="x"), settings, limit=1, encoder=HashEncoder(), on_method=asked.append)
    assert not asked


def test_an_encoder_with_other_weights_than_the_banks_is_refused(tiny):
    other = HashEncoder()
    other.fingerprint = "hash-2"
    with pytest.raises(BankMismatch, match="encoder 'hash' has other weights"):
        compare(*tiny, people_of(3, prefix="x"), CompareSettings(shots=SHOTS, queries=QUERIES), encoder=other)


def test_standard_methods_retrieve_one_anchor_from_a_bank_of_one(task):
    methods = standard_methods(TINY_RUN, CompareSettings(), task, 1)
    assert all(method.merge.k <= 1 for method in methods if method.name.startswith("merge only"))


def test_shots_never_include_queries(batch):
    for person, queries, whole in zip(batch.people, batch.queries, people_of(PEOPLE, prefix="x", seed=7)):
        assert person.items == whole.items[:SHOTS]
        assert queries == whole.items[SHOTS : SHOTS + QUERIES]
        assert max(item.time for item in person.items) < min(item.time for item in queries)
    assert [len(job.examples) for job in batch.jobs] == [SHOTS] * PEOPLE


def test_no_method_learns_from_the_answers_to_queries(tiny):
    people = people_of(PEOPLE, prefix="x", seed=7)
    methods = [method for method in ALL if method.name not in {"base", "task LoRA", "adapt only"}]
    methods += [Chosen(margin=0.0), LabelBias(), OtherPerson(over=MTA), Rag()]
    one, other = (
        run_methods(batch_of(tiny, group), methods) for group in (people, [with_other_answers(p) for p in people])
    )
    assert not torch.equal(one.row("MTA").people["MAE"], other.row("MTA").people["MAE"])  # the answers did change
    for row, again in zip(one.rows, other.rows):
        assert [a.texts for a in row.answers] == [a.texts for a in again.answers]
        assert all(a.scores is None or torch.equal(a.scores, b.scores) for a, b in zip(row.answers, again.answers))
        assert row.merge is None or torch.equal(row.merge.w, again.merge.w)


def test_queries_of_the_benchmark_replace_later_items(tiny):
    own = tuple(Item({"title": f"Asked {n}", "genres": "Drama", "rating": "2"}, is_query=True) for n in range(4))
    people = [dataclasses.replace(person, queries=own) for person in people_of(2, prefix="x")]
    batch = batch_of(tiny, people)
    assert batch.queries == [own[-QUERIES:]] * 2
    assert not any(set(own) & set(person.items) for person in batch.people)


@pytest.mark.parametrize("prefix", ["c", "t"])  # candidates for anchors, and people behind the task LoRA
def test_people_in_the_bank_are_refused(tiny, prefix):
    with pytest.raises(InputError, match="1 of 3 people are in the bank or its task LoRA"):
        batch_of(tiny, [*people_of(2, prefix="x"), *people_of(1, prefix=prefix)])


def test_people_are_measured_with_every_seed(batch):
    both = run_methods(batch, [ADAPT], seeds=(0, 1)).row("adapt only")
    first, second = (run_methods(batch, [ADAPT], seeds=(seed,)).row("adapt only") for seed in (0, 1))
    assert not torch.equal(torch.stack(first.nll), torch.stack(second.nll))
    assert torch.allclose(torch.stack(both.nll), (torch.stack(first.nll) + torch.stack(second.nll)) / 2)
    for metric, values in both.people.items():
        assert torch.equal(values, torch.cat([first.people[metric], second.people[metric]]))
    assert torch.equal(both.answers[0].scores, second.answers[0].scores)  # the last seed's answers


def test_a_method_that_diverges_is_an_error_and_no_result(batch):
    diverging = OneLora(name="OPPU", training=Training(lr=1e200, steps=3, batch_size=8))
    with pytest.raises(Diverged, match="OPPU, seed 0: a person's score is not finite"):
        run_methods(batch, [diverging])


def test_a_method_without_seed_runs_once(batch):
    seeds = []

    class Fixed(Method):
        name: str = "fixed"

        def run(self, batch, seed):
            seeds.append(seed)
            return Outcome([Answers(["3"] * QUERIES)] * PEOPLE, 0.0, 0.0)

    run_methods(batch, [Fixed()], seeds=(0, 1, 2))
    assert seeds == [0]


def test_evidence_is_gathered_once_and_counted_for_every_method_that_reads_it(batch, monkeypatch):
    gathered = []

    def watched(*args, **how):
        gathered.append(1)
        return gather(*args, **how)

    gather = context.gather_evidence
    monkeypatch.setattr(context, "gather_evidence", watched)
    rows = run_methods(batch, [Merged(name="one", merge=MTA.merge), Merged(name="two", merge=MTA.merge)]).rows
    assert len(gathered) == 1
    assert all(row.seconds >= batch.evidence_seconds > 0 for row in rows)


def test_a_record_has_a_persons_share_of_the_seconds_without_tokenizing(batch, monkeypatch):
    run = TaskLora.run

    def timed(self, batch, seed):
        assert "jobs" in vars(batch)  # tokenized before the method begins
        return dataclasses.replace(run(self, batch, seed), seconds=12.0)

    monkeypatch.setattr(TaskLora, "run", timed)
    workspace = SimpleNamespace(batch_of=lambda *_: batch, hashed=str, question_id=lambda *_: "q")
    asked = SimpleNamespace(
        part=None,
        seed=0,
        shots=SHOTS,
        batch=None,
        where=Where("task-lora", "task LoRA", "main", SHOTS, 0),
        method=TaskLora(),
    )
    assert [record.seconds for record in compute_records(workspace, asked)] == [12.0 / PEOPLE] * PEOPLE
    del vars(batch)["jobs"]
    run_methods(batch, [TaskLora(name="anew")])


def row_of(name, nll):
    nll = torch.tensor(nll, dtype=torch.float64)
    return Row(name, {"NLL": nll.mean(1)}, nll, 0.0, 0.0, None)


def test_paired_differences_and_who_is_worse_off(task):
    reference = [[1.0, 1.2, 0.8, 1.0], [2.0, 2.1, 1.9, 2.0], [1.0, 1.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5]]
    reference.insert(1, [1.5, 1.5, 1.5, 1.5])
    shift = [
        [0.10, 0.11, 0.09, 0.10],  # clearly worse
        [0.02, 0.06, 0.14, 0.18],  # 2.7 standard errors above zero: with four questions, that is uncertain
        [0.90, -0.80, 0.70, -0.50],  # worse on average, but uncertain
        [0.01, 0.01, 0.01, 0.01],  # certain, but below the threshold
        [-0.30, -0.30, -0.30, -0.30],
    ]
    ours = [[a + b for a, b in zip(*rows)] for rows in zip(reference, shift)]
    constant = Row("constant", {"MAE": torch.ones(5)}, None, 0.0, 0.0, None)
    found = Comparison(task, [row_of("reference", reference), row_of("ours", ours), constant])
    assert found.worse_off("ours", "reference") == (0.6, 0.2)
    assert found.worse_off("reference", "reference") is None
    assert found.worse_off("constant", "reference") is None
    means = torch.tensor(shift, dtype=torch.float64).mean(1)
    difference = found.difference("ours", "reference", "NLL")
    expected = bootstrap(means)
    assert (difference.mean, difference.low, difference.high) == pytest.approx(
        (expected.mean, expected.low, expected.high)
    )
    assert found.difference("reference", "ours", "NLL").mean == pytest.approx(-difference.mean)
    assert found.difference("constant", "reference", "NLL") is None
    assert found.score("constant", "NLL") is None
    assert found.score("constant", "MAE").mean == 1.0


# -- people who share items --------------------------------------------------------------------------------------------


def test_a_comparison_resamples_groups_of_people(tiny, task):
    people = [dataclasses.replace(p, group="g" if n < 2 else "") for n, p in enumerate(people_of(PEOPLE, prefix="x"))]
    found = run_methods(batch_of(tiny, people), [TaskLora(), Base()])
    values = found.row("base").people["NLL"] - found.row("task LoRA").people["NLL"]
    assert found.groups == ("g", "g", "")
    assert found.difference("base", "task LoRA", "NLL") == bootstrap(values, groups=found.groups) != bootstrap(values)


def test_one_group_of_people_gives_no_clear_difference(task):
    rows = [row_of("task LoRA", [[2.0]] * 3), row_of("MTA", [[1.0]] * 3)]
    assert "better in NLL" in headline(Comparison(task, rows))
    alone = Comparison(task, rows, ("g", "g", "g"))
    assert "no clear difference in NLL" in headline(alone)
    assert "Only 1 independent groups of people were tested" in " ".join(verdict(alone))


def test_people_who_share_items_with_bank_members_are_not_tested(tiny, caplog):
    base, bank = tiny
    member, *others = [*people_of(1, prefix="c"), *people_of(5, prefix="x", seed=7)]
    kin = [dataclasses.replace(one, group="c0") for one in (member, others[0])]
    evaluation = CompareSettings(shots=2, queries=2, policies=())
    found = compare(base, bank, [*kin, *others[1:]], evaluation, run=TINY_RUN, encoder=HashEncoder())
    assert [person.id for person in found.batch.people] == ["x1", "x2", "x3", "x4"]
    assert "1 people are left out, because they share items with people in the bank" in caplog.text


def test_queries_in_the_bank_are_only_counted_if_all_its_histories_are_given(tiny):
    base, bank = tiny
    everybody = [*people_of(12, prefix="c"), *people_of(4, prefix="t"), *people_of(2, prefix="x", seed=7)]
    given = {"some": everybody[1:], "none": everybody[-2:], "all": everybody}
    evaluation = CompareSettings(shots=2, queries=2, policies=(), brief=True)
    found = {
        name: compare(base, bank, people, evaluation, run=TINY_RUN, encoder=HashEncoder()).meta["queries_in_bank"]
        for name, people in given.items()
    }
    assert found["some"] is None
    assert found["none"] is None
    assert found["all"] is not None

"""Each method against a plain computation or an example computed by hand."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from batches import PEOPLE, POSTERIOR, batch_of, same
from batches import batch as batch  # the fixture
from conftest import people_of

from mta.config import MergeSettings, StackSettings, Training
from mta.data.history import Item, Person
from mta.data.shots_and_queries import has_enough_items, shots_and_queries
from mta.data.tasks import load_task
from mta.errors import InputError
from mta.evaluation.methods import Base, GlobalConstant, Merged, MergeThenAdapt, OwnConstant, TaskLora
from mta.evaluation.methods.plain import best_pull
from mta.evaluation.protocol import TestBatch
from mta.lora.batch import LoraBatch
from mta.personalize.evidence import gather_evidence
from mta.personalize.merge import Merge, coefficients, learn, merge_adapters, merge_loras
from mta_lab.experiments.evidence import kept_evidence
from mta_lab.experiments.facts import fidelity, relative_error
from mta_lab.methods.averaged import AveragedThenAdapt, merge_factor
from mta_lab.methods.by_layer import MergedByLayer, layer_groups
from mta_lab.methods.combined import Chosen, Pag, Rag, folds_of
from mta_lab.methods.named import method_class, method_names, parse_method
from mta_lab.methods.prompts import profiled
from mta_lab.methods.published import ITEMS_PER_ANCHOR, PerPcs, Prime, anchor_inputs, gate_of, mean_inputs
from mta_lab.methods.subset import MergedAmong
from mta_lab.policies import Learned

# -- names ---------------------------------------------------------------------------------------------------------


def test_parse_method_reads_a_name_or_settings():
    assert parse_method("base") == Base()
    found = parse_method({"method": "rag", "k": 3, "over": {"method": "mta", "merge": {"policy": "uniform", "k": 2}}})
    assert found == Rag(k=3, over=MergeThenAdapt(merge=MergeSettings(policy="uniform", k=2)))
    assert parse_method(found.model_dump(mode="json")) == found


def test_methods_from_papers_cite_them():
    cited = {"rag", "pag", "one-lora", "per-pcs", "prime", "merge", "mta", "task-lora", "merge-among", "mta-averaged"}
    cited |= {"calibrated-lora", "no-history"}
    kinds = {name: method_class(name) for name in method_names()}
    assert {name for name, kind in kinds.items() if kind.paper.startswith("https://")} == cited


# -- the protocol ------------------------------------------------------------------------------------------------------


def test_the_queries_are_the_last_items_for_every_number_of_shots(task):
    person = people_of(1, items=10)[0]
    queries = {shots_and_queries(task, person, m, 3, "last")[1] for m in (1, 4, 7)}
    assert queries == {person.items[-3:]}
    assert shots_and_queries(task, person, 2, 3, "last")[0] == person.items[5:7]
    assert shots_and_queries(task, person, 7, 3, "last")[0] == person.items[:7]
    assert not has_enough_items(task, person, 8, 3, "last")
    with pytest.raises(InputError, match="10 items; 8 shots and 3 queries"):
        shots_and_queries(task, person, 8, 3, "last")


def test_a_benchmark_query_is_the_last_item_if_queries_look_like_history_items():
    lamp3, lamp1 = load_task("lamp3"), load_task("lamp1")
    items = tuple(Item({"text": f"t{n}", "score": "4"}) for n in range(5))
    query = Item({"text": "asked", "score": "2"}, id="q", is_query=True)
    unknown = Item({"text": "asked"}, id="r", is_query=True)
    assert shots_and_queries(lamp3, Person("p", items, (query,)), 2, 3, "last") == (items[1:3], (*items[-2:], query))
    assert shots_and_queries(lamp3, Person("p", items, (unknown,)), 2, 3, "last")[1] == items[-3:]
    papers = tuple(Item({"title": "t", "abstract": "a"}) for _ in range(5))
    choice = Item({"title": "t", "ref1": "a", "ref2": "b", "reference": "[1]"}, id="q", is_query=True)
    assert shots_and_queries(lamp1, Person("p", papers, (choice,)), 3, 4, "last") == (papers[-3:], (choice,))
    assert not has_enough_items(lamp1, Person("p", papers), 3, 1, "last")
    for person, ask in ((Person("p", papers), "last"), (Person("p", papers[:2], (choice,)), "next")):
        with pytest.raises(InputError, match="3 shots and 1 queries were asked for"):
            shots_and_queries(lamp1, person, 3, 1, ask)
    assert has_enough_items(lamp3, Person("p", items, (query,)), 5, 12, "next")  # asked what the benchmark asks
    assert not has_enough_items(lamp3, Person("p", items[:2], (query,)), 5, 12, "next")


def test_evidence_of_a_fold_equals_evidence_gathered_from_its_shots(batch):
    folds, owners = folds_of(batch, 2)
    assert owners == [0, 0, 1, 1, 2, 2]
    anew = gather_evidence(batch.base, folds.jobs, batch.bank.device_anchors, batch.bank.task_adapters)
    found = folds.evidence
    torch.testing.assert_close(found.anchor_loglik, anew.anchor_loglik)
    torch.testing.assert_close(found.pooled_loglik, anew.pooled_loglik)
    assert found.tokens.tolist() == anew.tokens.tolist()
    settings = MergeSettings(policy="ridge", k=0, options={"strength": 1.0})
    anew = TestBatch(batch.context, folds.people, folds.queries, batch.task)
    torch.testing.assert_close(folds.merge(settings, 0)[0].w, anew.merge(settings, 0)[0].w)


def test_folds_hold_out_every_shot_once_and_never_train_on_it(batch):
    folds, owners = folds_of(batch, 3)
    for u, person in enumerate(batch.people):
        mine = [row for row, owner in enumerate(owners) if owner == u]
        held = [item for row in mine for item in folds.queries[row]]
        assert sorted(map(id, held)) == sorted(map(id, person.items))
        for row in mine:
            assert not set(map(id, folds.queries[row])) & set(map(id, folds.people[row].items))


def test_evidence_is_read_again_by_another_run(tiny, tmp_path, monkeypatch):
    first = batch_of(tiny, evidence_of=partial(kept_evidence, tmp_path))
    found, seconds = first.evidence, first.evidence_seconds
    monkeypatch.setattr("mta.evaluation.context.gather_evidence", None)
    again = batch_of(tiny, evidence_of=partial(kept_evidence, tmp_path))
    assert torch.equal(again.evidence.loglik, found.loglik)
    assert torch.equal(again.evidence.labels.scores, found.labels.scores)
    assert again.evidence_seconds == seconds


def test_every_method_that_reads_encodings_takes_their_seconds(batch):
    """Whichever method is first."""
    batch.__dict__["_similarity"] = batch.similarity, 1000.0
    nearest = [Merged(merge=MergeSettings(policy="similarity", k=k)) for k in (1, 2)]
    few = MergedAmong(merge=MergeSettings(policy="similarity", k=1), anchors=2)
    assert min(method.run(batch, 0).seconds for method in (*nearest, few)) >= 1000
    assert Merged(merge=MergeSettings(policy="uniform", k=0)).run(batch, 0).seconds < 1000


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_a_shot_sees_earlier_shots_and_a_query_sees_all_shots(batch):
    longer = profiled(batch, 9)

    def shown(item):
        return sorted(item.fields["profile"].removesuffix(". ").split(", and "))

    for person, with_profile, queries in zip(batch.people, longer.people, longer.queries):
        texts = [batch.task.sentence(item) for item in person.items]
        for n, item in enumerate(with_profile.items):
            assert shown(item) == (sorted(texts[:n]) if n else [""])
        assert all(shown(query) == sorted(texts) for query in queries)


def test_rag_with_zero_items_equals_the_method_below(batch):
    assert same(Rag(k=0, over=TaskLora()).run(batch, 0), TaskLora().run(batch, 0))
    assert not same(Rag(k=2, over=TaskLora()).run(batch, 0), TaskLora().run(batch, 0))


def test_mta_with_rag_keeps_the_merge_of_the_plain_prompts(batch):
    plain = MergeThenAdapt(merge=POSTERIOR)
    with_rag = Rag(k=1, over=plain).run(batch, 0)
    assert torch.equal(with_rag.merge.w, plain.run(batch, 0).merge.w)
    assert with_rag.bytes_per_person > plain.run(batch, 0).bytes_per_person  # the shots must be stored


def test_pag_changes_the_answers_and_stores_bytes(batch):
    found = Pag(k=0, tokens=4).run(batch, 0)
    assert not same(found, Base().run(batch, 0))
    assert found.bytes_per_person > 0


# -- merges ------------------------------------------------------------------------------------------------------------


def test_layer_groups_have_equal_depth():
    names = [f"model.layers.{n}.mlp.up_proj" for n in range(6)]
    assert layer_groups(names, 3) == [0, 0, 1, 1, 2, 2]
    assert layer_groups(names, 1) == [0] * 6
    assert layer_groups(names[:2], 5) == [0, 1]


def test_gradients_of_groups_sum_to_the_gradient_of_all_layers(batch):
    """One small step of plain descent: the shifts of the groups sum to the shift without groups."""
    training = Training(lr=1e-4, steps=1, batch_size=64, eps=1e6, clip=1e9)
    start, _ = batch.merge(POSTERIOR, 0)
    bank = batch.bank
    how = (batch.base, batch.jobs, bank.device_anchors, bank.task_adapters, start, training)
    plain = learn(*how).w - start.w
    groups = layer_groups(bank.device_anchors.names, 2)
    apart = learn(*how, groups=groups).w - start.w[:, None]
    firsts = [groups.index(g) for g in range(2)]
    torch.testing.assert_close(apart[:, firsts].sum(1), plain, rtol=1e-4, atol=1e-14)


def test_merged_by_layer_has_w_per_layer_and_stores_w_per_group(batch):
    found = MergedByLayer(groups=2).run(batch, 0)
    assert found.merge.w.shape == (PEOPLE, len(batch.bank.device_anchors.names), len(batch.bank))
    one = MergedByLayer(groups=1).run(batch, 0).bytes_per_person
    assert 1.2 * one < found.bytes_per_person < 2.2 * one


@pytest.mark.parametrize("start", ["zero", "posterior"])
def test_merged_by_one_layer_group_is_the_learned_policy(batch, start):
    settings = POSTERIOR.model_copy(update={"policy": "learned", "options": {"start": start}})
    one, other = (
        MergedByLayer(groups=1, merge=settings, learned=Learned(start=start)).run(batch, 0).merge,
        Merged(merge=settings).run(batch, 0).merge,
    )
    torch.testing.assert_close(one.w[:, 0], other.w)
    assert not MergedByLayer(merge=MergeSettings(policy="learned", k=8)).fits(batch.task, 4, True)
    assert not Merged(merge=MergeSettings(policy="laplace", k=2)).fits(batch.task, 4, True)  # it merges all anchors


def test_a_smaller_bank_merges_only_its_own_anchors(batch):
    found = MergedAmong(merge=POSTERIOR, anchors=2).run(batch, 0).merge
    bank, chosen = batch.bank, sorted(found.ids[0].tolist())
    assert found.ids.sort(dim=1).values.tolist() == [chosen] * PEOPLE
    lora = bank.anchors.select(chosen)
    evidence = gather_evidence(batch.base, batch.jobs, lora, bank.task_adapters)  # of these anchors alone
    expected = coefficients(POSTERIOR, batch.similarity[:, chosen], evidence)
    in_order = found.ids.argsort(dim=1), expected.ids.argsort(dim=1)
    torch.testing.assert_close(found.w.gather(1, in_order[0]), expected.w.gather(1, in_order[1]))


def test_a_smaller_bank_has_the_most_active_anchor_of_each_cluster(batch):
    """Of three anchors in two clusters, one of the two that are together is left out: the less active one."""

    def chosen(*items):
        bank = replace(batch.bank, info=batch.bank.info.model_copy(update={"items": items}))
        other = TestBatch(replace(batch.context, bank=bank), batch.people, batch.queries, batch.task)
        return set(
            MergedAmong(merge=MergeSettings(policy="uniform", k=0), anchors=2).run(other, 0).merge.ids[0].tolist()
        )

    ascending, descending = chosen(1, 2, 3), chosen(3, 2, 1)
    ((less,), (more,)) = descending - ascending, ascending - descending
    assert less < more


def test_a_smaller_bank_needs_a_policy_that_can_merge_it(batch):
    for settings in (MergeSettings(), MergeSettings(policy="laplace"), MergeSettings(policy="learned", k=0)):
        with pytest.raises(ValueError, match="anchors: needs merge: with a policy"):
            parse_method({"method": "merge-among", "anchors": 2, "merge": settings.model_dump()})
    with pytest.raises(ValueError, match="k is 3, but only 2 anchors"):
        parse_method({"method": "merge-among", "anchors": 2, "merge": {"policy": "loss", "k": 3}})
    uniform = MergedAmong(merge=MergeSettings(policy="uniform", k=0), anchors=2)
    assert uniform.run(batch, 0).merge.w.tolist() == [[0.5, 0.5]] * PEOPLE
    assert "_evidence" not in vars(batch)  # was not gathered


def test_a_method_fits_where_all_methods_within_it_fit():
    ridge, text = Merged(merge=MergeSettings(policy="ridge", k=0)), load_task("lamp4")
    for method in (ridge, Rag(over=ridge), Chosen(candidates=(TaskLora(), ridge))):
        assert not method.fits(text, 4, calibrated=True)
        assert method.fits(load_task("lamp3"), 4, calibrated=True)


def test_prime_never_increases_the_loss(batch):
    method = Prime(k=2, budget=9)
    found = method.run(batch, 0)
    settings = MergeSettings(policy="uniform", k=2)
    begun, _ = batch.merge(settings, 0)
    before, after = (Prime._losses(batch, merge, settings) for merge in (begun, found.merge))
    assert (after <= before + 1e-9).all()
    assert (after < before - 1e-9).any()
    assert found.merge.w.abs().max() <= method.bound
    assert torch.equal(method.run(batch, 0).merge.w, found.merge.w)


def test_prime_computes_no_more_people_together_than_fit_the_memory(batch, monkeypatch):
    settings = MergeSettings(policy="uniform", k=2)
    merge, _ = batch.merge(settings, 0)
    whole = Prime._losses(batch, merge, settings)

    def merged(bank, merge):
        together.append(len(merge.ids))
        return merge_adapters(bank, merge)

    alone, together = tuple((u,) for u in range(PEOPLE)), []
    monkeypatch.setattr(TestBatch, "plan", lambda *given, plan=TestBatch.plan: replace(plan(*given), cohorts=alone))
    monkeypatch.setattr("mta_lab.methods.published.merge_adapters", merged)
    torch.testing.assert_close(Prime._losses(batch, merge, settings), whole)
    assert together == [1] * PEOPLE


def test_per_pcs_merges_k_anchors_per_module_with_weights_that_sum_to_one(batch):
    found = PerPcs(k=2).run(batch, 0)
    w = found.merge.w
    assert w.shape == (PEOPLE, len(batch.bank.device_anchors.names), len(batch.bank))
    torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]))
    assert ((w > 0).sum(-1) == 2).all()


def test_an_anchor_is_its_own_nearest_gate(batch):
    """A person with exactly an anchor's inputs at a module has that anchor as the nearest."""
    people = [anchor.latest(ITEMS_PER_ANCHOR) for anchor in batch.anchors]
    twin = TestBatch(batch.context, people, [()] * len(people), batch.task)
    found = mean_inputs(twin.base, [job.examples for job in twin.jobs], twin.bank.task_adapters)
    for name, means in anchor_inputs(twin).items():
        center, gate = gate_of(means)
        fit = torch.nn.functional.normalize(found[name] - center, dim=1) @ gate.T
        assert fit.argmax(1).tolist() == list(range(len(batch.anchors)))


def test_per_pcs_needs_the_anchors_histories(tiny):
    with pytest.raises(InputError, match="needs the anchors' histories"):
        PerPcs().run(batch_of(tiny, anchors=()), 0)


def test_mean_inputs_do_not_depend_on_padding_or_batch(batch):
    jobs = [job.examples for job in batch.jobs]
    together = mean_inputs(batch.base, jobs, batch.bank.task_adapters)
    alone = mean_inputs(batch.base, jobs[:1], batch.bank.task_adapters, rows_per_batch=1)
    for name, means in together.items():
        torch.testing.assert_close(means[:1], alone[name])


# -- constants ---------------------------------------------------------------------------------------------------------


def ratings_of(*labels):
    items = [Item({"title": f"Film {n}", "genres": "Drama", "rating": label}) for n, label in enumerate(labels)]
    return Person.of("-".join(labels), items)


def test_shares_of_labels_are_those_of_the_shots_pulled_to_everybodys(batch):
    known, asked = [ratings_of(*"11112"), ratings_of(*"55554")], [ratings_of("3").items] * 2
    alone = TestBatch(batch.context, known, asked, batch.task)
    (one, other) = (answers.scores.exp()[0] for answers in OwnConstant().run(alone, 0).answers)
    (everybody, _) = (answers.scores.exp()[0] for answers in GlobalConstant().run(alone, 0).answers)
    torch.testing.assert_close(everybody, torch.tensor([5, 2, 1, 2, 5]).double() / 15)
    counts = torch.tensor([4, 1, 0, 0, 0]).double()
    pull = best_pull(torch.stack([counts, counts.flip(0)]), everybody)
    torch.testing.assert_close(one, (counts + pull * everybody) / (5 + pull))
    torch.testing.assert_close(one, other.flip(0))
    assert [a.texts for a in OwnConstant().run(alone, 0).answers] == [["1"], ["5"]]


def test_constants_come_from_the_task_people_and_not_from_the_tested(tiny):
    """Only as many items of a task person are looked at for the pull as the tested people have shots."""
    task_people = [ratings_of(*"2222213454"), ratings_of(*"3333312455")]
    context = replace(batch_of(tiny).context, task_people=task_people)
    known = TestBatch(
        context, [ratings_of(*"11112"), ratings_of(*"55554")], [ratings_of("3").items] * 2, batch_of(tiny).task
    )
    everybody = torch.tensor([3, 7, 7, 4, 4]).double() / 25
    constant, own = (method.run(known, 0).answers[0].scores.exp()[0] for method in (GlobalConstant(), OwnConstant()))
    torch.testing.assert_close(constant, everybody)
    firsts = torch.tensor([[0, 5, 0, 0, 0], [0, 0, 5, 0, 0]]).double()
    pull = best_pull(firsts, everybody)
    whole = torch.tensor([[1, 5, 1, 2, 1], [1, 1, 5, 1, 2]]).double()
    assert pull != best_pull(whole, everybody)
    torch.testing.assert_close(own, (torch.tensor([4, 1, 0, 0, 0]).double() + pull * everybody) / (5 + pull))


def test_shares_are_pulled_as_far_as_people_are_alike():
    everybody = torch.full((5,), 0.2).double()
    unlike, alike = 8 * torch.eye(5).double(), torch.full((5, 5), 2.0).double()
    assert best_pull(unlike, everybody) < 1 < best_pull(alike, everybody)


def test_with_one_shot_chosen_keeps_the_default(tiny):
    batch = batch_of(tiny, shots=1)
    assert set(Chosen(candidates=(TaskLora(), Merged(merge=POSTERIOR))).run(batch, 0).chosen) == {"task LoRA"}


def test_averaged_merges_average_both_factors_apart(batch):
    bank, ids, w = batch.bank, torch.tensor([[0, 1], [2, 0]]), torch.tensor([[0.5, 0.5], [0.9, 0.1]]).double()
    merged = merge_factor(bank.anchors, ids, w)
    for u in range(2):
        for name, (a, b) in bank.anchors.factors.items():
            mean_a, mean_b = (sum(w[u, k].to(t) * t[n] for k, n in enumerate(ids[u].tolist())) for t in (a, b))
            torch.testing.assert_close(merged.delta(name)[u], bank.anchors.scale * mean_b @ mean_a)
    twins = merge_factor(bank.anchors, torch.tensor([[1, 1]]), torch.tensor([[0.5, 0.5]]))
    for name in bank.anchors.names:  # PEFT's linear mode doubles them
        torch.testing.assert_close(twins.delta(name)[0], bank.anchors.delta(name)[1])


def test_a_stack_is_trained_over_averaged_merges(batch):
    settings = MergeSettings(policy="uniform", k=2)
    none = StackSettings(training=Training(steps=0))
    averaged, exact = (
        method(merge=settings, stack=none).run(batch, 0).answers for method in (AveragedThenAdapt, MergeThenAdapt)
    )
    assert not torch.allclose(averaged[0].scores, exact[0].scores)
    one = MergeSettings(policy="top1", k=1)
    averaged, exact = (
        method(merge=one, stack=none).run(batch, 0).answers for method in (AveragedThenAdapt, MergeThenAdapt)
    )
    torch.testing.assert_close(averaged[0].scores, exact[0].scores)


# -- facts -------------------------------------------------------------------------------------------------------------


def test_relative_error_equals_the_error_of_dense_updates(batch):
    bank = batch.bank
    merge = Merge(torch.tensor([[0, 1], [2, 0]]), torch.tensor([[0.5, 0.5], [0.9, -0.3]]))
    exact = merge_loras(bank.anchors, merge)
    factor = merge_factor(bank.anchors, merge.ids, merge.w)

    def dense(batch: LoraBatch):
        return [batch.scale * (b @ a) for a, b in batch.factors.values()]

    lost = sum((x - y).double().square().sum((1, 2)) for x, y in zip(dense(factor), dense(exact)))
    whole = sum(y.double().square().sum((1, 2)) for y in dense(exact))
    torch.testing.assert_close(relative_error(factor, exact), (lost / whole).sqrt(), rtol=1e-5, atol=1e-8)
    assert fidelity(bank, merge).keys() == {"svd", "factor"}

"""The choice among methods for each person: by their shots alone."""

import pytest
import torch
from batches import POSTERIOR
from batches import batch as batch  # the fixture
from pydantic import ValidationError

from mta.config import Training
from mta.errors import InputError
from mta.evaluation.methods import Merged, OneLora, Outcome, TaskLora
from mta.evaluation.metrics import Answers, query_nll
from mta_lab.methods.combined import Chosen, folds_of, pick
from mta_lab.methods.named import parse_method
from mta_lab.methods.prompts import profiled


def test_pick_needs_a_gain_above_the_margin():
    calm = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.9, 0.9, 0.9, 0.9], [0.8, 0.8, 0.8, 0.8]])
    assert pick(calm, 1.0) == 2
    noisy = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 1.9, 0.1, 1.8]])
    assert pick(noisy, 0.0) == 1
    assert pick(noisy, 1.0) == 0
    assert pick(torch.tensor([[1.0, 1.0], [1.1, 1.1]]), 0.0) == 0
    assert pick(torch.tensor([[1.0], [0.5]]), 1.0) == 1


def test_chosen_returns_the_answers_of_each_persons_candidate(batch):
    candidates = (TaskLora(), Merged(merge=POSTERIOR), OneLora(name="harmful", training=Training(lr=0.5, steps=3)))
    method = Chosen(candidates=candidates, margin=0.0)
    found = method.run(batch, 0)
    every = {c.name: c.run(batch, 0) for c in candidates}
    folds, owners = folds_of(batch, method.folds)
    held_out = [c.run(folds, 0).answers for c in candidates]
    for u, name in enumerate(found.chosen):
        rows = [row for row, owner in enumerate(owners) if owner == u]
        losses = [torch.cat([query_nll(folds.task, one[row], folds.golds[row]) for row in rows]) for one in held_out]
        assert name == candidates[pick(torch.stack(losses), 0.0)].name
        assert torch.equal(found.answers[u].scores, every[name].answers[u].scores)
    assert set(Chosen(candidates=candidates, margin=1e9).run(batch, 0).chosen) == {"task LoRA"}


def test_an_outcome_is_computed_once_per_panel(batch, monkeypatch):
    candidates = (TaskLora(), Merged(merge=POSTERIOR))
    before = [candidate.outcome(batch, 0) for candidate in candidates]
    ran = []
    monkeypatch.setattr(TaskLora, "run", lambda self, asked, seed: ran.append(asked) or before[0])
    assert TaskLora().outcome(batch, 0) is before[0]
    assert not ran
    assert TaskLora(name="by another name").outcome(batch, 0) is before[0]
    TaskLora().outcome(profiled(batch, 1), 0)
    assert len(ran) == 1  # another batch has other prompts


@pytest.mark.parametrize("candidate", ["own-constant", "other-person", {"method": "rag", "over": "other-person"}])
def test_a_method_that_reads_other_people_cannot_be_chosen(candidate):
    """In the folds of a choice, other rows hold the shots that a row holds out."""
    with pytest.raises(ValidationError, match="reads other people"):
        parse_method({"method": "choice", "candidates": ["task-lora", candidate]})


class Silent(TaskLora):
    """Gives no probabilities."""

    name: str = "silent"

    def run(self, batch, seed):
        return Outcome([Answers(["3"] * len(items)) for items in batch.queries], 0.0, 0.0)


def test_no_choice_is_made_where_prompts_show_other_shots(batch, monkeypatch):
    monkeypatch.setattr(type(batch.bank), "history", 4)
    with pytest.raises(InputError, match="prompts show earlier items"):
        folds_of(batch, 2)


def test_a_method_without_probabilities_cannot_be_chosen(batch):
    with pytest.raises(InputError, match="'silent' gives no probabilities"):
        Chosen(candidates=(TaskLora(), Silent(), Merged(merge=POSTERIOR))).run(batch, 0)

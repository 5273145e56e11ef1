"""Answering a batch's queries, in the same way for every method."""

from types import SimpleNamespace

import pytest
import torch
from tiny import base_of, random_loras

from mta.config import Run
from mta.data.history import Item
from mta.data.tasks import Task
from mta.evaluation.methods.method import answer
from mta.lora.layers import PerPerson
from mta.training.scoring import log_likelihood

FREE = Task(name="free", item={"prompt": "{a}", "target": "b", "cut": ["a"]}, text="{a}", metric="rouge")


@pytest.mark.parametrize(("limit", "expected"), [(5, 5), (70, 70), (None, 128)])
def test_a_generated_answer_has_the_length_limit_of_its_task(limit, expected):
    base, letter = base_of(), base_of().tokenizer.convert_tokens_to_ids("a")

    def only_one_letter(_, __, logits):
        return torch.nn.functional.one_hot(torch.tensor(letter), logits.shape[-1]).to(logits).expand_as(logits)

    base.model.get_output_embeddings().register_forward_hook(only_one_letter)
    task = FREE.model_copy(update={"answer_tokens": limit})
    batch = SimpleNamespace(task=task, base=base, queries=[[Item({"a": "x", "b": "y"})]], write_texts=True, run=Run())
    (found,) = answer(batch, [0], [])
    assert found.texts == ["a" * expected]


def test_texts_and_losses_are_each_persons_own_and_losses_are_per_token():
    """Of two people in one batch, with adapters and answers of different length; the second is asked alone, too."""
    base = base_of()
    queries = [[Item({"a": "one", "b": "x"}), Item({"a": "two", "b": "longer"})], [Item({"a": "one", "b": "yes"})]]
    batch = SimpleNamespace(
        run=Run(), task=FREE.model_copy(update={"answer_tokens": 6}), base=base, queries=queries, write_texts=True
    )
    loras = random_loras(base, 2)
    first, second = answer(batch, [0, 1], [PerPerson(loras)])
    (alone,) = answer(batch, [1], [PerPerson(loras.select([1]))])
    (other,) = answer(batch, [1], [PerPerson(loras.select([0]))])
    assert second.texts == alone.texts != other.texts
    torch.testing.assert_close(second.nll, alone.nll)
    for found, items, u in ((first, queries[0], 0), (second, queries[1], 1)):
        for loss, item in zip(found.nll, items):
            example = base.prompts.example(batch.task, item)
            ((total,),) = log_likelihood(base, [[example]], [PerPerson(loras.select([u]))])
            torch.testing.assert_close(loss, -total.double() / len(example.target))

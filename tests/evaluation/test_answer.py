"""Answering a panel's queries, in the same way for every method."""

from types import SimpleNamespace

import pytest
import torch
from tiny import base_of

from mta.data.history import Item
from mta.data.tasks import Task
from mta.evaluation.methods.method import answer

FREE = Task(name="free", item={"prompt": "{a}", "target": "b", "cut": ["a"]}, text="{a}", metric="rouge")


@pytest.mark.parametrize(("limit", "expected"), [(5, 5), (70, 70), (None, 128)])
def test_a_generated_answer_has_the_length_limit_of_its_task(limit, expected):
    base, letter = base_of(), base_of().tokenizer.convert_tokens_to_ids("a")

    def only_one_letter(_, __, logits):
        return torch.nn.functional.one_hot(torch.tensor(letter), logits.shape[-1]).to(logits).expand_as(logits)

    base.model.get_output_embeddings().register_forward_hook(only_one_letter)
    task = FREE.model_copy(update={"answer_tokens": limit})
    panel = SimpleNamespace(task=task, base=base, queries=[[Item({"a": "x", "b": "y"})]], write_texts=True)
    (found,) = answer(panel, [0], [])
    assert found.texts == ["a" * expected]

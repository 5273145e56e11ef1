"""Test batches whose prompts show a person's earlier items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mta.evaluation.protocol import TestBatch
from mta_lab.bm25 import with_profiles


def profiled(batch: TestBatch, k: int, before: Sequence[str] = ()) -> TestBatch:
    """Return the batch with ``before`` and each person's ``k`` nearest earlier shots at the start of every prompt.

    A shot sees the shots before it, a query sees all shots. Merges stay those of the plain prompts, which the bank
    was trained on. Only with ``batch.retrieve``, where the bank was trained on such prompts, they are fitted again.
    """
    task, texts = batch.bank.task, list(before) or [""] * len(batch.people)
    whole = [replace(person, queries=asked) for person, asked in zip(batch.people, batch.queries)]
    people = [with_profiles(task, person, k, text) for person, text in zip(whole, texts)]
    merges_from = None if batch.retrieve else batch.merges_from or batch
    return replace(
        batch,
        people=[replace(one, queries=()) for one in people],
        queries=[one.queries for one in people],
        merges_from=merges_from,
        evidence_of_shots=None,
    )

"""Scores of labels along the tree of their beginnings."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mta.serving.embedded.label_walk import LabelWalk

VOCABULARY = 5
LABELS = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4), min_size=1, max_size=6)


def logits_after(tokens):
    """Logits that depend on all tokens."""
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31))


@given(LABELS)
def test_scores_equal_those_of_each_label_alone_and_no_beginning_is_computed_twice(labels):
    walk, held, computed = LabelWalk(labels), [], [()]
    while step := walk.next(logits_after(held)):
        keep, token = step
        held = [*held[:keep], token]
        computed.append(tuple(held))
    alone = [
        sum(float(logits_after(label[:n]).log_softmax(-1)[token]) for n, token in enumerate(label)) for label in labels
    ]
    assert walk.scores == pytest.approx(alone, abs=1e-5)
    assert len(set(computed)) == len(computed) == len({tuple(la[:n]) for la in labels for n in range(len(la))})

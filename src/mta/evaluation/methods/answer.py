"""Ask a model the panel's queries, in the same way for every method that uses a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mta.data.history import Item
from mta.evaluation.metrics import Answers, from_scores
from mta.evaluation.protocol import Panel
from mta.lora.layers import Adapters
from mta.model.generate import generate
from mta.training.scoring import label_scores, log_likelihood


def answer(panel: Panel, people: Sequence[int], adapters: Sequence[Adapters]) -> list[Answers]:
    """Answer the queries of some of the panel's people with ``adapters``, which have the order of ``people``.

    Labels are scored if the task has labels. Otherwise the text is decoded greedily, and the likelihood of the gold
    text is returned too.
    """
    task, base, queries = panel.task, panel.base, [panel.queries[i] for i in people]
    if all(task.labels_of(item) for items in queries for item in items):
        return [from_scores(task, scores) for scores in label_scores(base, task, queries, adapters)]
    nll = _gold_nll(panel, queries, adapters)
    texts = _texts(panel, queries, adapters) if panel.write_texts else [[""] * len(items) for items in queries]
    return [Answers(written, nll=surprise) for written, surprise in zip(texts, nll)]


def _gold_nll(panel: Panel, queries: Sequence[Sequence[Item]], adapters: Sequence[Adapters]) -> list[Tensor]:
    """Return minus the log probability of the gold text per token, for each query of each person."""
    jobs = [[panel.base.prompts.example(panel.task, item) for item in items] for items in queries]
    found = log_likelihood(panel.base, jobs, adapters)
    lengths = [scores.new_tensor([len(e.target) for e in job]).double() for scores, job in zip(found, jobs)]
    return [-scores.double() / tokens for scores, tokens in zip(found, lengths)]


def _texts(panel: Panel, queries: Sequence[Sequence[Item]], adapters: Sequence[Adapters]) -> list[list[str]]:
    base, longest = panel.base, panel.base.prompts.answer_tokens(panel.task)
    rows = [(person, item) for person, items in enumerate(queries) for item in items]
    prompts = [base.prompts.prompt(panel.task, item, reserve=longest).tokens for _, item in rows]
    written = generate(base, prompts, [person for person, _ in rows], adapters, max_new_tokens=longest)
    texts: list[list[str]] = [[] for _ in queries]
    for (person, _), tokens in zip(rows, written):
        texts[person].append(base.prompts.decode(tokens))
    return texts

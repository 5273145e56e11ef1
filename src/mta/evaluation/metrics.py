"""What is measured on one person's queries. Every metric is a mean over queries; people are weighed alike later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mta.data.tasks.task import Task
from mta.system.extras import require

BETTER_LOW = frozenset({"MAE", "MAE (median)", "RMSE", "NLL"})


@dataclass(frozen=True, slots=True)
class Answers:
    """A method's answers to one person's queries.

    Texts; label scores (queries, labels) where there are labels; else ``nll`` (queries,), minus the log probability of
    the gold text, per token.
    """

    texts: Sequence[str]
    scores: Tensor | None = None
    nll: Tensor | None = None


def primary(task: Task) -> str:
    """The metric named beforehand for a task."""
    return {"mae": "MAE", "accuracy": "accuracy", "rouge": "ROUGE-L"}[task.metric]


def from_scores(task: Task, scores: Tensor) -> Answers:
    """Answers by argmax over label scores."""
    labels = task.labels or ()
    return Answers([labels[i] for i in scores.argmax(1).tolist()], scores)


def measure(task: Task, answers: Answers, golds: Sequence[str]) -> dict[str, float]:
    """All metrics of a task for one person: primary first. Values are means over the queries."""
    nll = query_nll(task, answers, golds)
    told = {} if nll is None else {"NLL": float(nll.mean())}
    if task.metric == "rouge":
        return _rouge(answers.texts, golds) | told
    right = [float(text == gold) for text, gold in zip(answers.texts, golds)]
    found = {"accuracy": sum(right) / len(right)}
    if task.metric == "mae":
        found = _rating(task, answers, golds) | found
    return found | told


def query_nll(task: Task, answers: Answers, golds: Sequence[str]) -> Tensor | None:
    """Surprise at the gold, query by query: (queries,); among the labels, or per token of free text.

    None where a method tells no probabilities.
    """
    if answers.scores is None:
        return answers.nll
    gold = torch.tensor([(task.labels or ()).index(text) for text in golds])
    return -answers.scores.double().log_softmax(1)[torch.arange(len(gold)), gold]


def median_labels(task: Task, scores: Tensor) -> list[str]:
    """The median of the label distribution, which minimises the expected absolute error."""
    labels = sorted(range(len(task.labels or ())), key=lambda i: float((task.labels or ())[i]))
    shares = scores.double().softmax(1)[:, labels].cumsum(1)
    return [(task.labels or ())[labels[i]] for i in (shares < 0.5).sum(1).clamp_max(len(labels) - 1).tolist()]


def _rating(task: Task, answers: Answers, golds: Sequence[str]) -> dict[str, float]:
    errors = [_distance(task, text, gold) for text, gold in zip(answers.texts, golds)]
    found = {"MAE": sum(errors) / len(errors)}
    if answers.scores is not None:
        medians = median_labels(task, answers.scores)
        found["MAE (median)"] = sum(_distance(task, text, gold) for text, gold in zip(medians, golds)) / len(golds)
    return found | {"RMSE": (sum(e * e for e in errors) / len(errors)) ** 0.5}


def _distance(task: Task, text: str, gold: str) -> float:
    """|prediction - gold|; what is no number counts as the extreme farther from the gold, as in LaMP."""
    values = [float(label) for label in task.labels or ()]
    try:
        distance = abs(float(text) - float(gold))
    except ValueError:
        distance = float("nan")
    return distance if math.isfinite(distance) else max(abs(end - float(gold)) for end in (min(values), max(values)))


def _rouge(texts: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    require("eval", "rouge-score")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    found = [scorer.score(gold, text) for text, gold in zip(texts, golds)]
    return {
        name: sum(f[key].fmeasure for f in found) / len(found)
        for name, key in (("ROUGE-L", "rougeL"), ("ROUGE-1", "rouge1"))
    }

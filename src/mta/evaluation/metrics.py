"""Metrics of one person's queries. Every metric is a mean over queries; statistics.py averages over people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mta.data.tasks.task import Task
from mta.system.extras import require

BETTER_LOW = frozenset({"MAE", "MAE (median)", "RMSE", "NLL"})


@dataclass(frozen=True, slots=True)
class Answers:
    """A method's answers to one person's queries.

    ``scores`` (queries, labels) are label scores. For free text ``nll`` (queries,) is minus the log probability of the
    gold text, per token. A method without probabilities gives neither.
    """

    texts: Sequence[str]
    scores: Tensor | None = None
    nll: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PersonScore:
    """Metrics of one person, primary first, and the NLL of each query (queries,) if there are probabilities."""

    metrics: Mapping[str, float]
    nll: Tensor | None


def primary(task: Task) -> str:
    """Return the primary metric of a task."""
    return {"mae": "MAE", "accuracy": "accuracy", "rouge": "ROUGE-L"}[task.metric]


def from_scores(task: Task, scores: Tensor) -> Answers:
    """Return answers by argmax over label scores."""
    labels = task.labels or ()
    return Answers([labels[i] for i in scores.argmax(1).tolist()], scores)


def measure(task: Task, answers: Answers, golds: Sequence[str], written: bool = True) -> PersonScore:
    """Return all metrics of a task for one person; without ``written`` only the NLL of free text."""
    nll = query_nll(task, answers, golds)
    surprise = {} if nll is None else {"NLL": float(nll.mean())}
    if answers.nll is not None and not written:
        return PersonScore(surprise, nll)
    if task.metric == "rouge":
        return PersonScore(_rouge(answers.texts, golds) | surprise, nll)
    right = [float(text == gold) for text, gold in zip(answers.texts, golds)]
    found = {"accuracy": sum(right) / len(right)}
    if task.metric == "mae":
        found = _rating(task, answers, golds) | found
    return PersonScore(found | surprise, nll)


def query_nll(task: Task, answers: Answers, golds: Sequence[str]) -> Tensor | None:
    """Return the NLL of the gold answer of each query, (queries,): among the labels, or per token of free text.

    None if the answers hold no probabilities.
    """
    if answers.scores is None:
        return answers.nll
    gold = torch.tensor([(task.labels or ()).index(text) for text in golds])
    return -answers.scores.double().log_softmax(1)[torch.arange(len(gold)), gold]


def median_labels(task: Task, scores: Tensor) -> list[str]:
    """Return the median of each label distribution, which minimizes the expected absolute error."""
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
    """Return |prediction - gold|; text that is not a number counts as the farther end of the scale, as in LaMP."""
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

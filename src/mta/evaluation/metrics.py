"""Metrics of one person's queries, which statistics.py averages over people."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mta.data.tasks.task import Task
from mta.system.extras import require

_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")  # kana and Chinese characters
BETTER_LOW = frozenset({"MAE", "MAE (median)", "RMSE", "NLL"})


COLUMNS = {  # by the task's metric: the scores of a person; methods are judged by the first
    "mae": ("MAE", "MAE (median)", "accuracy"),
    "accuracy": ("accuracy",),
    "rouge": ("ROUGE-L", "ROUGE-1", "ROUGE-L, stemmed", "ROUGE-1, stemmed"),
}
MEANING = {
    "MAE": "the mean distance from the true rating",
    "accuracy": "the share of right answers",
    "ROUGE-L": "the overlap in words with the true text, in their order",
    "NLL": "the surprise at the true answer, in nats",
}


@dataclass(frozen=True, slots=True)
class Answers:
    """A method's answers to one person's queries.

    ``scores`` (queries, labels) are label scores; ``shots`` (shots, labels) those of a method that reads them. For free
    text ``nll`` (queries,) is minus the log probability of the gold text, per token. A method without probabilities
    gives none of them. ``prompt_tokens`` is the mean over queries; 0 without a model.
    """

    texts: Sequence[str]
    scores: Tensor | None = None
    nll: Tensor | None = None
    shots: Tensor | None = None
    prompt_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class PersonScore:
    """Metrics of one person, primary first, and the NLL of each query (queries,) if there are probabilities."""

    metrics: Mapping[str, float]
    nll: Tensor | None


def from_scores(task: Task, scores: Tensor) -> Answers:
    """Return answers by argmax over label scores."""
    labels = task.labels or ()
    return Answers([labels[i] for i in scores.argmax(1).tolist()], scores)


def measure(task: Task, answers: Answers, golds: Sequence[str], written: bool = True) -> PersonScore:
    """Return all metrics of a task for one person; without ``written`` only the NLL of free text."""
    nll = query_nll(task, answers, golds)
    metrics: dict[str, float] = {}
    if answers.nll is None or written:
        metrics = _rouge(answers.texts, golds) if task.metric == "rouge" else _exact(task, answers, golds)
    return PersonScore(metrics | ({} if nll is None else {"NLL": float(nll.mean())}), nll)


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
    labels = task.labels or ()
    order = sorted(range(len(labels)), key=lambda i: float(labels[i]))
    shares = scores.double().softmax(1)[:, order].cumsum(1)
    return [labels[order[i]] for i in (shares < 0.5).sum(1).clamp_max(len(labels) - 1).tolist()]


def _exact(task: Task, answers: Answers, golds: Sequence[str]) -> dict[str, float]:
    """Return the accuracy, and for ratings the errors as well."""
    accuracy = {"accuracy": sum(text == gold for text, gold in zip(answers.texts, golds)) / len(golds)}
    if task.metric != "mae":
        return accuracy
    metrics = {"MAE": float(distances(task, answers.texts, golds).mean())}
    if answers.scores is not None:
        metrics["MAE (median)"] = float(distances(task, median_labels(task, answers.scores), golds).mean())
    return metrics | accuracy


def distances(task: Task, texts: Sequence[str], golds: Sequence[str]) -> Tensor:
    """Return |prediction - gold|; text that is not a number counts as the farther end of the scale, as in LaMP."""
    values = [float(label) for label in task.labels or ()]
    errors = []
    for text, gold in zip(texts, map(float, golds)):
        try:
            distance = abs(float(text) - gold)
        except ValueError:
            distance = math.nan
        errors.append(distance if math.isfinite(distance) else max(gold - min(values), max(values) - gold))
    return torch.tensor(errors, dtype=torch.float64)


def _rouge(texts: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    """Return the F-measures as in LaMP, and over word stems as in the code of arXiv:2511.20072.

    LaMP's words have a-z and 0-9 alone. Where most letters of the true texts are others, words have all letters.
    """
    require("eval", "rouge-score")
    from rouge_score.rouge_scorer import RougeScorer

    names = {"ROUGE-L": "rougeL", "ROUGE-1": "rouge1"}
    metrics: dict[str, float] = {}
    letters = [letter for gold in golds for letter in gold if letter.isalpha()]
    foreign = 2 * sum(not letter.isascii() for letter in letters) > len(letters)
    for suffix, stems in (("", False), (", stemmed", True)):
        scorer = RougeScorer([*names.values()], use_stemmer=stems, tokenizer=_AllLetters() if foreign else None)
        scores = [scorer.score(gold, text) for text, gold in zip(texts, golds)]
        metrics |= {
            name + suffix: sum(one[key].fmeasure for one in scores) / len(scores) for name, key in names.items()
        }
    return metrics


class _AllLetters:
    """A tokenizer for rouge-score: the words of any script. Where words have no spaces, each character is one."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words, in lower case."""
        kept = "".join(one if unicodedata.category(one)[0] in "LMN" else " " for one in text.lower())
        return _UNSPACED.sub(r" \g<0> ", kept).split()

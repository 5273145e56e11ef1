"""LaMP's scores of a file of answers, over all questions alike."""

from __future__ import annotations

from collections.abc import Mapping

from mta.data.tasks.task import Task
from mta.errors import InputError
from mta.evaluation.metrics import Answers, distances, measure

_SCORES = {"mae": ("MAE", "RMSE"), "accuracy": ("accuracy", "F1"), "rouge": ("ROUGE-1", "ROUGE-L")}  # by metric


def score(task: Task, answers: Mapping[str, str], golds: Mapping[str, str]) -> dict[str, float]:
    """Return LaMP's two metrics of a task over all questions alike; both mappings are question id -> text.

    Accuracy and macro F1 compare labels case-sensitively; other text counts as wrong. MAE and RMSE count text that is
    not a number as 1 or 5, whichever is farther. ROUGE-1 and ROUGE-L are F-measures without stemming.
    Source: LaMP (arXiv:2304.11406). Raises InputError if the ids differ.
    """
    from sklearn.metrics import f1_score

    for here, there, problem in ((golds, answers, "have no answer"), (answers, golds, "were never asked")):
        if odd := [id for id in here if id not in there]:
            raise InputError(
                f"the ids are not the same: {len(odd)} of {len(here)} questions {problem}, {odd[0]!r} first",
                hint="Answer every question of the file exactly once.",
            )
    if not golds:
        raise InputError(
            "there is no question to score",
            hint='Give a file of outputs with questions in it: {"task": "LaMP_3", "golds": [{"id": …, "output": …}]}',
        )
    predicted, expected = [answers[id].strip() for id in golds], [golds[id].strip() for id in golds]
    scores = dict(measure(task, Answers(predicted), expected).metrics)
    if task.metric == "accuracy":  # labels that occur in neither the answers nor the golds have an F1 of 0
        labels = list(task.labels or ())
        scores["F1"] = float(f1_score(expected, predicted, labels=labels, average="macro", zero_division=0.0))
    if task.metric == "mae":  # over all questions: a mean over people would be another number
        scores["RMSE"] = float(distances(task, predicted, expected).square().mean().sqrt())
    return {metric: scores[metric] for metric in _SCORES[task.metric]}

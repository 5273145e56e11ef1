"""LaMP's own scores over all questions at once, for files of answers from other programs.

A comparison gives every person the same weight; the benchmark gives every question the same weight.
"""

from __future__ import annotations

from collections.abc import Mapping

from mta.data.tasks.task import Task
from mta.errors import InputError
from mta.evaluation.metrics import Answers, measure

METRICS = {"mae": ("MAE", "RMSE"), "accuracy": ("accuracy", "F1"), "rouge": ("ROUGE-1", "ROUGE-L")}


def score(task: Task, answers: Mapping[str, str], golds: Mapping[str, str]) -> dict[str, float]:
    """Return the benchmark's two metrics of a task; both mappings are question id -> text.

    Accuracy and macro F1 compare labels case-sensitively; other text counts as wrong. MAE and RMSE count text that is
    not a number as 1 or 5, whichever is farther. ROUGE-1 and ROUGE-L are F-measures without stemming.
    Source: LaMP (arXiv:2304.11406). Raises InputError if the ids differ.
    """
    _check_ids(answers, golds)
    predicted, expected = [answers[id].strip() for id in golds], [golds[id].strip() for id in golds]
    found = dict(measure(task, Answers(predicted), expected).metrics)
    if task.metric == "accuracy":
        found["F1"] = macro_f1(task.labels or (), predicted, expected)
    return {metric: found[metric] for metric in METRICS[task.metric]}


def macro_f1(labels: tuple[str, ...], predicted: list[str], expected: list[str]) -> float:
    """Return the mean F1 over all labels; labels that occur in neither the answers nor the golds count as 0."""
    from sklearn.metrics import f1_score

    numbers = {label: number for number, label in enumerate(labels)}
    guesses, truths = ([numbers.get(text, -1) for text in texts] for texts in (predicted, expected))
    return float(f1_score(truths, guesses, labels=list(numbers.values()), average="macro", zero_division=0.0))


def _check_ids(answers: Mapping[str, str], golds: Mapping[str, str]) -> None:
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

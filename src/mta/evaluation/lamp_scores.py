"""LaMP's own scores, over all questions at once: for files of answers that were made elsewhere.

A comparison weighs people alike; the benchmark weighs questions alike, and takes only answers to exactly its questions.
"""

from __future__ import annotations

from collections.abc import Mapping

from mta.data.tasks.task import Task
from mta.errors import InputError
from mta.evaluation.metrics import Answers, measure

METRICS = {"mae": ("MAE", "RMSE"), "accuracy": ("accuracy", "F1"), "rouge": ("ROUGE-1", "ROUGE-L")}


def score(task: Task, answers: Mapping[str, str], golds: Mapping[str, str]) -> dict[str, float]:
    """The benchmark's two metrics of a task; both mappings are question id -> text.

    Accuracy and macro F1 over the fixed labels, case-sensitive, a miss is no label. MAE and RMSE: what is no number
    counts as whichever of 1 and 5 is farther. ROUGE-1 and ROUGE-L: F-measure without stemming.
    Source: LaMP (arXiv:2304.11406). Raises InputError if the ids are not the same.
    """
    _check_ids(answers, golds)
    said, true = [answers[id].strip() for id in golds], [golds[id].strip() for id in golds]
    found = measure(task, Answers(said), true)
    if task.metric == "accuracy":
        found["F1"] = macro_f1(task.labels or (), said, true)
    return {metric: found[metric] for metric in METRICS[task.metric]}


def macro_f1(labels: tuple[str, ...], said: list[str], true: list[str]) -> float:
    """Mean over all labels, also those that nobody said and nothing is: these count as 0."""
    from sklearn.metrics import f1_score

    numbers = {label: number for number, label in enumerate(labels)}
    predicted, expected = ([numbers.get(text, -1) for text in texts] for texts in (said, true))
    every = list(range(len(labels)))
    return float(f1_score(expected, predicted, labels=every, average="macro", zero_division=0.0))


def _check_ids(answers: Mapping[str, str], golds: Mapping[str, str]) -> None:
    for here, there, what in ((golds, answers, "have no answer"), (answers, golds, "were never asked")):
        if odd := [id for id in here if id not in there]:
            raise InputError(
                f"the ids are not the same: {len(odd)} of {len(here)} questions {what}, {odd[0]!r} first",
                hint="Answer every question of the file exactly once.",
            )
    if not golds:
        raise InputError(
            "there is no question to score",
            hint='Give a file of outputs with questions in it: {"task": "LaMP_3", "golds": [{"id": …, "output": …}]}',
        )

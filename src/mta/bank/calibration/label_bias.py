"""A bias on labels: the cheapest personal model of answers with labels, and the rival that a bank has to beat.

The log probabilities of the pooled model get a bias, the same for all of a person's questions:

    log p(label) + features[label] . theta          theta ~ N(0, std^2), fitted to the shots (MAP)

Labels that are numbers have two features, so that theta moves the mean and the spread of a person's answers; other
labels have one each. A person stores theta: no LoRA, and no gradient of the model. Source: our choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mta.data.history import Item
from mta.data.tasks.task import Task, is_number

STD = 0.5  # of the prior, where no calibration chose one
STEPS = 30  # of Newton's method, at most
_SHORTENED = (1.0, 0.5, 0.25, 0.1, 0.01)  # steps to try; a step that does not help is not taken


def features_of(labels: Sequence[str]) -> Tensor:
    """Return the features of labels, (L, 2) for numbers and (L, L) for others, float64."""
    if not all(map(is_number, labels)):
        return torch.eye(len(labels), dtype=torch.float64)
    values = torch.tensor([float(label) for label in labels], dtype=torch.float64)
    mean = (values - values.mean()) / values.std(correction=0).clamp_min(1e-9)
    return torch.stack([mean, mean.square() - mean.square().mean()], dim=1)


def fitted_bias(scores: Tensor, gold: Tensor, features: Tensor, std: float) -> Tensor:
    """Return the bias (L,) of a person's labels, from the log probabilities (n, L) of n shots and their answers (n,).

    Newton's method on a concave function. Without shots, or with ``std`` 0, the bias is 0.
    """
    if not len(gold) or std <= 0:
        return torch.zeros(len(features), dtype=torch.float64)
    scores, theta = scores.double(), torch.zeros(features.shape[1], dtype=torch.float64)
    prior = torch.eye(len(theta), dtype=torch.float64) / std**2

    def value(at: Tensor) -> float:
        likelihood = (scores + features @ at).log_softmax(1)[torch.arange(len(gold)), gold].sum()
        return float(likelihood - at @ prior @ at / 2)

    for _ in range(STEPS):
        shares = (scores + features @ theta).softmax(1)
        gradient = (features[gold] - shares @ features).sum(0) - prior @ theta
        spread = features.T @ (torch.diag(shares.sum(0)) - shares.T @ shares) @ features
        step = torch.linalg.solve(spread + prior, gradient)
        tried = max((theta + length * step for length in _SHORTENED), key=value)
        if value(tried) <= value(theta) + 1e-12:
            break
        theta = tried
    return features @ theta


def label_biases(
    task: Task, people: Sequence[Sequence[Item]], scores: Sequence[Tensor], std: float | None
) -> list[Tensor]:
    """Return each person's bias (L,) from their items and the pooled model's ``scores`` of these, (n, L) each."""
    labels, prior = task.labels or (), STD if std is None else std
    gold = [torch.tensor([labels.index(task.target(item)) for item in items]) for items in people]
    return [fitted_bias(own, right, features_of(labels), prior) for own, right in zip(scores, gold)]


def bias_gain(scores: Tensor, gold: Tensor, bias: Tensor) -> float:
    """Return how much more likely a bias makes the right answers (n,) among the labels, in nats over all."""
    picked = torch.arange(len(gold)), gold
    scores = scores.double()
    return float(((scores + bias).log_softmax(1)[picked] - scores.log_softmax(1)[picked]).sum())

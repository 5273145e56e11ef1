"""A bank's calibration: what the ``laplace`` policy needs to turn one gradient into a person's coefficients.

Near the population's best merge mu, the log-likelihood of n shots with the gradient g is about g.d - n/2 d'Cd for
coefficients mu + d. With a Gaussian prior on d that is worth ``prior`` shots, the best coefficients are

    w = mu + n / (n + prior) * C^-1 m        C = F + ridge * mean(diag F) * I + mm' / loss        m = g / n

F is people's common curvature. mm' / loss is what a person's own gradient adds; loss is the mean NLL of their shots at
mu. Where the gradient is large, the likelihood bends sooner: no step promises more than the shots' whole loss, which is
all there is to gain. Source: our choice; docs/explanation/method.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mta.bank.calibration.info import CalibrationInfo

_LEAST = 1e-12  # of what divides: the loss of shots that are certain already, or a prior without any variance
_FREEDOM = 8  # degrees of freedom of the variance within people, at least
BOUNDLESS = 1e6  # shots: a prior that nobody's shots outweigh


@dataclass(frozen=True)
class Calibration:
    """The population's best merge ``mu`` (N,) and the ``curvature`` F (N, N) of one shot's log-likelihood near mu.

    Both are float64.
    """

    mu: Tensor
    curvature: Tensor
    info: CalibrationInfo

    @property
    def personal(self) -> bool:
        """Whether people get coefficients of their own; otherwise everybody gets mu, and no gradient is computed."""
        return bool(self.curvature.any())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of ``calibration.safetensors``."""
        return {"mu": self.mu.contiguous(), "curvature": self.curvature.contiguous()}

    def coefficients(self, gradients: Tensor, loglik: Tensor, shots: Tensor) -> Tensor:
        """Return people's coefficients from the gradients of their shots' log-likelihood at mu.

        Shapes: gradients (U, N) and loglik (U,), summed over shots; shots (U,) -> (U, N), float64. The result is mu
        without shots, and where nothing is known of the curvature.
        """
        n = shots.double()[:, None]
        step = solved(self.curvature, self.info.ridge, gradients.double() / n.clamp_min(1))
        promised, loss = (gradients * step).sum(1, keepdim=True), -loglik.double()[:, None]
        shortening = 1 + promised / loss.clamp_min(_LEAST)  # by the formula of Sherman and Morrison
        return self.mu + n / (n + self.info.prior) * step / shortening


def solved(curvature: Tensor, ridge: float, gradients: Tensor) -> Tensor:
    """Return (F + ridge * mean(diag F) * I)^-1 g for each row g of ``gradients`` (U, N); 0 if F is 0."""
    if not bool(curvature.any()):
        return torch.zeros_like(gradients)
    return torch.linalg.solve(regular(curvature, ridge), gradients.T).T


def regular(curvature: Tensor, ridge: float) -> Tensor:
    """Return F + ridge * mean(diag F) * I, (N, N)."""
    return curvature + ridge * curvature.diagonal().mean() * torch.eye(len(curvature), dtype=curvature.dtype)


def curvature_of(gradients: Tensor) -> Tensor:
    """Return the centered covariance of single-shot gradients (S, N) as (N, N), shrunk to its diagonal.

    The share of the diagonal is N / (N + S): few shots say little about how anchors vary together.
    """
    shots, anchors = gradients.shape
    if shots < 2:
        return torch.zeros(anchors, anchors, dtype=gradients.dtype)
    found = torch.cov(gradients.T).reshape(anchors, anchors)
    share = anchors / (anchors + shots)
    return (1 - share) * found + share * torch.diag(found.diagonal())


def prior_of(gradients: Sequence[Tensor], folds: Sequence[int], curvature: Tensor, ridge: float) -> float:
    """Return how many shots a prior is worth: the variance of gradients within people over that between people.

    By nested analysis of variance, from each person's gradients of single shots (shots, N), in the metric in which
    ``solved`` measures steps. People of one fold are compared with each other only, as each fold has another mu.
    Where people do not differ, the result is so large that everybody stays at mu.
    """
    known = [(rows, fold) for rows, fold in zip(gradients, folds) if len(rows)]
    fold = torch.unique(torch.tensor([fold for _, fold in known]), return_inverse=True)[1]
    counts = torch.tensor([len(rows) for rows, _ in known]).double()
    total, freedom = int(counts.sum()), len(known) - len(set(fold.tolist()))
    if total - len(known) < _FREEDOM or freedom < 1:  # too few people have two shots, or no two can be compared
        return BOUNDLESS

    def size(deviations: Tensor) -> float:
        return float((solved(curvature, ridge, deviations) * deviations).sum())

    sums = torch.stack([rows.sum(0) for rows, _ in known])
    shots = torch.zeros_like(counts).index_add_(0, fold, counts)[fold]  # of everybody in a person's fold
    center = torch.zeros_like(sums).index_add_(0, fold, sums)[fold] / shots[:, None]
    within = size(torch.cat([rows - rows.mean(0) for rows, _ in known])) / (total - len(known))
    among = size(counts.sqrt()[:, None] * (sums / counts[:, None] - center)) / freedom
    between = (among - within) / (float((counts - counts.square() / shots).sum()) / freedom)
    return min(max(within / between, _LEAST), BOUNDLESS) if between > 0 else BOUNDLESS

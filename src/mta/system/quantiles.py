"""Quantiles for intervals."""

from __future__ import annotations


def student_t(n: int) -> float:
    """Return how many standard errors the 95% interval of a mean of ``n`` values extends to each side: Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(max(n - 1, 1), 0.975))

"""Sizes and durations in words, and the width of intervals."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """Return a size with its unit: 0, 61 B, 4.6 kB, 10 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    digits = 0 if unit == "B" or count >= 9.95 else 1
    return "0" if count == 0 else f"{count:.{digits}f}".removesuffix(".0") + f" {unit}"


def human_memory(count: float) -> str:
    """Return an amount of memory in the units of ``memory=``: 512 MiB, 4.0 GiB."""
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.0f} MiB"


def human_seconds(seconds: float) -> str:
    """Return a duration with its unit: 0, 0.4 s, 12 s, 3.5 min, 2.1 h."""
    if seconds < 99.5:
        return "0" if seconds == 0 else f"{seconds:.{0 if seconds >= 9.95 else 1}f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def student_t(n: int) -> float:
    """Return how many standard errors the 95% interval of a mean of ``n`` values extends to each side: Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(max(n - 1, 1), 0.975))

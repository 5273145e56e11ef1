"""Work of several processes at the same moment."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable


def at_once(work: Callable[..., None], *each: tuple[object, ...]) -> None:
    """Run ``work(*words, barrier)`` in a process for each of the words; fail if one of them fails."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(each))
    processes = [context.Process(target=work, args=(*words, barrier)) for words in each]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(each)

"""Work that is killed (SIGKILL) at random moments and repeated until it comes to its end."""

from __future__ import annotations

import importlib
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path


def until_done(work: Callable[..., None], folders: Sequence[Path], *more: object) -> list[int]:
    """Run ``work(folder, *more)`` in each folder: undisturbed in the first, killed again and again in the others.

    ``work`` is a function of a test module; it runs in processes of its own. Returns the number of kills per folder.
    """
    search = os.pathsep.join([*filter(None, sys.path), str(Path(work.__code__.co_filename).parent)])
    words = [work.__module__, work.__name__, str(len(folders)), *map(str, folders), *map(str, more)]
    done = subprocess.run(
        [sys.executable, "-c", "import kill; kill.main()", *words],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def main() -> None:
    """The process that kills: it imports once, and forks a child for every attempt."""
    import sklearn.cluster  # noqa: F401  # what takes longest, so that kills hit the work itself

    from mta.training.checkpoint import Checkpoint

    Checkpoint.__init__.__defaults__ = (0.0, *Checkpoint.__init__.__defaults__[1:])  # after every step
    module, name, count, *rest = sys.argv[1:]
    work, folders, more = getattr(importlib.import_module(module), name), rest[: int(count)], rest[int(count) :]
    started = time.monotonic()
    assert _attempt(lambda: work(Path(folders[0]), *more)) == 0
    whole = time.monotonic() - started
    kills = [
        _repeat(lambda to=folder: work(Path(to), *more), whole, random.Random(number))
        for number, folder in enumerate(folders[1:])
    ]
    sys.stdout.write(" ".join(map(str, kills)))


def _repeat(work: Callable[[], None], whole: float, chance: random.Random) -> int:
    """Six kills at most, in turns after some time and in the middle of writing some file; then it may finish."""
    for kills in range(6):
        after = chance.uniform(0.05, 0.4) * whole if kills % 2 else None
        write = None if kills % 2 else chance.randint(1, 5)
        if _attempt(work, after, write) == 0:
            return kills
    assert _attempt(work) == 0
    return 6


def _attempt(work: Callable[[], None], after: float | None = None, write: int | None = None) -> int:
    child = os.fork()
    if not child:
        if write is not None:
            _die_at_write(write)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code


def _die_at_write(number: int) -> None:
    """Every file is flushed before it gets its name: be killed between the two."""
    left = iter(range(number - 1, -1, -1))
    os.fsync = lambda _: next(left) or os.kill(os.getpid(), signal.SIGKILL)

"""A thing in a process of its own: peers run as they do for everybody, untouched by what ours does to its process."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch


class Broken(Exception):
    """The other process failed; says how."""


class Apart:
    """Calls methods of ``make(*args)``, which lives in another process."""

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, torch.get_num_threads()), daemon=True)
        self._process.start()
        there.close()
        self._ask(make, *args)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args: self._ask(name, *args)

    def _ask(self, *request: Any) -> Any:
        # Bytes, not tensors: multiprocessing would pass those through shared memory, which may be small.
        self._pipe.send_bytes(pickle.dumps(request))
        try:
            answer = pickle.loads(self._pipe.recv_bytes())
        except EOFError:
            raise Broken("the peer's process ended") from None
        if isinstance(answer, Broken):
            raise answer
        return answer

    def end(self) -> None:
        """Let the other process go."""
        self._pipe.close()
        self._process.join()


@contextlib.contextmanager
def apart(make: Callable[..., Any], *args: Any) -> Iterator[Any]:
    """``make(*args)`` in another process for the length of a block."""
    thing = Apart(make, *args)
    try:
        yield thing
    finally:
        thing.end()


def quiet() -> None:
    """No progress bars and hints of other libraries between the rows."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)


def _serve(pipe: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    quiet()
    thing: Any = None
    with contextlib.suppress(EOFError):
        while True:
            what, *args = pickle.loads(pipe.recv_bytes())
            try:
                if isinstance(what, str):
                    answer = getattr(thing, what)(*args)
                else:
                    thing, answer = what(*args), None
            except Exception as error:
                answer = Broken(f"{type(error).__name__}: {error}")
            pipe.send_bytes(pickle.dumps(answer))

"""A real server over the tiny bank on its own port, for tests that act as clients."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import httpx2
import openai
import uvicorn
from conftest import personalizer

from mta.serving.api.app import create_app
from mta.serving.api.auth import Keys, add_key
from mta.serving.api.jobs import Jobs
from mta.serving.api.limits import Limits
from mta.serving.api.service import Service
from mta.serving.embedded.engine import EmbeddedEngine
from mta.store import Store


@contextmanager
def served(base, bank, folder, *, limits=None, keyless=False, engine=None, store=None, strict=None, sweep=600.0, **how):
    """Yields url, service, and secrets of four keys: admin, serve, ann (a person), team (a prefix).

    ``http(name)`` and ``client(name)`` are clients with a key: of HTTP, and OpenAI's.
    """
    store, keys = store or Store(folder / "people"), folder / "keys.yaml"
    given = {"admin": ("admin", ""), "serve": ("serve", ""), "ann": ("person", "ann"), "team": ("prefix", "team/")}
    secrets = {name: add_key(keys, name, rights, of) for name, (rights, of) in given.items()}
    engine = engine or EmbeddedEngine(base, bank, store, **{"slots": 4, "chunk": 32, "length": 256} | how)
    jobs = Jobs(personalizer(base.twin(), bank, store))
    known = Keys() if keyless else Keys.load(keys)
    more = {"strict_bank": strict, "sweep": sweep}
    service = Service(engine, base, store, bank.task, known, jobs, limits or Limits(), **more)
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="error", access_log=False))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    here = SimpleNamespace(url=url, service=service, secrets=secrets, server=server, thread=thread)
    here.client = lambda name: openai.OpenAI(base_url=f"{url}/v1", api_key=secrets[name], max_retries=0)
    here.http = lambda name="": httpx2.Client(
        base_url=url, timeout=60, headers={"Authorization": f"Bearer {secrets[name]}"} if name else {}
    )
    try:
        yield here
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@contextmanager
def stepped(scheduler):
    """Within the block the scheduler makes one step per ``release`` of the yielded semaphore."""
    steps, step = threading.Semaphore(0), scheduler.step

    def wait_and_step():
        assert steps.acquire(timeout=60)
        step()

    scheduler.step = wait_and_step
    try:
        yield steps
    finally:
        scheduler.step = step
        steps.release()  # for the step that waits


def waited(ask, seconds=600):
    """What ``ask`` returns as soon as its status is neither waiting nor running; fails after ``seconds``."""
    until = time.monotonic() + seconds
    while (found := ask())["status"] in ("waiting", "running"):
        assert time.monotonic() < until, found
        time.sleep(0.05)
    return found


def until(check, seconds=600):
    """Wait until ``check`` returns true; fail after ``seconds``."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end
        time.sleep(0.02)

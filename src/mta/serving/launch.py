"""A gateway put together and run: base, bank, store and keys in, a server out."""

from __future__ import annotations

import ipaddress
import logging
import os
import shlex
import signal
import socket
import sys
from argparse import ArgumentError, ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from mta.bank.bank import Bank
from mta.bank.format import stale
from mta.config import Run
from mta.errors import BankMismatch, ConfigError
from mta.model.base import BaseModel
from mta.personalize import Personalizer
from mta.serving.api.auth import ENV, Keys
from mta.serving.api.jobs import Jobs
from mta.serving.api.limits import Limits
from mta.serving.api.service import Service
from mta.serving.embedded.engine import EmbeddedEngine
from mta.serving.vllm.engine import VllmEngine
from mta.serving.vllm.server import SLOT_RANK, Remote, VllmServer, VllmSettings
from mta.store import Store
from mta.system.atomic import file_mode
from mta.system.hub import local_folder

log = logging.getLogger("mta")


def keys_for(path: Path | None, host: str, insecure_local: bool, port: int = 0) -> Keys:
    """The keys of a file and of the environment, for a door at ``host`` and ``port``.

    Raises ConfigError where there are none and it would be open, and where it cannot be had.
    """
    check_port(host, port)
    keys = Keys.load(path, os.environ.get(ENV))
    if keys.keys:
        return keys
    if not insecure_local:
        raise ConfigError(
            f"no API key: neither --keys nor {ENV} names one",
            hint="Make one:  mta serve --keys keys.yaml --new-key admin   or, on this machine alone: --insecure-local",
        )
    if not _loopback(host):
        raise ConfigError(
            f"--insecure-local serves this machine alone, but the host is {host!r}", hint="Use --host 127.0.0.1."
        )
    return keys


def check(store: str, banks: Sequence[Path], strict: bool, vllm: bool) -> None:
    """Before anything is loaded. Raises StoreError without a store, ConfigError for banks that are not to be served."""
    Store(store).check()
    if vllm and len(banks) > 1:
        raise ConfigError(
            f"vLLM serves one bank, got {len(banks)}",
            hint="Serve during the move without it, or move everybody first: mta personalize",
        )
    for bank in banks:
        if parts := stale(bank):
            found = f"somebody who was forgotten is in the {' and the '.join(parts)} of {bank}"
            if strict:
                raise ConfigError(found, hint="Rebuild it:  mta bank build   or serve it without --strict.")
            log.warning("%s; --strict would not serve it", found)


def check_port(host: str, port: int) -> None:
    """Before anything is loaded. Raises ConfigError for an address that cannot be listened at."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ConfigError(
            f"{host}:{port} cannot be listened at: {error.strerror or error}",
            hint="Choose another:  --port 8001   (0 takes any that is free)",
        ) from None


def bank_before(folder: Path, base: BaseModel, bank: Bank) -> Bank:
    """The bank that people are moved from. Raises ConfigError where it cannot be served beside ``bank``."""
    before = Bank.open(folder, base)
    if before.task.identity != bank.task.identity:
        raise ConfigError(
            f"the bank at {folder} is for task {before.task.name!r}, expected {bank.task.name!r}",
            hint="Serve banks of different tasks from gateways of their own.",
        )
    return before


def service_of(
    base: BaseModel,
    bank: Bank,
    run: Run,
    store: str,
    keys: Keys,
    *,
    rate: int = 0,
    slots: int = 32,
    vllm: VllmServer | Remote | None = None,
    before: Path | None = None,
    strict: bool = False,
) -> Service:
    """An engine over a bank and a store, embedded or vLLM's, and what personalizes beside it, always with ``bank``.

    People of the bank in the folder ``before`` are served with that one until then. If ``base`` is an outline (vLLM),
    what personalizes loads the weights for its first job.
    """
    states, length = Store(store), base.prompts.max_tokens
    engine: EmbeddedEngine | VllmEngine
    if vllm is None:
        older = bank_before(before, base, bank) if before else None
        engine = EmbeddedEngine(base, bank, states, before=older, slots=slots)
    else:
        engine = VllmEngine(
            vllm, states, bank=bank.hash, pooled=bank.task_lora is not None, length=length, stops=base.stop_tokens
        )
    personal = Personalizer(base.twin(), bank, states, run=run, older=before)
    jobs = Jobs(personal, load=None if base.has_weights else partial(_with_weights, personal))
    what = engine, base, states, bank.task, keys, jobs, Limits(rate=rate), length
    return Service(*what, strict=[folder for folder in (bank.folder, before) if folder] if strict else ())


def _with_weights(outline: Personalizer) -> Personalizer:
    """The same personalizer over a base that can compute. Raises what ``BaseModel.load`` does."""
    base = BaseModel.of(outline.run)
    bank = Bank.open(outline.bank.folder, base)
    if bank.hash != outline.bank.hash:
        raise BankMismatch(f"another bank is at {bank.folder} since the server began", hint="Start mta serve again.")
    return Personalizer(base, bank, outline.store, run=outline.run)


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """Within the block SIGTERM raises SystemExit, so that what was started is stopped too; then it is as before."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def vllm_of(python: str, base: BaseModel, bank: Path, store: str, *, slots: int, args: str) -> VllmServer:
    """A vLLM server for that base, started: that takes a minute. Raises ConfigError, VllmNotStarted."""
    started = VllmServer(vllm_settings(python, base, bank, store, slots=slots, args=args))
    with Console(stderr=True).status("Starting vLLM"):
        started.start()
    return started


def vllm_settings(python: str, base: BaseModel, bank: Path, store: str, *, slots: int, args: str) -> VllmSettings:
    """What that server is started with; adapters are cut to the rank its slots get. Raises ConfigError."""
    read = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    read.add_argument("--max-lora-rank", "--max_lora_rank", dest="rank", type=int, default=SLOT_RANK)
    try:
        words = shlex.split(args)
        rank = read.parse_known_args(words)[0].rank
    except (ValueError, ArgumentError) as error:
        raise ConfigError(f"--vllm-args {args!r} cannot be read: {error}", hint="Give them as to vllm serve.") from None
    length, dtype = base.prompts.max_tokens, str(base.dtype).removeprefix("torch.")
    paths = local_folder(base.name), str(bank), store
    return VllmSettings(python, *paths, length, rank, slots, args=(f"--dtype={dtype}", *words))


def remote_of(url: str, folder: Path | None, started: str | None = None) -> Remote:
    """A vLLM server that runs already, on this machine, for this gateway alone. Its key comes by VLLM_API_KEY.

    Raises ConfigError.
    """
    if started:
        raise ConfigError("--vllm starts a server, --vllm-url names one that runs", hint="Give one of the two.")
    if folder is None:
        raise ConfigError(
            "where does that vLLM's plugin write adapters?", hint="Give its MTA_VLLM_FOLDER: --vllm-folder"
        )
    lock = FileLock(folder / "gateway.lock", timeout=0, mode=file_mode())
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"another gateway works with the vLLM server of {folder}",
            hint="End it first: two would unload what one needs.",
        ) from None
    return Remote(url.rstrip("/"), folder, os.environ.get("VLLM_API_KEY", ""), lock=lock)


def serve(service: Service, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Until it is told to end: what runs then is answered, nothing new is taken.

    ``ready`` is told the address; port 0 takes any that is free. Raises OSError where it cannot listen.
    """
    import uvicorn

    from mta.serving.api.app import create_app

    with socket.create_server((host, port)) as listening:
        config = uvicorn.Config(create_app(service), log_level="warning", access_log=False, server_header=False)
        ready(f"http://{host}:{listening.getsockname()[1]}")
        uvicorn.Server(config).run(sockets=[listening])


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

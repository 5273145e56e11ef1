"""Builds and runs a gateway from a base, a bank, a store, and API keys."""

from __future__ import annotations

import logging
import os
import shlex
import socket
from argparse import ArgumentError, ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import uvicorn
from rich.console import Console

from mta.bank.bank import Bank
from mta.bank.notes import stale_report
from mta.config import Run
from mta.errors import BankMismatch, ConfigError
from mta.model.base import BaseModel
from mta.personalize import Personalizer
from mta.serving.api.app import create_app
from mta.serving.api.auth import ENV, LOOPBACK, Keys
from mta.serving.api.jobs import Jobs
from mta.serving.api.limits import Limits
from mta.serving.api.service import Service
from mta.serving.embedded.engine import EmbeddedEngine
from mta.serving.vllm.engine import VllmEngine
from mta.serving.vllm.server import SLOT_RANK, VllmServer, VllmSettings
from mta.store import Store
from mta.system.device import dtype_name
from mta.system.hub import local_folder

log = logging.getLogger("mta")
_STOP = 30  # seconds that running answers have once the gateway stops; Kubernetes kills after 30 by default


def keys_for(path: Path | None, host: str, insecure_local: bool, port: int = 0) -> Keys:
    """Return the API keys from a key file and from the environment, for a gateway at ``host`` and ``port``.

    Raises ConfigError if the address is unavailable, or if there are no keys and the gateway would be open to others.
    """
    try:
        _listen(host, port).close()
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}:{port}: {error.strerror or error}",
            hint="Choose another port:  --port 8001   (0 picks a free one)",
        ) from None
    keys = Keys.load(path, os.environ.get(ENV))
    if not keys.keys and not insecure_local:
        raise ConfigError(
            f"no API key: neither --keys nor {ENV} provides one",
            hint="Create one:  mta serve --keys keys.yaml --new-key admin   or stay local:  --insecure-local",
        )
    if not keys.keys and host not in LOOPBACK:
        raise ConfigError(
            f"--insecure-local serves this machine only, but the host is {host!r}", hint="Use --host 127.0.0.1."
        )
    return keys


def check(store: str, bank: Path, strict: bool) -> None:
    """Check store and bank before loading. Raises StoreError without a store, ConfigError for an unusable bank."""
    Store(store).check()
    if report := stale_report(bank):
        if strict:
            raise ConfigError(report.message, hint=f"{report.hint}\n  Or serve it without --strict.")
        log.warning("%s; --strict would refuse this bank", report.message)


def service_of(
    base: BaseModel,
    bank: Bank,
    run: Run,
    store: str,
    keys: Keys,
    *,
    rate: int = 0,
    slots: int = 32,
    vllm: VllmServer | None = None,
    strict: bool = False,
) -> Service:
    """Build the service: an engine, embedded or vLLM, and a personalizer.

    If ``base`` has no weights (vLLM), the personalizer loads them for its first job.
    """
    states = Store(store)
    engine = partial(VllmEngine, vllm) if vllm else EmbeddedEngine
    personal = Personalizer(base.twin(), bank, states, run=run)
    jobs = Jobs(personal, load=None if base.has_weights else partial(_with_weights, personal))
    return Service(
        engine(base, bank, states, slots=slots),
        base,
        store=states,
        task=bank.task,
        keys=keys,
        jobs=jobs,
        limits=Limits(rate=rate, own=min(Limits().own, max(slots // 4, 1))),
        history=bank.history,
        strict_bank=(bank.folder, bank.hash) if strict else None,
    )


def _with_weights(outline: Personalizer) -> Personalizer:
    """Return the same personalizer over a base with weights. Raises BankMismatch and what ``BaseModel.load`` does."""
    base = BaseModel.of(outline.run)
    bank = Bank.open(outline.bank.folder, base)
    if bank.hash != outline.bank.hash:
        raise BankMismatch(f"the bank at {bank.folder} changed since the server started", hint="Restart mta serve.")
    return Personalizer(base, bank, outline.store, run=outline.run)


@contextmanager
def vllm_of(
    python: str | None, base: BaseModel, bank: Path, store: str, *, slots: int, args: str
) -> Iterator[VllmServer | None]:
    """Yield a vLLM server that runs within the block, None without its ``python``. Its start takes about a minute.

    Raises ConfigError, VllmNotStarted.
    """
    if python is None:
        yield None
        return
    server = VllmServer(vllm_settings(python, base, bank, store, slots=slots, args=args))
    try:  # the command line turns SIGTERM into an exception, so that the server is stopped then, too
        with Console(stderr=True).status("Starting vLLM"):
            server.start()
        yield server
    finally:
        server.stop()


def vllm_settings(python: str, base: BaseModel, bank: Path, store: str, *, slots: int, args: str) -> VllmSettings:
    """Return the server's settings; adapters are truncated to its slot rank. Raises ConfigError."""
    if base.quantize != "none":
        raise ConfigError(
            f"the bank was built over its base with quantize={base.quantize}, but vLLM loads the base unquantized",
            hint="Serve without --vllm, or build a bank over a folder of weights that bitsandbytes quantized.",
        )
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--max-lora-rank", "--max_lora_rank", dest="rank", type=int, default=SLOT_RANK)
    try:
        words = shlex.split(args)
        rank = parser.parse_known_args(words)[0].rank
    except (ValueError, ArgumentError) as error:
        raise ConfigError(f"cannot parse --vllm-args {args!r}: {error}", hint="Write them as for vllm serve.") from None
    length, dtype = base.prompts.max_tokens, dtype_name(base.dtype)
    paths = local_folder(base.name), str(bank), store
    return VllmSettings(python, *paths, length, rank, slots, args=(f"--dtype={dtype}", *words))


def serve(service: Service, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then accept no new requests and finish running answers within 30 seconds.

    Calls ``ready`` with the address; port 0 picks a free port. Raises OSError if it cannot listen.
    """
    with _listen(host, port) as listening:
        app = create_app(service)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=_STOP
        )
        ready(f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}")
        uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)

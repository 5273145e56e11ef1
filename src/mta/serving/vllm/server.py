"""Starts and stops a vLLM server for the gateway.

The server listens on a socket in a folder that only this user can enter, so other users cannot reach its
administration, model list, or metrics. It has its own environment, because vLLM needs an older transformers.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
from filelock import FileLock

from mta.errors import ConfigError, MtaError
from mta.serving.api.auth import ENV
from mta.serving.engine import LATER, EngineGone
from mta.system.atomic import file_mode, owner_only

log = logging.getLogger("mta")
SLOT_RANK = 16  # default rank of vLLM's adapter slots (decision 012)
_PREFIX, _OWNER = "mta-vllm-", "owner.lock"  # of folders of servers that gateways start; the gateway holds the lock
_STARTUP_TIMEOUT = 600.0  # seconds: large models on slow disks
_ERROR = re.compile(r"\b\w+(?:Error|Exception): .+|error: .+")


class VllmNotStarted(MtaError):
    """The vLLM server ended or timed out before it was ready."""


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """How a server is started: ``python`` belongs to vLLM's environment, ``args`` are appended to the command."""

    python: str
    base: str
    bank: str
    store: str
    length: int
    rank: int = SLOT_RANK
    rows: int = 32
    args: tuple[str, ...] = ()

    def command(self, socket: Path) -> list[str]:
        """Return the command line of the server."""
        sizes = {"max-model-len": self.length, "max-lora-rank": self.rank, "max-loras": self.rows}
        sizes |= {"max-cpu-loras": 2 * self.rows, "max-num-seqs": self.rows}
        limits = [f"--{name}={value}" for name, value in sizes.items()]
        quiet = ["--disable-log-stats", "--disable-uvicorn-access-log", "--disable-fastapi-docs"]
        start = [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.base, f"--uds={socket}"]
        options = ["--served-model-name=base", "--enable-prompt-tokens-details", "--enable-lora"]
        options.append("--generation-config=vllm")  # both engines ignore the model's sampling defaults
        return [*start, *options, *limits, *quiet, *self.args]

    def environment(self, folder: Path) -> dict[str, str]:
        """Return the server's environment: our plugin enabled, usage reports and hub access disabled."""
        plugin = {"BANK": self.bank, "STORE": self.store, "FOLDER": str(folder), "RANK": str(self.rank)}
        plugin["PARENT"] = str(os.getpid())  # the server stops when this process dies
        own = {f"MTA_VLLM_{name}": value for name, value in plugin.items()}
        own |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true", "VLLM_PLUGINS": "mta", "VLLM_LOGGING_LEVEL": "WARNING"}
        own |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
        inherited = {name: value for name, value in os.environ.items() if name not in ("VLLM_API_KEY", ENV)}
        return {"VLLM_CPU_KVCACHE_SPACE": "2"} | inherited | own


class VllmServer:
    """A server that this process starts once. Its folder, in memory if possible, has its socket and the adapters."""

    def __init__(self, settings: VllmSettings) -> None:
        if not shutil.which(settings.python):
            raise ConfigError(
                f"no Python at {settings.python!r} to run vLLM with",
                hint="Create one (docs/how-to/vllm.md):  make vllm   and pass  --vllm .vllm/bin/python",
            )
        self.folder, self._lock = _new_folder()
        self.settings, self.socket, self.log = settings, self.folder / "socket", self.folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def up(self) -> bool:
        """Whether the server was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def client(self) -> httpx.AsyncClient:
        """Return a client of the server."""
        transport = httpx.AsyncHTTPTransport(uds=str(self.socket), limits=httpx.Limits(max_connections=None))
        return httpx.AsyncClient(transport=transport, base_url="http://vllm", timeout=30)

    def gone(self) -> EngineGone:
        """Return the error of a request that the server did not answer; log the exit status if the server ended."""
        if self.up or self._process is None:
            return EngineGone("vLLM does not answer", hint=LATER)
        status = self._process.returncode
        log.error("the vLLM server ended (exit status %s); its log, until the gateway stops: %s", status, self.log)
        return EngineGone(f"the vLLM server ended (exit status {status})", hint="Restart the gateway:  mta serve")

    def start(self) -> None:
        """Start the server and wait until it is ready. Raises VllmNotStarted with the first error of its log."""
        try:
            with open(self.log, "wb", opener=owner_only) as log:
                self._process = subprocess.Popen(
                    self.settings.command(self.socket),
                    env=self.settings.environment(self.folder),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # a process group, so that child processes are stopped too
                )
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        end = time.monotonic() + _STARTUP_TIMEOUT
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)), base_url="http://vllm") as client:
            while self.up and time.monotonic() < end:
                with suppress(httpx.HTTPError):
                    if self.socket.exists() and client.get("/health").status_code == 200:
                        return
                time.sleep(0.25)
        raise VllmNotStarted(
            f"vLLM did not start (exit status {self._process and self._process.poll()}): {_reason(self.log)}",
            hint="Run this command to see the full log:  " + shlex.join(self.settings.command(Path("vllm.sock"))),
        )

    def stop(self) -> None:
        """Stop the server and its children, by SIGTERM, then SIGKILL, and delete its folder."""
        process, self._process = self._process, None
        if process:
            try:
                _end(process, signal.SIGTERM, 15)
            finally:  # also if Ctrl-C interrupts the wait
                _end(process, signal.SIGKILL, 5)
        shutil.rmtree(self.folder, ignore_errors=True)


def _end(process: subprocess.Popen[bytes], sign: signal.Signals, seconds: float) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, sign)
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _new_folder() -> tuple[Path, FileLock]:
    """Make a folder, in memory if possible, with a lock that ends with this process.

    Folders whose gateway and vLLM were killed together are removed: no forgetting would find the adapters in them.
    """
    parent = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    for left in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, or in use
            if left.lstat().st_uid == os.getuid() and (left / _OWNER).is_file() and not left.is_symlink():
                with FileLock(left / _OWNER, timeout=0):
                    shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    lock = FileLock(folder / _OWNER, timeout=0, mode=file_mode())
    lock.acquire()
    return folder, lock


def _reason(log: Path) -> str:
    """Return the first error in the log, which usually causes the later ones, or the end of the log."""
    text = log.read_text(encoding="utf-8", errors="replace")
    first = _ERROR.search(text)
    return first[0] if first else text[-500:].strip() or "the log is empty"

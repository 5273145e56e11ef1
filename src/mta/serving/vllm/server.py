"""A vLLM server of the gateway's own: started, watched, started again when it ends, and stopped.

It listens at a socket in a folder that only this user may enter, so nobody else reaches its administration, its list of
models or its metrics; and it lives in an environment of its own, for it needs an older transformers than ours.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx

from mta.errors import ConfigError, MtaError
from mta.serving.api.auth import ENV
from mta.system.atomic import owner_only

SLOT_RANK = 16  # of vLLM's slots where nothing else is said (decision 012)
_START = 600.0  # seconds: large models on slow disks
_ANY = httpx.Limits(max_connections=None)
_ERROR = re.compile(r"\b\w+(?:Error|Exception): .+|error: .+")


class VllmNotStarted(MtaError):
    """The vLLM server ended before it could answer."""


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """What a server is started with: the Python of vLLM's environment first, further arguments of vLLM's own last."""

    python: str
    base: str
    bank: str
    store: str
    length: int
    rank: int = SLOT_RANK
    rows: int = 32
    args: tuple[str, ...] = ()

    def command(self, socket: Path) -> list[str]:
        """What is run."""
        sizes = {"max-model-len": self.length, "max-lora-rank": self.rank, "max-loras": self.rows}
        sizes |= {"max-cpu-loras": 2 * self.rows, "max-num-seqs": self.rows}
        said = [f"--{name}={value}" for name, value in sizes.items()]
        quiet = ["--disable-log-stats", "--disable-uvicorn-access-log", "--disable-fastapi-docs"]
        start = [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.base, f"--uds={socket}"]
        shown = ["--served-model-name=base", "--enable-prompt-tokens-details", "--enable-lora"]
        shown.append("--generation-config=vllm")  # what the model's own says of sampling holds for neither engine
        return [*start, *shown, *said, *quiet, *self.args]

    def environment(self, folder: Path) -> dict[str, str]:
        """With our plugin switched on, and nothing told to anybody outside."""
        ours = {"BANK": self.bank, "STORE": self.store, "FOLDER": str(folder), "RANK": str(self.rank)}
        ours["PARENT"] = str(os.getpid())  # with whom it ends
        own = {f"MTA_VLLM_{name}": value for name, value in ours.items()}
        own |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true", "VLLM_PLUGINS": "mta", "VLLM_LOGGING_LEVEL": "WARNING"}
        own |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
        inherited = {name: value for name, value in os.environ.items() if name not in ("VLLM_API_KEY", ENV)}
        return {"VLLM_CPU_KVCACHE_SPACE": "2"} | inherited | own


@dataclass(frozen=True, slots=True)
class Remote:
    """A server somebody else started, on this machine: its address, its key, and the folder its plugin writes to.

    ``url`` is one of http, or ``unix:`` and the path of a socket.
    """

    url: str
    folder: Path
    key: str = ""
    starts: int = 0
    up: bool = True
    lock: object = None  # held as long as this is

    def client(self) -> httpx.AsyncClient:
        """One that reaches it."""
        shown = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        if self.url.startswith("unix:"):
            return _over(self.url.removeprefix("unix:"), shown)
        return httpx.AsyncClient(base_url=self.url, headers=shown, limits=_ANY, timeout=30)

    def stop(self) -> None:
        """It goes on."""


class VllmServer:
    """One server and its folder, in memory where the machine has one; a thread starts it again whenever it ends."""

    def __init__(self, settings: VllmSettings) -> None:
        if not shutil.which(settings.python):
            raise ConfigError(
                f"no Python at {settings.python!r} to run vLLM with",
                hint="Make an environment for it (docs/how-to/vllm.md):  make vllm   and give  --vllm .vllm/bin/python",
            )
        self.settings = settings
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="mta-vllm-", dir=memory if memory.is_dir() else None))
        self.socket, self.log = self.folder / "socket", self.folder / "log"
        self.starts = 0
        self.up = False
        self._ending = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._watch = threading.Thread(target=self._keep_up, name="mta-vllm", daemon=True)

    def client(self) -> httpx.AsyncClient:
        """One that reaches it."""
        return _over(str(self.socket), {})

    def start(self) -> None:
        """Returns when it answers. Raises VllmNotStarted, with the end of what it said."""
        try:
            self._run()
        except BaseException:
            self.stop()
            raise
        self._watch.start()

    def stop(self) -> None:
        """End it, and delete its folder."""
        self._ending.set()
        self._end()
        if self._watch.ident:
            self._watch.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self) -> None:
        self.socket.unlink(missing_ok=True)
        with open(self.log, "wb", opener=owner_only) as log:
            self._process = subprocess.Popen(
                self.settings.command(self.socket),
                env=self.settings.environment(self.folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # it has children, which must end with it
            )
        self.starts += 1
        self._wait(self._process)
        self.up = True

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + _START
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)), base_url="http://vllm") as client:
            while process.poll() is None and time.monotonic() < end and not self._ending.is_set():
                with suppress(httpx.HTTPError):
                    if self.socket.exists() and client.get("/health").status_code == 200:
                        return
                time.sleep(0.25)
        raise VllmNotStarted(
            f"vLLM did not come up (exit status {process.poll()}): {_reason(self.log)}",
            hint="Start it by hand to see all it says:  " + shlex.join(self.settings.command(Path("vllm.sock"))),
        )

    def _keep_up(self) -> None:
        while not self._ending.is_set():
            assert self._process
            self._process.wait()
            self.up = False
            try:
                self._end()
                if not self._ending.wait(1):
                    self._run()
            except (VllmNotStarted, OSError):  # whatever is left of it ends, and it is tried again
                self._end()
        self._end()

    def _end(self) -> None:
        """SIGTERM to it and its children, SIGKILL to whoever stays."""
        if self._process is None:
            return
        for sign, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)


def _over(socket: str, headers: dict[str, str]) -> httpx.AsyncClient:
    transport = httpx.AsyncHTTPTransport(uds=socket, limits=_ANY)
    return httpx.AsyncClient(transport=transport, base_url="http://vllm", headers=headers, timeout=30)


def _reason(log: Path) -> str:
    """The first error it told of, which the others follow from; or its last words."""
    said = log.read_text(encoding="utf-8", errors="replace")
    found = _ERROR.search(said)
    return found[0] if found else said[-500:].strip() or "it said nothing"

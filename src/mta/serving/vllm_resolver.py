"""The interface of vLLM's resolvers over ``Adapters``; only vLLM's own processes import it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from mta.serving.vllm_adapters import Adapters


class Resolver(LoRAResolver):  # type: ignore[misc]
    """Makes the adapter of a name that vLLM does not know yet."""

    def __init__(self) -> None:
        self.adapters = Adapters.of_environment()
        _end_with(int(os.environ.get("MTA_VLLM_PARENT", "0")), self.adapters)
        self._making = ThreadPoolExecutor(1, "mta-adapters", initializer=_alone)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """None where the name means nobody: vLLM answers 404."""
        path = await asyncio.get_running_loop().run_in_executor(self._making, self.adapters.path, lora_name)
        number = zlib.crc32(lora_name.encode()) or 1  # vLLM gives it another
        return path and LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(path))


def _alone() -> None:
    import torch

    torch.set_num_threads(1)  # the cores are vLLM's


def _end_with(parent: int, adapters: Adapters) -> None:
    """A gateway that was killed leaves neither a server behind nor anybody's adapter."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        shutil.rmtree(adapters.folder, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.getppid() == parent:  # else it is one of vLLM's further processes, or nobody's
        threading.Thread(target=watch, name="mta-parent", daemon=True).start()

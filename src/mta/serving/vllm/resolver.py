"""The interface of vLLM's resolvers over ``Adapters``; only vLLM's own processes import it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

from mta.serving.vllm.adapters import Adapters


class Resolver(LoRAResolver):  # type: ignore[misc]
    """Makes the adapter of a name that vLLM does not know yet."""

    def __init__(self) -> None:
        self.adapters = Adapters.of_environment()
        _end_with(int(os.environ.get("MTA_VLLM_PARENT", "0")), self.adapters)
        self._making = ThreadPoolExecutor(1, "mta-adapters", initializer=_on_one_core)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """None where the name means nobody: vLLM answers 404."""
        _unload_wholly()
        path = await asyncio.get_running_loop().run_in_executor(self._making, self.adapters.path, lora_name)
        return path and LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(path))  # vLLM gives it a number


@cache
def _unload_wholly() -> None:
    """VLLM forgets a name and keeps its weights until others take their place: here they leave with it, and at once.

    So nobody's weights outlive them, and nothing reads an adapter's files after it was unloaded.
    """
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    plain = OpenAIServingModels.unload_lora_adapter

    async def unload(self: Any, request: Any) -> Any:
        known = self.lora_requests.get(request.lora_name)
        answer = await plain(self, request)
        if known and request.lora_name not in self.lora_requests:
            await self.engine_client.remove_lora(known.lora_int_id)
            self.lora_resolver_lock.pop(request.lora_name, None)
        return answer

    OpenAIServingModels.unload_lora_adapter = unload


def _on_one_core() -> None:
    from mta.system.device import compute_with

    compute_with(1)  # the cores are vLLM's


def _end_with(parent: int, adapters: Adapters) -> None:
    """A gateway that was killed leaves neither a server behind nor anybody's adapter."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        shutil.rmtree(adapters.folder, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGTERM)

    if parent and Path("/proc").is_dir() and not Path(f"/proc/{parent}").exists():  # it ended before we began
        os.kill(os.getpid(), signal.SIGTERM)
    if os.getppid() == parent:  # else it is one of vLLM's further processes, or nobody's
        threading.Thread(target=watch, name="mta-parent", daemon=True).start()

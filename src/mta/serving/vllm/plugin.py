"""The vLLM plugin, loaded in each of vLLM's processes: vLLM's resolver interface over ``AdapterFolders``.

If these variables are set, the vLLM server resolves the names of ``wire_name``:

MTA_VLLM_BANK     folder of the bank
MTA_VLLM_STORE    folder or URL of the store
MTA_VLLM_FOLDER   in-memory folder for the adapters, readable by this user only
MTA_VLLM_RANK     vLLM's --max-lora-rank
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

if TYPE_CHECKING:
    from mta.serving.vllm.adapters import AdapterFolders


def register() -> None:
    """Register our resolver with vLLM (entry point ``vllm.general_plugins``); do nothing without the variables.

    Every vLLM process calls this, workers too, some of them twice. So heavy imports wait for the first adapter request.
    """
    if "MTA_VLLM_BANK" in os.environ and "mta" not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver("mta", Resolver())


class Resolver(LoRAResolver):  # type: ignore[misc]
    """Builds the adapter for a name that vLLM does not know yet."""

    def __init__(self) -> None:
        bank, store, folder, rank = (os.environ[f"MTA_VLLM_{name}"] for name in ("BANK", "STORE", "FOLDER", "RANK"))
        self._settings = Path(bank), store, Path(folder), int(rank)
        self._builder = ThreadPoolExecutor(1, "mta-adapters")
        _follow_parent(int(os.environ.get("MTA_VLLM_PARENT", "0")), Path(folder))

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return the request for an adapter; None if the name is unknown, and vLLM answers 404."""
        _patch_unload()
        path = await asyncio.get_running_loop().run_in_executor(self._builder, lambda: self._adapters.path(lora_name))
        return path and LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(path))  # vLLM assigns the id

    @cached_property
    def _adapters(self) -> AdapterFolders:
        from mta.serving.vllm.adapters import AdapterFolders
        from mta.system.device import compute_with

        compute_with(1)  # vLLM needs the other cores
        return AdapterFolders(*self._settings)


@cache
def _patch_unload() -> None:
    """Make vLLM's unload request also drop the weights at once; by default only the name goes and the weights stay.

    So no request can use the weights of a forgotten person, and vLLM never reads an adapter's files after unloading it.
    The values stay in the tensors of the adapter's slot until another adapter takes the slot.
    """
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    original = OpenAIServingModels.unload_lora_adapter

    async def unload(self: Any, request: Any) -> Any:
        known = self.lora_requests.get(request.lora_name)
        answer = await original(self, request)
        if known and request.lora_name not in self.lora_requests:
            await self.engine_client.remove_lora(known.lora_int_id)
            self.lora_resolver_lock.pop(request.lora_name, None)
        return answer

    OpenAIServingModels.unload_lora_adapter = unload


def _follow_parent(parent: int, folder: Path) -> None:
    """Stop this server and delete its adapters when the gateway process ``parent`` dies."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        shutil.rmtree(folder, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.getppid() == parent:  # false in vLLM's child processes, and without a parent
        threading.Thread(target=watch, name="mta-parent", daemon=True).start()

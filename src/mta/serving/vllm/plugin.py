"""The vLLM plugin, loaded in each of vLLM's processes.

If these variables are set, the vLLM server resolves the names of ``wire_name``:

MTA_VLLM_BANK     folder of the bank
MTA_VLLM_STORE    folder or URL of the store
MTA_VLLM_FOLDER   in-memory folder for the adapters, readable by this user only
MTA_VLLM_RANK     vLLM's --max-lora-rank
"""

from __future__ import annotations

import os


def register() -> None:
    """Register our resolver with vLLM (entry point ``vllm.general_plugins``); do nothing without the variables.

    Every vLLM process calls this, workers too, some of them twice. So heavy imports wait for the first adapter request.
    """
    if "MTA_VLLM_BANK" not in os.environ:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    from mta.serving.vllm.resolver import Resolver

    if "mta" not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver("mta", Resolver())

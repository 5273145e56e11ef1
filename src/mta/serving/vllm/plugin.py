"""The plugin as vLLM sees it, in each of its processes.

Where these are set, its server answers the names of ``wire_name``:

MTA_VLLM_BANK     folder of the bank
MTA_VLLM_STORE    folder or URL of the store
MTA_VLLM_FOLDER   folder in memory for the adapters, one that only this user may read
MTA_VLLM_RANK     vLLM's --max-lora-rank
"""

from __future__ import annotations

import os


def register() -> None:
    """Offer our resolver to vLLM (entry point ``vllm.general_plugins``). Without the variables nothing happens.

    Every process passes here, workers too, and any of them twice: what is heavy is imported when somebody is asked for.
    """
    if "MTA_VLLM_BANK" not in os.environ:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    from mta.serving.vllm.resolver import Resolver

    if "mta" not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver("mta", Resolver())

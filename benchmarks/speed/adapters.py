"""The peer with many adapters in one model: PEFT as people merge and serve with it today."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.speed.data import BASE
from mta.lora.batch import Factors, LoraBatch
from mta.system.hub import local_folder


class ManyPeft:
    """The base model as transformers loads it, with every adapter of ``batch`` under its number as a name."""

    def __init__(self, model: Any, batch: LoraBatch) -> None:
        import peft

        config = lora_config(batch)
        self.names = [str(n) for n in range(len(batch))]
        self.model: Any = peft.get_peft_model(model, config, self.names[0], autocast_adapter_dtype=False)
        for name in self.names[1:]:
            self.model.add_adapter(name, config, autocast_adapter_dtype=False)
        self.model.eval()
        self.layers = {layer: self.model.base_model.model.get_submodule(layer) for layer in batch.names}
        with torch.no_grad():
            for layer, (a, b) in batch.factors.items():
                for n, name in enumerate(self.names):
                    self.layers[layer].lora_A[name].weight.copy_(a[n])
                    self.layers[layer].lora_B[name].weight.copy_(b[n])

    def adapter(self, name: str) -> LoraBatch:
        """One adapter as it is now, with scale 1."""
        found = {
            layer: Factors(
                module.lora_A[name].weight.detach()[None],
                module.scaling[name] * module.lora_B[name].weight.detach()[None],
            )
            for layer, module in self.layers.items()
        }
        return LoraBatch(found)

    def merge(self, numbers: Sequence[int], weights: Sequence[float], name: str, **how: Any) -> None:
        """A new adapter ``name`` from those of ``numbers``; keywords as in ``add_weighted_adapter``."""
        assert name not in self.model.peft_config  # else PEFT would return without having merged anything
        with torch.device(self.model.device):  # else PEFT makes new layers on the host, and copies them
            self.model.add_weighted_adapter([str(n) for n in numbers], list(weights), name, **how)

    def forget(self, prefix: str) -> None:
        """Delete the adapters whose names begin so."""
        for name in [name for name in self.model.peft_config if name.startswith(prefix)]:
            self.model.delete_adapter(name)


def lora_config(batch: LoraBatch) -> Any:
    """What PEFT calls adapters of this rank and scale on these layers."""
    import peft

    return peft.LoraConfig(
        r=batch.rank,
        lora_alpha=batch.scale * batch.rank,
        target_modules=batch.names,
        lora_dropout=0.0,
        init_lora_weights=False,  # all weights are copied
        task_type="CAUSAL_LM",
    )


def plain_model(dtype: str) -> Any:
    """SmolLM2-135M with nothing done to it, ready to answer."""
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    how = {"dtype": kind, "attn_implementation": "sdpa", "trust_remote_code": False}
    return AutoModelForCausalLM.from_pretrained(local_folder(BASE), **how).eval()

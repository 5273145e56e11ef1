"""The other side of ``multi_lora``: MoE-PEFT training many LoRAs in one pass, in its own environment, without mta.

Run as ``python moe_peft_peer.py FOLDER``. FOLDER has the model (``base/``), ``work.json``, and ``start.safetensors``.
Each line of standard input is a request in JSON, each line of standard output its answer.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from moe_peft import LLMModel, LoraConfig
from moe_peft.common import LLMBatchConfig, LLMModelInput
from safetensors.torch import load_file, save_file

_NO_DROPOUT = 1e-12  # its adapters need a rate above zero; this one keeps every number


class Peer:
    """The base, and one adapter for each person, as MoE-PEFT's own trainer has them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, json.loads((folder / "work.json").read_text())
        torch.set_num_threads(self.work["threads"])
        dtype = getattr(torch, self.work["dtype"])
        torch.backends.cuda.matmul.allow_tf32 = dtype == torch.bfloat16  # its adapters are float32
        self.model = LLMModel.from_pretrained(str(folder / "base"), device=self.work["device"], load_dtype=dtype)
        self.people = [str(n) for n in range(len(self.work["people"]))]
        self.start: dict[str, dict[str, torch.Tensor]] = {person: {} for person in self.people}
        for name, tensor in load_file(folder / "start.safetensors", device=self.work["device"]).items():
            person, _, own = name.partition("/")
            self.start[person][own] = tensor
        for person, start in self.start.items():
            self.model.init_adapter(self._config(person), dict(start))

    def gradient(self) -> dict[str, Any]:
        """Write the gradient of each adapter on all examples of its person; return the losses."""
        losses = list(map(float, self._backward(self.people)))
        named: dict[str, Any] = {
            f"{person}/{name}": t.grad for person in self.people for name, t in self._parameters(person).items()
        }
        save_file({name: grad.contiguous() for name, grad in named.items()}, self.folder / "gradient.safetensors")
        for person in self.people:
            for tensor in self._parameters(person).values():
                tensor.grad = None
        _settle()
        return {"losses": losses}

    def train(self, together: int) -> dict[str, Any]:
        """Train everybody from the start, so many people in one pass; return the last losses."""
        losses = []
        for first in range(0, len(self.people), together):
            some = self.people[first : first + together]
            optimizers = [self._optimizer(person) for person in some]
            for _ in range(self.work["steps"]):
                last = self._backward(some)
                for person, optimizer in zip(some, optimizers):
                    torch.nn.utils.clip_grad_norm_(list(self._parameters(person).values()), self.work["clip"])
                    optimizer.step()
                    optimizer.zero_grad()
            losses += last
        _settle()
        return {"losses": list(map(float, losses))}

    def _optimizer(self, person: str) -> torch.optim.Optimizer:
        with torch.no_grad():
            for name, tensor in self._parameters(person).items():
                tensor.copy_(self.start[person][name])
        fused = self.work["device"].startswith("cuda") or None
        return torch.optim.AdamW(list(self._parameters(person).values()), fused=fused, **self.work["adamw"])

    def _backward(self, people: list[str]) -> list[torch.Tensor]:
        """One forward and one backward pass over all examples of these people, as its dispatcher and trainer do it.

        Its trainer computes layers again in the backward pass to save memory; here it need not.
        """
        examples = [example for person in people for example in self.work["people"][int(person)]]
        width = max(len(example["tokens"]) for example in examples)
        padded = {"tokens": 0, "labels": -100, "mask": 0}
        columns = {
            key: [example[key] + [fill] * (width - len(example[key])) for example in examples]
            for key, fill in padded.items()
        }
        rows, at = [], 0
        for person in people:
            count = len(self.work["people"][int(person)])
            rows.append(LLMBatchConfig(adapter_name_=person, batch_start_idx_=at, batch_end_idx_=at + count))
            at += count
        outputs = self.model.forward(
            LLMModelInput(
                batch_configs_=rows,
                batch_tokens_=columns["tokens"],
                batch_labels_=columns["labels"],
                batch_masks_=columns["mask"],
            )
        )
        sum(output.loss for output in outputs).backward()
        return [output.loss.detach() for output in outputs]  # a number would make a GPU wait

    def _parameters(self, person: str) -> dict[str, torch.Tensor]:
        found = self.model.get_adapter_weight_dict(person)
        return {name: tensor for name, tensor in found.items() if tensor.requires_grad and "lora_" in name}

    def _config(self, person: str) -> LoraConfig:
        return LoraConfig.from_config(
            {
                "name": person,
                "task_name": "casual",
                "r": self.work["rank"],
                "lora_alpha": self.work["alpha"],
                "lora_dropout": _NO_DROPOUT,
                "target_modules": self.work["layers"],
            }
        ).check()


def _settle() -> None:
    """Wait for the device: what is still queued belongs to this request."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Answer requests until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what the package prints is no answer
    peer = Peer(Path(sys.argv[1]))
    print("{}", file=answers, flush=True)  # loaded
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(peer, request.pop("do"))(**request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

"""PEFT's own way to answer many people in one batch: ``adapter_names``, each person's LoRA loaded beforehand."""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.serve.load import prompt
from benchmarks.serve.server import made_up, opened
from mta.lora.peft import write_peft
from mta.serving.vllm.adapters import LoraExporter
from mta.system.hub import local_folder
from mta.system.process import keep_freed_memory

RANK = 16


def generated(folder: str, people: int, most: int, seconds: float, dtype: str) -> float:
    """Tokens a second of whole batches: nobody comes or goes, which is to its advantage."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, bank = opened(Path(folder), dtype)
    made = LoraExporter(bank.anchors, bank.task_lora, bank.hash, RANK)
    plain = AutoModelForCausalLM.from_pretrained(local_folder(base.name), dtype=base.dtype, trust_remote_code=False)
    plain = plain.to(base.device)
    model: Any = None
    with tempfile.TemporaryDirectory() as place:
        for person in map(str, range(people)):
            write_peft(Path(place) / person, made.adapter(made_up(base, bank, person)), base.name)
            if model is None:
                model = PeftModel.from_pretrained(plain, f"{place}/{person}", adapter_name=person)
            else:
                model.load_adapter(f"{place}/{person}", adapter_name=person)
    model.eval()
    tokenizer, draw = base.tokenizer, random.Random(0)
    tokenizer.padding_side = "left"
    count, start = 0, 0.0
    names = [str(n) for n in range(people)]
    with torch.inference_mode():
        while count == 0 or time.monotonic() - start < seconds:
            texts = [prompt(draw, draw.randrange(40, 120)) for _ in names]
            rows = tokenizer(texts, return_tensors="pt", padding=True).to(base.device)
            model.generate(**rows, adapter_names=names, max_new_tokens=most, min_new_tokens=most, do_sample=False)
            if start == 0.0:  # the first batch warms up
                start, count = time.monotonic(), 1
                continue
            count += people * most
    return (count - 1) / (time.monotonic() - start)


if __name__ == "__main__":
    keep_freed_memory()  # as the command line does
    bank, people, most, seconds, dtype = sys.argv[1:]
    print(json.dumps({"tokens/s": round(generated(bank, int(people), int(most), float(seconds), dtype), 1)}))

"""What a person's adapter loses in a vLLM slot, and how long it takes to make: our way, and QR and SVD of all ranks.

python -m benchmarks.serve.cut --bank demo/bank --store demo/people --person 367
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from mta.bank.format import read_adapters, read_info
from mta.lora.batch import join
from mta.lora.merge import merge_exact, truncate
from mta.serving.vllm.adapters import LoraExporter
from mta.store import Store


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--bank", type=Path, default=Path("demo/bank"))
    words.add_argument("--store", default="demo/people")
    words.add_argument("--person", required=True)
    words.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32])
    args = words.parse_args()
    torch.set_num_threads(1)  # as in vLLM's process
    info, state = read_info(args.bank), Store(args.store).load(args.person)
    anchors, pooled = read_adapters(args.bank, info)
    merged = merge_exact(anchors, torch.tensor([state.anchors]), torch.tensor([state.w]))
    whole = join([pooled, merged]) if pooled else merged
    for rank in args.ranks:
        made = LoraExporter(anchors, pooled, info.hash, rank)
        start = time.perf_counter()
        _, error = made.adapter(state)
        middle = time.perf_counter()
        _, least = truncate(whole, rank - (state.stack.rank if state.stack else 0))
        row = {"rank": rank, "error": error, "seconds": middle - start}
        print(json.dumps(row | {"least error": float(least), "its seconds": time.perf_counter() - middle}))


if __name__ == "__main__":
    main()

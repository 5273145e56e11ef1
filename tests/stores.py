"""A made-up person with states and exported adapters, for tests of stores."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mta.data.history import Item, Person
from mta.lora.batch import Factors, LoraBatch
from mta.lora.peft import WEIGHTS, write_peft
from mta.store import Store
from mta.store.exports import Export
from mta.store.state import State, state_key
from mta.system.atomic import file_sha256

ANN = "ann.müller@example.org"


def adapter(seed: int = 0, dtype: torch.dtype = torch.float32, adapters: int = 1) -> LoraBatch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    sizes = {"layers.10.up": (4, 6), "layers.2.up": (4, 6), "layers.2.down": (6, 4)}
    return LoraBatch({n: Factors(normal(adapters, 1, d), normal(adapters, o, 1)) for n, (d, o) in sizes.items()}, 0.1)


def state(seed: int = 0, stack: LoraBatch | None = None, **changes: object) -> State:
    work = state_key("b" * 64, "h" * 64, "rank: 1\n", seed)
    made = State("b" * 64, (7, 3), (0.1 + 0.2, -1e-17), "posterior", "h" * 64, work, seed, stack or adapter(seed))
    return replace(made, **changes)


def person(id: str = ANN) -> Person:
    item = Item({"text": "Grüße 😀 \ud800", "score": "4"}, 3.25, "i1")
    return Person(id, (Item({"text": "old"}), item), (Item({"text": "q"}, 1e300, None, True),))


def everything(root: Path) -> Iterator[tuple[Path, bytes]]:
    for path in root.rglob("*"):
        yield path, path.read_bytes() if path.is_file() else b""


def exported(folder: Path, seed: int = 0) -> Export:
    write_peft(folder, adapter(seed), "base")
    return replace(Export.begun(folder), sha256=file_sha256(folder / WEIGHTS))


def record_export(store: Store, id: str = ANN) -> None:
    """Record an export that another host wrote."""
    export = Export("host", "/folder", "0" * 64)
    store.exports._change(id, lambda known: [*known, export])


def export_from(store: Store, folder: Path, seed: int = 0) -> Export:
    with store.session(ANN).exporting(ANN, folder) as written:
        write_peft(folder, adapter(seed), "base", on_weights=written)
    return store.exports.of(ANN)[-1]

"""``mta export``: one person as an ordinary PEFT folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mta.cli.options import BankDir, Device, Json, StoreUrl, Words, open_bank, show_json


def export(
    person: Annotated[str, typer.Argument(help="Whose model.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    words: Words = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Compress to this rank by svd; the error is reported.")
    ] = None,
    bank: BankDir = Path("bank"),
    store: StoreUrl = "people",
    device: Device = None,
    json: Json = False,
) -> None:
    """Write task LoRA, merge and stack of a person as one PEFT adapter for the untouched base.

    The store notes where, readable only with the person's id: mta forget removes the adapter too.

    Example:  mta export ann --out ann-adapter/ --rank 16
    """
    from mta.personalize import Personalizer

    base, opened, run = open_bank(bank, words, device=device)
    error = Personalizer(base, opened, store, run=run).export(person, out, rank=rank)
    if json:
        return show_json({"folder": str(out), "relative_error": error})
    typer.echo(f"{out}: written" + (f"; rank {rank} causes a relative error of {error:.2%}" if rank else ""))

"""``mta export``: one person as an ordinary PEFT folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mta.cli.options import (
    BankDir,
    Device,
    Json,
    Private,
    StoreUrl,
    Words,
    Yes,
    agreed,
    open_bank,
    show_json,
    show_parcel,
)


def export(
    person: Annotated[str, typer.Argument(help="Whose model.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    words: Words = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Compress to this rank by svd; the error is reported.")
    ] = None,
    push: Annotated[str | None, typer.Option(help="Push it to this repository on the hub too: owner/name.")] = None,
    private: Private = True,
    yes: Yes = False,
    bank: BankDir = Path("bank"),
    store: StoreUrl = "people",
    device: Device = None,
    json: Json = False,
) -> None:
    """Write task LoRA, merge and stack of a person as one PEFT adapter for the untouched base.

    The store notes where, readable only with the person's id: mta forget removes the adapter too. What is pushed
    to a hub is shown first; mta forget can only name it.

    Example:  mta export ann --out ann-adapter/ --rank 16
    """
    from mta.personalize import Personalizer
    from mta.store.exports import adapter_parcel

    base, opened, run = open_bank(bank, words, device=device)
    personal = Personalizer(base, opened, store, run=run)
    told: dict[str, object] = {"folder": str(out), "relative_error": personal.export(person, out, rank=rank)}
    if not json:
        causes = f"; rank {rank} causes a relative error of {told['relative_error']:.2%}" if rank else ""
        typer.echo(f"{out}: written{causes}")
    if push:
        show_parcel(adapter_parcel(out), push, private, err=True)
        agreed(yes)
        told["url"] = personal.push_to_hub(person, out, push, private=private)
    if json:
        show_json(told)
    elif push:
        typer.echo(told["url"])

"""``mta export``: write one person's model as a PEFT adapter."""

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
    person: Annotated[str, typer.Argument(help="Person id.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    words: Words = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Compress to this rank with SVD, and print the error.")
    ] = None,
    push: Annotated[str | None, typer.Option(help="Also push the adapter to this hub repository: owner/name.")] = None,
    private: Private = True,
    yes: Yes = False,
    bank: BankDir = Path("bank"),
    store: StoreUrl = "people",
    device: Device = None,
    json: Json = False,
) -> None:
    """Write a person's task LoRA, merge and stack as one PEFT adapter for the unchanged base.

    The store records the folder, readable only with the person's id, so that mta forget removes the adapter too.
    A push lists its files first. mta forget can only name pushed copies.

    Example:  mta export ann --out ann-adapter/ --rank 16
    """
    from mta.personalize import Personalizer
    from mta.store.exports import adapter_parcel

    base, opened, run = open_bank(bank, words, device=device)
    personal = Personalizer(base, opened, store, run=run)
    result: dict[str, object] = {"folder": str(out), "relative_error": personal.export(person, out, rank=rank)}
    if not json:
        causes = f"; rank {rank} causes a relative error of {result['relative_error']:.2%}" if rank else ""
        typer.echo(f"{out}: written{causes}")
    if push:
        show_parcel(adapter_parcel(out), push, private, err=True)
        agreed(yes)
        result["url"] = personal.push_to_hub(person, out, push, private=private)
    if json:
        show_json(result)
    elif push:
        typer.echo(result["url"])

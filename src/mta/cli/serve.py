"""``mta serve``: everybody's models behind OpenAI's API."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mta.cli.options import MERGE_AND_STACK, BankDir, Config, Device, Json, Seed, StoreUrl, Words, open_bank, show_json


def serve(
    words: Words = None,
    bank: BankDir = Path("bank"),
    store: StoreUrl = "people",
    keys: Annotated[Path | None, typer.Option(help="File of API keys.", dir_okay=False)] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at.")] = 8000,
    insecure_local: Annotated[
        bool, typer.Option("--insecure-local", help="Ask nobody for a key; on this machine alone.")
    ] = False,
    new_key: Annotated[
        str | None, typer.Option(help="Add a key of this name to the file of keys, show it once, and end.")
    ] = None,
    rights: Annotated[str, typer.Option(help="Of the new key: admin, serve, person or prefix.")] = "admin",
    of: Annotated[str, typer.Option(help="Of the new key: the person's id, or the prefix of ids.")] = "",
    slots: Annotated[int, typer.Option(min=1, help="Answers at once.")] = 32,
    rate: Annotated[int, typer.Option(min=0, help="Requests a minute for each key; 0 for any number.")] = 0,
    config: Config = None,
    seed: Seed = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Serve everybody in a store from one base: OpenAI's API, model="person:<id>".

    Example:  mta serve --bank bank/ --store people/ --keys keys.yaml
    """
    _need_extra()
    from mta.machine import in_passing
    from mta.serving.limits import Limits
    from mta.serving.serve import keys_for, service_of
    from mta.serving.serve import serve as run_server
    from mta.store import Store

    if new_key is not None:
        return _add_key(keys, new_key, rights, of, json)
    known = keys_for(keys, host, insecure_local)
    Store(store).check()
    base, opened, run = in_passing(partial(open_bank, bank, words, seed, device, config, open_to=MERGE_AND_STACK))
    service = service_of(base, opened, store, run, known, Limits(rate=rate), slots=slots)

    def ready(url: str) -> None:
        show_json({"url": url}) if json else typer.echo(f"Serving at {url}/v1 (Ctrl-C ends it)", err=True)

    run_server(service, host, port, ready)


def _add_key(keys: Path | None, name: str, rights: str, of: str, json: bool) -> None:
    from mta.errors import ConfigError
    from mta.serving.auth import add_key

    if keys is None:
        raise ConfigError("a new key needs a file to go into", hint="Name one:  --keys keys.yaml")
    secret = add_key(keys, name, rights, of)
    if json:
        return show_json({"name": name, "key": secret})
    typer.echo(secret)


def _need_extra() -> None:
    from importlib.util import find_spec

    from mta.errors import ConfigError

    if missing := [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]:
        raise ConfigError(
            f"serving needs {missing[0]}, which is not installed", hint="pip install 'merge-then-adapt[serve]'"
        )

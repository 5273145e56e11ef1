"""``mta serve``: serve all people's models with OpenAI's API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from mta.cli import options
from mta.cli.screen import show_json
from mta.errors import ConfigError
from mta.system.extras import require


def serve(
    words: options.Words = None,
    bank: options.BankDir = Path("bank"),
    store: options.StoreUrl = "people",
    keys: Annotated[Path | None, Option(help="File with API keys.", dir_okay=False)] = None,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    insecure_local: Annotated[
        bool, Option("--insecure-local", help="Require no API key; only for this machine.")
    ] = False,
    new_key: Annotated[
        str | None, Option(help="Add a key of this name to the key file, print it once, and exit.")
    ] = None,
    rights: Annotated[str, Option(help="Rights of the new key: admin, serve, person or prefix.")] = "admin",
    of: Annotated[str, Option(help="Person id, or prefix of ids, of the new key.")] = "",
    slots: Annotated[int, Option(min=1, help="Maximum number of simultaneous answers.")] = 32,
    vllm: Annotated[str | None, Option(help="Start vLLM and answer with it: the Python of its environment.")] = None,
    vllm_args: Annotated[str, Option(help="More arguments for vLLM, as one string.")] = "",
    vllm_url: Annotated[str | None, Option(help="Answer with a vLLM server that runs here: http://… or unix:…")] = None,
    vllm_folder: Annotated[
        Path | None, Option(help="MTA_VLLM_FOLDER of the --vllm-url server.", file_okay=False, exists=True)
    ] = None,
    bank_before: Annotated[
        Path | None, Option(help="Old bank: serves its people until they are personalized with --bank.")
    ] = None,
    rate: Annotated[int, Option(min=0, help="Requests per minute and key; 0 = no limit.")] = 0,
    strict: Annotated[
        bool, Option("--strict", help="Do not answer with a bank that was trained on a forgotten person.")
    ] = False,
    config: options.Config = None,
    seed: options.Seed = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Serve all people in a store from one base, with OpenAI's API: model="person:<id>".

    Example:  mta serve --bank bank/ --store people/ --keys keys.yaml
    """
    require("serve")
    from mta.serving import launch as serving
    from mta.system.device import in_passing

    if new_key is not None:
        return _add_key(keys, new_key, rights, of, json)
    known = serving.keys_for(keys, host, insecure_local, port)
    remote = serving.remote_of(vllm_url, vllm_folder, vllm) if vllm_url else None
    weights = not (remote or vllm)
    serving.check(store, [folder for folder in (bank, bank_before) if folder], strict, not weights)
    opened = in_passing(lambda: options.open_bank(bank, words, seed, device, config, options.MERGE_AND_STACK, weights))

    def show(url: str) -> None:
        show_json({"url": url}) if json else typer.echo(f"Serving at {url}/v1 (Ctrl-C stops it)", err=True)

    with serving.vllm_of(vllm, remote, opened[0], bank, store, slots=slots, args=vllm_args) as server:
        service = serving.service_of(
            *opened, store, known, rate=rate, slots=slots, vllm=server, before=bank_before, strict=strict
        )
        serving.serve(service, host, port, show)


def _add_key(keys: Path | None, name: str, rights: str, of: str, json: bool) -> None:
    from mta.serving.api.auth import add_key

    if keys is None:
        raise ConfigError("--new-key needs a file for the key", hint="Name a file:  --keys keys.yaml")
    secret = add_key(keys, name, rights, of)
    if json:
        return show_json({"name": name, "key": secret})
    typer.echo(secret)
    typer.echo("The key is shown only once. A running server accepts it after a restart.", err=True)

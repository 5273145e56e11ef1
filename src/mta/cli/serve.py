"""``mta serve``: serve all people's models with OpenAI's API."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mta.cli.options import MERGE_AND_STACK, BankDir, Config, Device, Json, Seed, StoreUrl, Words, open_bank, show_json
from mta.system.extras import require

KeysFile = Annotated[Path | None, typer.Option(help="File with API keys.", dir_okay=False)]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")]
InsecureLocal = Annotated[bool, typer.Option("--insecure-local", help="Require no API key; only for this machine.")]
NewKey = Annotated[str | None, typer.Option(help="Add a key of this name to the key file, print it once, and exit.")]
Rights = Annotated[str, typer.Option(help="Rights of the new key: admin, serve, person or prefix.")]
Of = Annotated[str, typer.Option(help="Person id, or prefix of ids, of the new key.")]
Slots = Annotated[int, typer.Option(min=1, help="Maximum number of simultaneous answers.")]
Vllm = Annotated[str | None, typer.Option(help="Start vLLM and answer with it: the Python of its environment.")]
VllmArgs = Annotated[str, typer.Option(help="More arguments for vLLM, as one string.")]
VllmUrl = Annotated[str | None, typer.Option(help="Answer with a vLLM server that runs here: http://… or unix:…")]
VllmFolder = Annotated[
    Path | None, typer.Option(help="MTA_VLLM_FOLDER of the --vllm-url server.", file_okay=False, exists=True)
]
BankBefore = Annotated[
    Path | None, typer.Option(help="Old bank: serves its people until they are personalized with --bank.")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Do not answer with a bank that was trained on a forgotten person.")
]
Rate = Annotated[int, typer.Option(min=0, help="Requests per minute and key; 0 = no limit.")]


def serve(
    words: Words = None,
    bank: BankDir = Path("bank"),
    store: StoreUrl = "people",
    keys: KeysFile = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    insecure_local: InsecureLocal = False,
    new_key: NewKey = None,
    rights: Rights = "admin",
    of: Of = "",
    slots: Slots = 32,
    vllm: Vllm = None,
    vllm_args: VllmArgs = "",
    vllm_url: VllmUrl = None,
    vllm_folder: VllmFolder = None,
    bank_before: BankBefore = None,
    rate: Rate = 0,
    strict: Strict = False,
    config: Config = None,
    seed: Seed = None,
    device: Device = None,
    json: Json = False,
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
    serving.check(store, [folder for folder in (bank, bank_before) if folder], strict, bool(remote or vllm))
    opened = in_passing(lambda: open_bank(bank, words, seed, device, config, MERGE_AND_STACK, not (remote or vllm)))
    with serving.vllm_of(vllm, remote, opened[0], bank, store, slots=slots, args=vllm_args) as server:
        service = serving.service_of(
            *opened, store, known, rate=rate, slots=slots, vllm=server, before=bank_before, strict=strict
        )
        serving.serve(service, host, port, partial(_show, json))


def _show(json: bool, url: str) -> None:
    show_json({"url": url}) if json else typer.echo(f"Serving at {url}/v1 (Ctrl-C stops it)", err=True)


def _add_key(keys: Path | None, name: str, rights: str, of: str, json: bool) -> None:
    from mta.errors import ConfigError
    from mta.serving.api.auth import add_key

    if keys is None:
        raise ConfigError("--new-key needs a file for the key", hint="Name a file:  --keys keys.yaml")
    secret = add_key(keys, name, rights, of)
    if json:
        return show_json({"name": name, "key": secret})
    typer.echo(secret)
    typer.echo("The key is shown only once. A running server accepts it after a restart.", err=True)

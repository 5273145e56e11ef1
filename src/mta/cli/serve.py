"""``mta generate`` and ``mta serve``: answer one question in this process, or all requests as OpenAI's API."""

from __future__ import annotations

from contextlib import suppress
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

import mta
from mta.cli import options
from mta.cli.screen import show_json
from mta.data.readers.rejects import Bad
from mta.data.readers.rows import text_in
from mta.errors import ConfigError, DataError
from mta.system.extras import require

if TYPE_CHECKING:
    from mta.personalize.adapters import PersonOrModel
    from mta.personalize.personalizer import Question


def generate(
    question: Annotated[str, Argument(help='A text, or fields of the task as JSON: {"title": …, "genres": …}.')],
    words: options.Words = None,
    person: Annotated[list[str] | None, Option(help="Person id; repeat the option for several people.")] = None,
    bank: options.BankDir = Path("bank"),
    store: options.StoreUrl = "people",
    write: Annotated[bool, Option("--write", help="Generate text even if the task has labels.")] = False,
    max_new_tokens: Annotated[
        int | None, Option(min=1, help="Longest answer in tokens; default: the task's answer_tokens.")
    ] = None,
    shared: Annotated[
        bool, Option("--shared", help="Also ask the shared models: the pooled model and the base.")
    ] = False,
    config: options.Config = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Ask several people's models the same question, in one batch.

    If the task has labels, every label is scored, as in mta compare. The answer is the most likely label, and the
    shares of all labels are shown. Otherwise, the answer is generated token by token.

    Example:  mta generate "Great sound, weak battery." --person ann --person bob --shared
    """
    asked = _fields(question)
    base, opened, run = options.open_bank(bank, words, device=device, config=config)
    personal = mta.Personalizer(base, opened, store, run=run)
    people: list[PersonOrModel] = [*(person or []), *([mta.TASK, mta.BASE] if shared or not person else [])]
    rows = [(who, asked) for who in people]
    options.check_written(opened.task, write, max_new_tokens)
    shares: list[dict[str, float]] = [{} for _ in rows]
    if opened.task.labels and not write:
        shares = personal.shares(rows)
        answers = [next(iter(own)) for own in shares]
    else:
        answers = personal.generate(rows, max_new_tokens=max_new_tokens)
    said = []
    for who, answer, own in zip(people, answers, shares):
        name, kind = (who, "person") if isinstance(who, str) else (f"({who.value})", who.value)
        said.append({"person": name, "model": kind, "answer": answer} | ({"shares": own} if own else {}))
        if not json:
            detail = "  ".join(f"{label} {share:.0%}" for label, share in own.items())
            typer.echo(f"{name}: {answer}" + (f"   {detail}" if own else ""))
    if json:
        show_json(said)


def _fields(question: str) -> Question:
    """Return the fields of a question that is a JSON object; another text unchanged. Raises DataError."""
    fields: dict[str, object] = {}
    if question.lstrip().startswith("{"):
        with suppress(ValueError, RecursionError):
            fields = loads(question)
    try:
        return {name: text_in(fields, name) for name in fields} or text_in({"question": question}, "question")
    except Bad as bad:
        raise DataError(
            f"the question's field {bad.field!r}: {bad.reason}",
            hint='Give each field a text, for example \'{"title": "Heat", "genres": "Crime"}\'.',
        ) from None


def serve(
    words: options.Words = None,
    bank: options.BankDir = Path("bank"),
    store: options.StoreUrl = "people",
    keys: Annotated[Path | None, Option(help="File with API keys.", dir_okay=False)] = None,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    insecure_local: Annotated[
        bool, Option("--insecure-local", help="Allow a start without API keys, for this machine only.")
    ] = False,
    new_key: Annotated[
        str | None, Option(help="Add a key with this name to the key file, print the key once, and exit.")
    ] = None,
    secret: Annotated[
        Path | None, Option(help="Write the new key to this new, private file instead of printing it.", dir_okay=False)
    ] = None,
    rights: Annotated[
        str | None, Option(help="Rights of the new key: admin (the default), serve, person or prefix.")
    ] = None,
    scope: Annotated[str, Option(help="Person id, or prefix of ids, of the new key.")] = "",
    slots: Annotated[int, Option(min=1, help="Maximum answers at once; a person's key gets at most a quarter.")] = 32,
    vllm: Annotated[str | None, Option(help="Answer with vLLM: path of the Python in vLLM's environment.")] = None,
    vllm_args: Annotated[str, Option(help="More arguments for vLLM, as one string.")] = "",
    rate: Annotated[int, Option(min=0, help="Requests per minute and key; 0 = no limit.")] = 0,
    strict: Annotated[
        bool, Option("--strict", help="Do not answer with a bank that was trained on a forgotten person.")
    ] = False,
    config: options.Config = None,
    seed: options.Seed = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Serve the models of all people in a store from one base, with OpenAI's API: model="person:<id>".

    Example:  mta serve --bank bank/ --store people/ --keys keys.yaml
    """
    require("serve")
    if new_key is not None:
        return _add_key(keys, new_key, rights or "admin", scope, secret, json)
    from mta.serving import launch as serving
    from mta.system.device import run_in_short_thread

    of_key = {"--secret": secret, "--rights": rights, "--scope": scope}
    if unused := next((name for name, given in of_key.items() if given), None):
        raise ConfigError(f"{unused} needs --new-key", hint="Add it, or leave this one out:  mta serve --help")
    if vllm_args and not vllm:
        raise ConfigError("--vllm-args needs --vllm", hint="Add it, or leave this one out:  mta serve --help")
    known = serving.keys_for(keys, host, insecure_local, port)
    serving.check(store, bank, strict)
    changes = options.MERGE_AND_STACK
    opened = run_in_short_thread(
        lambda: options.open_bank(
            bank, words, seed=seed, device=device, config=config, open_to=changes, weights=not vllm
        )
    )

    def show(url: str) -> None:
        show_json({"url": url}) if json else typer.echo(f"Serving at {url}/v1 (Ctrl-C stops it)", err=True)

    with serving.vllm_of(vllm, opened[0], bank, store, slots=slots, args=vllm_args) as server:
        service = serving.service_of(*opened, store, known, rate=rate, slots=slots, vllm=server, strict=strict)
        serving.serve(service, host, port, show)


def _add_key(keys: Path | None, name: str, rights: str, scope: str, out: Path | None, json: bool) -> None:
    from mta.serving.api.auth import add_key
    from mta.system.atomic import replacing

    if keys is None:
        raise ConfigError("--new-key needs a file for the key", hint="Name a file:  --keys keys.yaml")
    if out:
        if out.exists() or out.resolve() == keys.resolve():
            raise ConfigError(f"{out} exists already, and may hold another key", hint="Name a new file with --secret.")
        with replacing(out) as file:  # only its owner reads it; if it cannot be written, no key is added
            file.write(f"{add_key(keys, name, rights, scope)}\n".encode())
        return show_json({"name": name, "file": str(out)}) if json else typer.echo(f"{out}: the key {name!r}", err=True)
    secret = add_key(keys, name, rights, scope)
    if json:
        return show_json({"name": name, "key": secret})
    typer.echo(secret)
    typer.echo("The key is shown only once. A running server accepts it after a restart.", err=True)

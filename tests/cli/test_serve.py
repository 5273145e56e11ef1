"""``mta serve`` in a real process: OpenAI's client, and user mistakes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import openai
import pytest
from conftest import people_of
from tiny import save_base
from traces import spellings

from mta.config import Run
from mta.personalize import Personalizer
from mta.serving.api.auth import Keys

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a tiny base, a bank, and a store with one person."""
    from mta.bank.bank import Bank
    from mta.model.base import BaseModel

    root = tmp_path_factory.mktemp("serve")
    save_base(root / "base")
    settings = {"anchors": 2, "min_items": 3, "training": {"epochs": 1}}
    run = Run(base=str(root / "base"), encoder="base", bank=settings, task_lora={"items": 8})
    base = BaseModel.of(run)
    bank = Bank.build(base, people_of(12), root / "bank", task="movielens-rating", run=run)
    Personalizer(base, bank, root / "people").personalize(people_of(1, prefix="ann"))
    return root


def at(made):
    """The options that name its bank and its store."""
    return ["--bank", str(made / "bank"), "--store", str(made / "people")]


def mta(*words, **how):
    return subprocess.run([sys.executable, "-m", "mta", *words], capture_output=True, text=True, timeout=600, **how)


def test_a_new_key_is_written_to_a_new_file_that_only_its_owner_reads(tmp_path):
    keys, secret = tmp_path / "keys.yaml", tmp_path / "app.key"
    found = mta("serve", "--keys", str(keys), "--new-key", "app", "--secret", str(secret))
    assert (found.returncode, found.stdout) == (0, "")
    assert secret.stat().st_mode & 0o077 == 0
    assert Keys.load(keys).of(secret.read_text().strip()).name == "app"


def test_create_a_key_then_start_ask_and_stop_a_server(made):
    keys = made / "keys.yaml"
    found = mta("serve", "--keys", str(keys), "--new-key", "app", "--rights", "serve", "--json")
    secret = json.loads(found.stdout)["key"]
    assert secret not in keys.read_text()
    assert keys.stat().st_mode & 0o077 == 0
    words = ["serve", *at(made), "--keys", str(keys), "--port", "0"]
    server = subprocess.Popen(
        [sys.executable, "-m", "mta", *words, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output = ""
        while not output.rstrip().endswith("}"):
            output += server.stdout.readline()
            assert server.poll() is None, server.stderr.read()
        client = openai.OpenAI(base_url=f"{json.loads(output)['url']}/v1", api_key=secret, max_retries=3)
        run_the_documented_snippets(json.loads(output)["url"], secret, made)
        asked = {"messages": [{"role": "user", "content": "Film 3"}], "max_tokens": 5, "temperature": 0}
        assert client.chat.completions.create(model="person:ann0", **asked).usage.completion_tokens <= 5
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="person:bartholomew", **asked)
        item = {"fields": {"title": "Film 3", "genres": "Drama", "rating": "4"}}
        with httpx2.Client(base_url=json.loads(output)["url"], headers={"Authorization": f"Bearer {secret}"}) as http:
            for path in ("/v1/people/ann0", "/v1/people/bartholomew"):
                http.get(path, timeout=60)
            http.post("/v1/people/bartholomew/history", json={"items": [item]}, timeout=60)
    finally:
        server.send_signal(signal.SIGTERM)
        said = "".join(server.communicate(timeout=600)).encode()
    assert server.returncode in (0, -signal.SIGTERM)
    for text in ("Film 3", "ann0", "bartholomew"):
        assert not any(word in said for word in spellings(text)), text


def run_the_documented_snippets(url, secret, folder):
    """Run the client snippets of the docs; only the address and the person differ."""
    root = Path(__file__).parents[2]
    python, curl = (
        re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", (root / page).read_text(), re.DOTALL)[1]
        .replace("http://127.0.0.1:8000", url)
        .replace("person:ann", "person:ann0")
        for name, page in (("openai", "docs/how-to/serve.md"), ("curl", "docs/how-to/serve.md"))
    )
    (folder / "app.key").write_text(secret + "\n")
    snippets = [[sys.executable, "-c", python], *([["bash", "-euc", curl]] if shutil.which("curl") else [])]
    for words in snippets:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert "person:ann0" in done.stdout


def test_a_server_can_listen_on_ipv6(made):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    words = ["serve", *at(made), "--insecure-local", "--host", "::1"]
    command = [sys.executable, "-m", "mta", *words, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            found = next(re.search(r"http://\[::1\]:\d+", line) for line in server.stderr if "Serving at" in line)
            body = {"model": "person:ann0", "prompt": "hello", "max_tokens": 2}
            assert httpx2.post(f"{found[0]}/v1/completions", json=body, timeout=60).status_code == 200
        finally:
            server.send_signal(signal.SIGINT)


def test_strict_refuses_a_bank_trained_on_a_forgotten_person(made, tmp_path):
    bank = shutil.copytree(made / "bank", tmp_path / "bank")
    (bank / "needs-rebuild.json").write_text('{"needs_rebuild": ["anchor"]}')
    words = ["serve", "--bank", str(bank), "--store", str(made / "people"), "--insecure-local", "--strict"]
    found = mta(*words)
    assert found.returncode == 1
    assert "a forgotten person is in the anchor" in found.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no API key"),
        (["--insecure-local", "--host", "0.0.0.0"], "this machine only"),
        (["--new-key", "x"], "needs a file"),
        (["--keys", "KEYS", "--new-key", "x", "--rights", "person"], "'scope' is required"),
        (["--insecure-local", "--store", "nowhere"], "no store"),
        (["--insecure-local", "--rights", "person", "--scope", "ann"], "--rights needs --new-key"),
    ],
)
def test_mistakes_are_reported_and_nothing_is_served(made, tmp_path, words, said):
    words = [str(tmp_path / "keys.yaml") if word == "KEYS" else word for word in words]
    environment = {name: value for name, value in os.environ.items() if name != "MTA_API_KEY"}
    found = mta("serve", "--bank", str(made / "bank"), *words, cwd=tmp_path, env=environment)
    assert found.returncode == 1
    assert said in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "keys.yaml").exists()

"""A server that ends while its gateway runs; a script stands in for vLLM."""

import os
import signal
import sys
from pathlib import Path

import kill
import pytest

from mta.errors import MtaError
from mta.serving.vllm.server import VllmServer, VllmSettings

SERVER = f"""#!{sys.executable}
import http.server, socketserver, sys

class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def address_string(self):
        return "here"

path = next(word.removeprefix("--uds=") for word in sys.argv if word.startswith("--uds="))
socketserver.UnixStreamServer(path, Healthy).serve_forever()
"""


@pytest.fixture(autouse=True)
def parent(tmp_path, monkeypatch):
    """A folder instead of /dev/shm and /tmp, where servers of other tests may run."""
    monkeypatch.setattr(Path, "is_dir", lambda path, is_dir=Path.is_dir: str(path) != "/dev/shm" and is_dir(path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def server(tmp_path):
    script = tmp_path / "python"
    script.write_text(SERVER)
    script.chmod(0o700)
    running = VllmServer(VllmSettings(str(script), "base", "bank", "people", 64))
    running.start()
    yield running
    running.stop()


def test_a_server_that_ends_is_reported_with_its_exit_status_and_not_restarted(server, caplog):
    assert server.up
    assert str(server.gone()).startswith("vLLM does not answer\n")
    os.killpg(server._process.pid, signal.SIGKILL)
    server._process.wait()
    assert not server.up
    reported: MtaError = server.gone()
    assert str(reported) == "the vLLM server ended (exit status -9)\n  Restart the gateway:  mta serve"
    assert str(server.log) in caplog.text
    server.stop()
    assert not server.folder.exists()


def test_a_stop_that_is_interrupted_still_kills_the_server(server, monkeypatch):
    process, wait = server._process, server._process.wait
    os.kill(process.pid, signal.SIGSTOP)  # like a server that hangs, it does not obey SIGTERM
    os.waitpid(process.pid, os.WUNTRACED)  # SIGTERM would still end it before it stops

    def interrupted(seconds):
        monkeypatch.setattr(process, "wait", wait)
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.stop()
    assert process.poll() == -signal.SIGKILL


def test_the_folder_of_a_gateway_that_was_killed_with_its_server_is_removed_by_the_next(server, parent):
    def dying():
        killed = VllmServer(VllmSettings(sys.executable, "base", "bank", "people", 64))
        (killed.folder / "adapter").write_text("ann's")
        (parent / "left").write_text(str(killed.folder))
        os.kill(os.getpid(), signal.SIGKILL)

    assert kill._attempt(dying) == -signal.SIGKILL
    left = Path((parent / "left").read_text())
    (parent / "mta-vllm-others").mkdir()  # of a vLLM that runs on its own, with a lock of its last gateway
    (parent / "mta-vllm-others" / "gateway.lock").touch()
    (parent / "mta-vllm-link").symlink_to(left)
    assert (left / "adapter").exists()
    following = VllmServer(server.settings)
    assert not left.exists()
    assert server.folder.exists()
    assert (parent / "mta-vllm-others").exists()
    following.stop()
    assert server.folder.exists()

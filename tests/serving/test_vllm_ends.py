"""A server that ends while its gateway runs; a script stands in for vLLM."""

import os
import signal
import sys

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

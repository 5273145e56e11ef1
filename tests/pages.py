"""Code in the documents: what stands in a page, and running a page in a folder, block by block.

A comment before a block says what is done with it; without one, bash and python are run, and nothing else is.

    <!-- shown: why -->    not run (a bucket, a hub, hours): its commands are read by the command line all the same
    <!-- file: name -->    written to that file
    <!-- serves -->        a server: started in the background until the page ends; the page goes on when it is ready
    <!-- own: where -->    run by a test of its own
    <!-- a name -->        for a test that takes this block alone as well
"""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILT = {"changelog.md", "contributing.md"}  # copied beside the pages by docs/conf.py
PAGES = sorted(
    page
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md")]
    if not {"_build", "results"} & set(page.relative_to(ROOT).parts) and page.name not in BUILT
)
NOT_RUN = ("shown", "own")
_BLOCK = re.compile(
    r"(?m)^(?:<!-- (?P<mark>[\w-]+)(?:: (?P<of>[^\n]*?))? -->\n)?```(?P<language>[\w{}-]+)\n(?P<code>.*?)^```",
    re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    language: str
    mark: str
    of: str
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(m["language"], m["mark"] or "", m["of"] or "", m["code"], text.count("\n", 0, m.start("code")) + 1)
        for m in _BLOCK.finditer(text)
    ]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run(page: Path, folder: Path) -> None:
    """Every block of a page in turn, in ``folder``; raises at the first that fails. Python blocks share their names.

    Servers listen at a free port in the place of 8000, which another program may have taken.
    """
    os.chdir(folder)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    names, port = {"__name__": "page"}, free_port()
    with ExitStack() as servers:
        for block in blocks(page):
            block = replace(block, code=block.code.replace("127.0.0.1:8000", f"127.0.0.1:{port}"))
            sys.stderr.write(f"--- {page.name}:{block.line} {block.language} {block.mark}\n")
            if block.mark == "file":
                Path(block.of).write_text(block.code, encoding="utf-8")
            elif block.mark == "serves":
                servers.enter_context(_served(block.code, port))
            elif block.mark not in NOT_RUN and block.language == "bash":
                subprocess.run(["bash", "-euxo", "pipefail", "-c", block.code], check=True)
            elif block.mark not in NOT_RUN and block.language == "python":
                exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
                for name in re.findall(r"(?m)^def (test_\w+)\(\)", block.code):
                    names[name]()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


class _served:
    """A server that is running while the block lasts."""

    def __init__(self, code: str, port: int) -> None:
        command, self._url = code.strip().removesuffix(" --port 8000"), f"http://127.0.0.1:{port}/readyz"
        self._process = subprocess.Popen(["bash", "-c", f"exec {command} --port {port}"])

    def __enter__(self) -> None:
        for _ in range(600):
            assert self._process.poll() is None, "the server has ended"
            with suppress(OSError):
                urllib.request.urlopen(self._url)
                return
            time.sleep(0.2)
        raise TimeoutError("the server is not ready")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)


if __name__ == "__main__":
    run(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))

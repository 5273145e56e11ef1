"""A folder of tiny wheels as the only place where pip looks, and assets in them."""

import hashlib
import os
import zipfile

import pytest

from mta.system import assets
from mta.system.assets import Asset

MEMBERS = {"tiny_words/words.txt": b"one two three", "tiny_words/deep/more.txt": b"four"}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def build_wheel(folder, members, name="tiny-words"):
    """A wheel as pip knows it; the metadata is all pip looks at before downloading."""
    module = name.replace("-", "_")
    path = folder / f"{module}-1.0-py3-none-any.whl"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        info = f"{module}-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def tiny_asset(wheel, members=MEMBERS, name="tiny"):
    return Asset(
        name=name,
        requirement="tiny-words==1.0",
        wheel_sha256=sha256(wheel.read_bytes()),
        wheel_bytes=wheel.stat().st_size,
        folder="tiny_words",
        files=tuple(path.partition("/")[2] for path in members),
        licence="CC0-1.0",
    )


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """The only place pip looks at."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("MTA_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def offer(monkeypatch):
    """Make assets known beside the real ones."""

    def put(*more):
        monkeypatch.setattr(assets, "ASSETS", {**assets.ASSETS, **{asset.name: asset for asset in more}})

    return put

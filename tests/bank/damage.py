"""A copy of the tiny bank that a test may damage."""

import json
import shutil
from pathlib import Path

import pytest
from tiny import base_of

from mta.bank.bank import Bank
from mta.bank.format import seal
from mta.errors import BankCorrupt

HASHED = (
    "anchors.safetensors",
    "calibration.safetensors",
    "index.safetensors",
    "task_lora/adapter_config.json",
    "task_lora/adapter_model.safetensors",
)
BASE = base_of()


@pytest.fixture
def folder(tiny_bank_folder, tmp_path, cache):
    """A copy of the bank that a test may damage."""
    return Path(shutil.copytree(tiny_bank_folder, tmp_path / "bank"))


def corrupt(folder: Path, **how) -> str:
    with pytest.raises(BankCorrupt) as caught:
        Bank.open(folder, BASE, **how)
    return str(caught.value)


def flipped(path: Path, place: int, bits: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bits
    path.write_bytes(data)


def rewritten(folder: Path, **values) -> None:
    """Change the description and seal it anew, as another version of mta would have written it."""
    path = folder / "bank.json"
    described = json.loads(path.read_text()) | values
    del described["sha256"]
    path.write_text(json.dumps(described | {"sha256": seal(described)}))

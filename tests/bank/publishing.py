"""A bank that a test publishes, and a hub that refuses."""

import pytest
from conftest import people_of
from damage import BASE
from huggingface_hub import constants

from mta.bank.bank import Bank

NEW = people_of(2, prefix="x", seed=7)
NAME = "somebody/bank"


@pytest.fixture
def logged_out(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))


@pytest.fixture
def bank(folder):
    return Bank.open(folder, BASE)


def refused(kind, function, *given, **how) -> str:
    with pytest.raises(kind) as caught:
        function(*given, **how)
    return str(caught.value)

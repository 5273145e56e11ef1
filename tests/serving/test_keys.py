"""The file of API keys."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from mta.errors import ConfigError
from mta.serving.api import auth
from mta.serving.api.auth import Keys, add_key


def test_concurrently_added_keys_are_all_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(auth, "_WAIT", 600.0)  # however slow the disk is
    path = tmp_path / "keys" / "keys.yaml"
    with ThreadPoolExecutor(8) as pool:
        shown = list(pool.map(lambda n: add_key(path, f"key{n}", "serve"), range(24)))
    keys = Keys.load(path)
    assert {keys.of(secret).name for secret in shown} == {f"key{n}" for n in range(24)}
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}


def test_a_key_file_locked_for_too_long_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(auth, "_WAIT", 0.0)
    with auth.FileLock(tmp_path / ".keys.yaml.lock"), pytest.raises(ConfigError, match=r"keys\.yaml"):
        add_key(tmp_path / "keys.yaml", "ops", "admin")
    assert not (tmp_path / "keys.yaml").exists()

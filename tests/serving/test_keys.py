"""The file of API keys."""

import hmac
from concurrent.futures import ThreadPoolExecutor

import pytest

from mta.errors import ConfigError
from mta.serving.api import auth
from mta.serving.api.auth import Keys, add_key

SECRET = "x" * 24


def test_a_secret_is_compared_with_every_key_in_constant_time(tmp_path, monkeypatch):
    secrets = [add_key(tmp_path / "keys.yaml", f"key{n}", "serve") for n in range(3)]
    keys, compared = Keys.load(tmp_path / "keys.yaml"), []
    compare = hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda one, other: (compared.append(one), compare(one, other))[1])
    for secret, name in [*((secret, f"key{n}") for n, secret in enumerate(secrets)), ("wrong", None)]:
        compared.clear()
        found = keys.of(secret)
        assert (found and found.name, len(compared)) == (name, 3)


def test_keys_have_names_that_differ(tmp_path):
    """Limits and caches are kept by name; an empty one would have the operator's limits."""
    path = tmp_path / "keys.yaml"
    with pytest.raises(ConfigError, match="name"):
        add_key(path, "", "person", "ann")
    add_key(path, "ann", "person", "ann")
    entry = path.read_text()
    path.write_text(entry + entry.partition("keys:\n")[2])
    with pytest.raises(ConfigError, match="two keys are named 'ann'"):
        Keys.load(path)


def test_a_key_from_the_environment_is_an_admins():
    keys = Keys.load(None, SECRET)
    assert (keys.of(SECRET).rights, keys.of("other")) == ("admin", None)


def test_keys_that_are_added_at_once_are_all_kept(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: add_key(tmp_path / "keys.yaml", f"key{n}", "serve"), range(24)))
    assert len(Keys.load(tmp_path / "keys.yaml").keys) == 24


def test_a_key_that_is_not_the_only_one_of_its_name_or_secret_is_refused(tmp_path):
    """A client's key in the environment of the server would make the client an admin."""
    path = tmp_path / "keys.yaml"
    secret = add_key(path, "app", "serve")
    with pytest.raises(ConfigError, match="two keys have the same secret"):
        Keys.load(path, secret)
    add_key(path, auth.ENV, "serve")
    with pytest.raises(ConfigError, match=f"two keys are named '{auth.ENV}'"):
        Keys.load(path, SECRET)


@pytest.mark.parametrize("secret", ["a", SECRET[:-1]])
def test_a_short_key_in_the_environment_is_refused(secret):
    with pytest.raises(ConfigError, match=f"MTA_API_KEY has {len(secret)} characters, expected 24 or more"):
        Keys.load(None, secret)

"""API keys with rights, stored as hashes. Without a valid key no request is answered.

    admin       everything, for all people
    serve       use any person's model; neither see nor change any person's data
    person      one person's model, history, and state
    prefix      the same for all people whose id starts with the prefix

A key file is YAML: under ``keys``, a list of ``{name, sha256, rights, scope}``. ``mta serve --new-key ann --rights
person --scope ann`` adds one and shows the key once.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock
from pydantic import Field, model_validator

from mta.config.loader import Settings, checked, dump_yaml, read_yaml
from mta.errors import ConfigError
from mta.system.atomic import file_mode, make_folder, write_text

ENV = "MTA_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # without keys, only these hosts are served
_LEAST = 24  # characters of a key from the environment
Rights = Literal["admin", "serve", "person", "prefix"]


class Key(Settings):
    """One key: its hash and rights. ``scope`` is a person's id or an id prefix."""

    name: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    rights: Rights
    scope: str = ""

    @model_validator(mode="after")
    def _scope_matches_rights(self) -> Key:
        if bool(self.scope) != (self.rights in ("person", "prefix")):
            raise ValueError("'scope' is required with rights 'person' and 'prefix', and not allowed with other rights")
        return self

    @property
    def share(self) -> str:
        """Name under which usage is counted and limited; empty for the operator's keys."""
        return self.name if self.rights in ("person", "prefix") else ""

    def owns(self, person: str) -> bool:
        """Whether the key may see and change a person's data, and use the person's model."""
        owned = {"admin": True, "person": person == self.scope, "prefix": person.startswith(self.scope)}
        return owned.get(self.rights, False)

    def may_ask(self, person: str) -> bool:
        """Whether the key may use a person's model."""
        return self.rights == "serve" or self.owns(person)


LOCAL = Key(name="local", sha256="0" * 64, rights="admin")  # any program on this machine


class Keys(Settings):
    """All keys; without any key, no caller needs one (loopback only)."""

    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _names_differ(self) -> Keys:
        names = Counter(key.name for key in self.keys)
        if twice := next((name for name, count in names.items() if count > 1), None):
            raise ValueError(f"two keys are named {twice!r}; limits and caches are kept by name")
        if len({key.sha256 for key in self.keys}) < len(names):
            raise ValueError("two keys have the same secret, so its rights are unclear")
        return self

    @classmethod
    def load(cls, path: Path | None, secret: str | None = None) -> Keys:
        """Load the keys of a file, and an admin key from the environment (``secret``). Raises ConfigError."""
        if secret and len(secret) < _LEAST:
            raise ConfigError(
                f"{ENV} has {len(secret)} characters, expected {_LEAST} or more: shorter keys can be guessed",
                hint=f'Set a random one:  export {ENV}="$(openssl rand -base64 32)"',
            )
        try:
            in_file = checked(cls, read_yaml(path), str(path)).keys if path else ()
        except ConfigError as error:
            there = path and path.exists()
            what = "Correct that file, or make another one:" if there else "This command creates a key file:"
            hint = f"{what}  mta serve --keys keys.yaml --new-key ops"
            raise ConfigError(error.message, hint=hint) from None
        from_env = (Key(name=ENV, sha256=_hash(secret), rights="admin"),) if secret else ()
        return checked(cls, {"keys": (*in_file, *from_env)}, f"{path} and {ENV}", hint=f"Leave it out:  unset {ENV}")

    def of(self, secret: str) -> Key | None:
        """Return the key that matches a secret, or None. Compares with every key, so the time reveals nothing."""
        shown = _hash(secret)
        matching = [key for key in self.keys if hmac.compare_digest(key.sha256, shown)]
        return matching[0] if matching else None


def add_key(path: Path, name: str, rights: str, scope: str = "") -> str:
    """Add a new key to a key file; return the secret, which is stored nowhere. Raises ConfigError."""
    secret = f"mta-{secrets.token_urlsafe(32)}"
    values = {"name": name, "sha256": _hash(secret), "rights": rights, "scope": scope}
    new = checked(Key, values, "the new key", hint="For example:  --rights person --scope ann")
    try:
        make_folder(path.parent)
        with FileLock(path.with_name(f".{path.name}.lock"), mode=file_mode()):
            before = checked(Keys, read_yaml(path), str(path)).keys if path.exists() else ()
            if new.name in {key.name for key in before}:
                raise ConfigError(
                    f"{path} already has a key named {new.name!r}", hint="Choose another name, or remove that key."
                )
            write_text(path, dump_yaml(Keys(keys=(*before, new))))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}", hint="Check the permissions.") from None
    return secret


def _hash(secret: str) -> str:
    # Keys are 256 random bits and cannot be guessed, so a slow hash would protect nothing.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()

"""Who may do what: API keys, stored as hashes, each bound to rights. Without a key there is no service.

    admin       everything, for everybody
    serve       ask any person's model; see and change nothing of them
    person      one person's model, history and state
    prefix      the same for everybody whose id begins so

A key file is YAML, a list of ``{name, sha256, rights, of}``; ``mta serve --new-key ann --rights person --of ann`` adds
one and shows the key once.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock
from pydantic import Field, model_validator

from mta.config.loader import Settings, checked, dump_yaml, read_yaml
from mta.errors import ConfigError
from mta.system.atomic import file_mode, make_folder, write_text

ENV = "MTA_API_KEY"
_WAIT = 10.0  # seconds for another process that adds a key
Kind = Literal["admin", "serve", "person", "prefix"]


class Key(Settings):
    """One key: its hash, and what it may do. ``of`` is the person's id, or the prefix of ids."""

    name: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    rights: Kind
    of: str = ""

    @model_validator(mode="after")
    def _of_somebody(self) -> Key:
        if bool(self.of) != (self.rights in ("person", "prefix")):
            raise ValueError("'of' names whom rights 'person' and 'prefix' are for, and goes with them alone")
        return self

    @property
    def share(self) -> str:
        """Under which name what it takes is counted and bounded; empty for the operator's own keys."""
        return self.name if self.rights in ("person", "prefix") else ""

    def owns(self, person: str) -> bool:
        """Whether it may see and change what is kept of a person, and ask for them."""
        own = (self.rights == "person" and person == self.of) or (
            self.rights == "prefix" and person.startswith(self.of)
        )
        return own or self.rights == "admin"

    def may_ask(self, person: str) -> bool:
        """Whether it may be answered by a person's model."""
        return self.rights == "serve" or self.owns(person)


class _KeyFile(Settings):
    keys: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True)
class Keys:
    """All keys; none of them means that nobody is asked for one (loopback only)."""

    keys: tuple[Key, ...]

    @classmethod
    def load(cls, path: Path | None, secret: str | None = None) -> Keys:
        """Keys of a file, and an admin key given in the environment. Raises ConfigError."""
        found = checked(_KeyFile, _read(path), str(path), hint=_MAKE).keys if path else ()
        own = (Key(name=ENV, sha256=_hash(secret), rights="admin"),) if secret else ()
        return cls((*found, *own))

    def of(self, secret: str) -> Key | None:
        """The key a caller shows; every comparison is made, and takes the same time, whatever it finds."""
        shown, found = _hash(secret), None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, shown):
                found = key
        return found


_MAKE = "Keys stand in a file that this makes:  mta serve --keys keys.yaml --new-key ops"


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path)
    except ConfigError as error:
        raise ConfigError(error.message, hint=_MAKE) from None


LOCAL = Key(name="local", sha256="0" * 64, rights="admin")  # whoever sits at the machine itself


def add_key(path: Path, name: str, rights: str, of: str = "") -> str:
    """A new key in a key file; returns the secret, which is written nowhere. Raises ConfigError.

    Threads and processes that add keys at the same time wait for each other.
    """
    secret = f"mta-{secrets.token_urlsafe(32)}"
    new = checked(
        Key,
        {"name": name, "sha256": _hash(secret), "rights": rights, "of": of},
        "the new key",
        "For example:  --rights person --of ann",
    )
    try:
        make_folder(path.parent)
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=_WAIT, mode=file_mode()):
            _add(path, new)
    except OSError as error:  # a lock that is not given in time is one too
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}",
            hint="Give the right to write there, or wait for whatever adds a key now, and repeat the command.",
        ) from None
    return secret


def _add(path: Path, new: Key) -> None:
    before = checked(_KeyFile, read_yaml(path), str(path)) if path.exists() else _KeyFile()
    if new.name in {key.name for key in before.keys}:
        raise ConfigError(
            f"{path} has a key called {new.name!r} already", hint="Choose another name, or remove its lines."
        )
    write_text(path, dump_yaml(_KeyFile(keys=(*before.keys, new))))


def _hash(secret: str) -> str:
    # Keys are 256 random bits, which nobody can guess: a slow hash would protect nothing.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()

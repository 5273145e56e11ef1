"""Names of weights: an asset, a local folder, or a hub id; and repositories on the hub, read and written to."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mta.errors import AssetError, HubError
from mta.system.assets import ASSETS, resolve
from mta.system.model_files import ADAPTER, WEIGHTS, modules_of

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SMALL = ("*.json", "*.jinja", "tokenizer.model", "*.txt")  # configuration and tokenizer
_LOGIN = "Log in:  hf auth login   (or set HF_TOKEN)"


@dataclass(frozen=True, slots=True)
class Parcel:
    """What would leave this machine: files (or their bytes) by their names there, and what to know before they do."""

    files: Mapping[str, Path | bytes]
    facts: Mapping[str, str] = field(default_factory=dict)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: len(it) if isinstance(it, bytes) else it.stat().st_size for name, it in self.files.items()}


def is_hub_id(name: str) -> bool:
    """Whether a name reads ``owner/name`` and is no folder here."""
    return bool(_ID.fullmatch(name)) and not Path(name).exists()


def is_cached(name: str) -> bool:
    """Whether weights of that hub id were downloaded before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def local_folder(name: str) -> str:
    """Return the folder of an asset, a local folder, or a hub snapshot of the files that are loaded.

    Of a hub repository only configuration, tokenizer, and weights in safetensors are downloaded. Raises AssetError,
    ModelError.
    """
    place = resolve(name)
    if Path(place).is_dir():
        return place
    try:
        folder = snapshot(place, _SMALL, ignore=[ADAPTER])
        # One file first: where a repository has both, transformers loads it and not the shards.
        for wanted in (_single_files, _all_files):
            lacking = [file for file in wanted(folder, name) if not file.exists()]
            if lacking:
                snapshot(place, [os.path.relpath(file, folder) for file in lacking], folder.name)
    except HubError as error:
        raise AssetError(
            f"{name!r} is neither an asset ({', '.join(ASSETS)}) nor a folder, and the hub did not give it: "
            f"{error.message}",
            hint=error.hint,
        ) from None
    return str(folder)


def _single_files(folder: Path, name: str) -> list[Path]:
    return [folder / module.path / WEIGHTS for module in modules_of(folder, name) if module.weight_files(folder, name)]


def _all_files(folder: Path, name: str) -> list[Path]:
    return [file for module in modules_of(folder, name) for file in module.weight_files(folder, name)]


def snapshot(
    repo: str,
    patterns: Sequence[str],
    revision: str | None = None,
    token: str | None = None,
    ignore: Sequence[str] = (),
) -> Path:
    """Files of a repository in the hub's cache, in a folder named by its commit. Raises HubError."""
    from huggingface_hub import snapshot_download

    which: dict[str, Any] = {"allow_patterns": list(patterns), "ignore_patterns": list(ignore)}
    with _told(repo):
        return Path(snapshot_download(repo, revision=revision, token=token, **which))


@dataclass(frozen=True, slots=True)
class Repository:
    """A model repository on the hub that can be written to."""

    name: str
    host: str
    private: bool
    _api: Any

    @classmethod
    def begin(cls, name: str, *, private: bool = True, token: str | None = None) -> Repository:
        """Create it where it is not there yet. Raises HubError; also where it is public and not meant to be."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with _told(name):
            api.create_repo(name, private=private, exist_ok=True)
            found = api.repo_info(name)
        if private and not found.private:
            raise HubError(
                f"{name} is there already, and public; nothing was sent",
                hint="Say --public (private=False), or make it private in its settings on the hub first.",
            )
        return cls(name, api.endpoint, bool(found.private), api)

    @property
    def url(self) -> str:
        """Where people look at it."""
        return f"{self.host}/{self.name}"

    def send(self, parcel: Parcel, message: str, ours: Sequence[str] = ()) -> str:
        """One commit of these files and no others, which takes away those of ``ours`` that are not among them.

        Returns the commit. Raises HubError; nothing has changed there then.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        with _told(self.name):
            there = self._api.list_repo_files(self.name)
            gone = [name for name in there if name in ours and name not in parcel.files]
            added = [
                CommitOperationAdd(name, it if isinstance(it, bytes) else str(it)) for name, it in parcel.files.items()
            ]
            removed = [CommitOperationDelete(name) for name in gone]
            return str(self._api.create_commit(self.name, [*added, *removed], commit_message=message).oid)


@contextlib.contextmanager
def _told(repo: str) -> Iterator[None]:
    """Whatever the hub's client raises within the block as a HubError: it has many kinds, of its own and of others."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        raise _as_ours(repo, error) from None


def _as_ours(repo: str, error: Exception) -> HubError:
    """What happened and what to do about it."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    first = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{repo!r} is gated, and you are not among those let in", f"Ask for access on its page. {_LOGIN}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(f"there is no {repo!r} on the hub, or it is private", f"Check the name. {_LOGIN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{repo!r} has no such revision", "Give a branch, a tag or a commit it has.")
    if isinstance(error, errors.LocalTokenNotFoundError) or status in (401, 403):
        return HubError(f"the hub does not let you at {repo!r}: {first}", f"{_LOGIN}, as somebody with rights to it.")
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{repo!r} is no name of a repository: {first}", "Write it as owner/name.")
    if status is not None:
        return HubError(f"the hub refused {repo!r}: {first}", "Try again later, or look at its page.")
    return HubError(
        f"{repo!r} cannot be had from the hub, or sent there: {first}",
        "Check the name and the network, or download it where there is one and give the folder.",
    )

"""Resolve names of weights (asset, local folder, hub id), and read and write repositories on the hub."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mta.errors import AssetError, HubError
from mta.system.assets import ASSETS, resolve
from mta.system.model_files import ADAPTER, WEIGHTS, modules_of

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SMALL = ("*.json", "*.jinja", "tokenizer.model", "*.txt")  # configuration and tokenizer
_LOGIN = "Log in:  hf auth login   (or set HF_TOKEN)"


@dataclass(frozen=True, slots=True)
class Upload:
    """Files to send to the hub, by their names there, and facts to show to the user before sending."""

    files: Mapping[str, Path | bytes]
    facts: Mapping[str, str]

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file."""
        return {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in self.files.items()}


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form ``owner/name`` and is not a local path."""
    return bool(_ID.fullmatch(name)) and not Path(name).exists()


def public_name(model: str) -> str:
    """Return a model's name for publication: that of an asset or on the hub, or the name of its folder here.

    What has the form ``owner/name`` is a name on the hub, whatever folders are here.
    """
    return model if model in ASSETS or _ID.fullmatch(model) else Path(model).name


def local_folder(name: str, weights: bool = True) -> str:
    """Return the folder of an asset, a local folder, or a hub snapshot of the files that are loaded.

    From a hub repository, only configuration, tokenizer and safetensors ``weights`` are downloaded. Raises AssetError,
    ModelError.
    """
    place = resolve(name)
    if Path(place).is_dir():
        return place
    try:
        folder = snapshot(place, _SMALL, ignore=[ADAPTER])
        # Single files first: if a repository has both, transformers loads the single file, not the shards.
        for wanted in (_single_files, _all_files) if weights else ():
            if lacking := [os.path.relpath(file, folder) for file in wanted(folder, name) if not file.exists()]:
                snapshot(place, lacking, folder.name)
    except HubError as error:
        raise AssetError(
            f"{name!r} is neither an asset ({', '.join(ASSETS)}) nor a folder, and not available on the hub: "
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
    """Download files of a repository to the hub's cache. Returns a folder named by the commit. Raises HubError."""
    from huggingface_hub import snapshot_download

    which: dict[str, Any] = {"allow_patterns": list(patterns), "ignore_patterns": list(ignore)}
    with _hub_errors(repo):
        return Path(snapshot_download(repo, revision=revision, token=token, **which))


def send(
    upload: Upload, repo: str, ours: Sequence[str], before: Callable[[str], None], private: bool, token: str | None
) -> str:
    """Commit the files of ``upload`` to a repository, which is created if missing, and return its web address.

    Calls ``before`` with the address, then sends. Deletes other files in the repository whose names are in ``ours``.
    Raises HubError, also for a repository of the other visibility; then no file has changed on the hub.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token)
    with _hub_errors(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        is_private = api.repo_info(repo).private
    if is_private != private:
        kind, expected = ("private", "public") if is_private else ("public", "private")
        raise HubError(
            f"{repo} exists and is {kind}, expected a {expected} repository; nothing was sent",
            hint=f"Give --{kind} (private={is_private}), or make it {expected} in its settings on the hub first.",
        )
    before(url := f"{api.endpoint}/{repo}")
    with _hub_errors(repo):
        there = api.list_repo_files(repo)
        changes: list[Any] = [
            CommitOperationDelete(name) for name in there if name in ours and name not in upload.files
        ]
        changes += [CommitOperationAdd(name, f if isinstance(f, bytes) else str(f)) for name, f in upload.files.items()]
        api.create_commit(repo, changes, commit_message="Publish a bank of mta")
    return url


@contextlib.contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Raise errors of the hub's client in the block as HubError. The client raises many types of errors."""
    try:
        yield
    except Exception as error:
        raise _hub_error(repo, error) from None


def _hub_error(repo: str, error: Exception) -> HubError:
    """Return the HubError for an error of the hub's client, with a hint."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    first = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, errors.GatedRepoError):
        return HubError(f"{repo!r} is gated, and you have no access", f"Request access on its page. {_LOGIN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(f"there is no {repo!r} on the hub, or it is private", f"Check the name. {_LOGIN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{repo!r} has no such revision", "Give a branch, a tag or a commit it has.")
    if isinstance(error, errors.LocalTokenNotFoundError) or status in (401, 403):
        return HubError(f"the hub denies access to {repo!r}: {first}", f"{_LOGIN}, with an account that has access.")
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{repo!r} is not a repository name: {first}", "Write it as owner/name.")
    if status is not None:
        return HubError(f"the hub refused {repo!r}: {first}", "Try again later, or check its page.")
    return HubError(
        f"{repo!r} cannot be downloaded from the hub, or sent to it: {first}",
        "Check the name and the network, or download it on another machine and give the folder.",
    )

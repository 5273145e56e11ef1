"""Where a person's adapter was exported to, so that forgetting finds it: the file beside their states.

A folder's name may say who its person is, and raw ids stand in no file of a store. So the list is written under a key
that is made of the store's key and of the id: only who has both reads it, as with the paths of the store.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mta.errors import InputError, StateCorrupt
from mta.hub import Parcel
from mta.lora.peft import CARD, CONFIG, WEIGHTS, has_own_card, read_peft, remove_asides

SCHEMA = 1
_NONCE = 16  # bytes, drawn anew for each writing: one keystream never covers two lists


@dataclass(frozen=True, slots=True)
class Export:
    """A folder an adapter was written to: on which host, its absolute path, the sha256 of the adapter's weights.

    The sha256 is empty while it is being written, and stays so where that was interrupted. One that was pushed to a
    hub has the hub's address as its host, and the repository as its folder.
    """

    host: str
    folder: str
    sha256: str = ""

    @classmethod
    def begun(cls, folder: str | Path) -> Export:
        """One that is about to be written on this host."""
        return cls(platform.node(), str(Path(folder).resolve()))

    @classmethod
    def pushed(cls, folder: str | Path, host: str, repository: str) -> Export:
        """The adapter of a folder, in a repository of a hub."""
        return cls(host, repository, _sha256(Path(folder) / WEIGHTS))

    def done(self) -> Export:
        """The same, now that the adapter lies in its folder."""
        return replace(self, sha256=_sha256(Path(self.folder) / WEIGHTS))

    def remove(self) -> str:
        """Remove the adapter's files, and the folder where nothing else is in it. Why not, in words, or nothing.

        Only on the host it was written on, and only while the weights are the very ones: whatever lies there now may be
        somebody else's. The weights go last, so that an interrupted removal can be repeated.
        """
        folder = Path(self.folder)
        if "://" in self.host:
            return f"{self.host}/{self.folder} (pushed there: delete it by hand)"
        if self.host != platform.node():
            return f"{self.folder} (on the host {self.host!r})"
        try:
            remove_asides(folder)
            if _sha256(folder / WEIGHTS) != self.sha256:
                return f"{self.folder} ({'its adapter was changed since' if self.sha256 else 'it was interrupted'})"
            (folder / CONFIG).unlink(missing_ok=True)
            if has_own_card(folder):
                (folder / CARD).unlink()
            (folder / WEIGHTS).unlink()
        except (FileNotFoundError, NotADirectoryError):
            if self.sha256 and not folder.is_dir():
                return f"{self.folder} (not there any more: it was removed before, or moved)"
        except OSError as error:
            return f"{self.folder} ({error.strerror})"
        with contextlib.suppress(OSError):  # other files are in it, or it is not there any more
            folder.rmdir()
        return ""


def adapter_parcel(folder: Path) -> Parcel:
    """What would leave this machine if the adapter that was exported to a folder were pushed; nothing is sent.

    A base that lies in a folder here is called by the folder's name alone. Raises InputError.
    """
    read_peft(folder)  # whole, and plain
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    base = str(config.get("base_model_name_or_path") or "")
    base = Path(base).name if Path(base).is_absolute() or Path(base).is_dir() else base
    if not has_own_card(folder):
        raise InputError(
            f"{folder} has no card that mta export wrote: what its {CARD} says would be published unread",
            hint="Export to a new folder, and push that.",
        )
    data = json.dumps(config | {"base_model_name_or_path": base}, indent=2).encode() + b"\n"
    facts = {
        "people": "this is one person's model: it was trained on their texts and tells something of them. "
        "Push it only where they agree, and under a name that does not say who they are",
        "base": base,
        "forgetting": "mta forget names the repository; deleting it, and copies others made, is by hand",
    }
    return Parcel({CARD: folder / CARD, CONFIG: data, WEIGHTS: folder / WEIGHTS}, facts)


def exports_to_bytes(exports: Sequence[Export], key: bytes) -> bytes:
    """A list of exports as JSON that only who has the ``key`` reads, sealed with a sha256."""
    nonce = secrets.token_bytes(_NONCE)
    hidden = _veiled(json.dumps([asdict(export) for export in exports]).encode(), key, nonce)
    rows = [nonce.hex(), hidden.hex()]
    return json.dumps({"schema": SCHEMA, "sha256": _sealed(rows), "exports": rows}).encode()


def exports_from_bytes(data: bytes, key: bytes, source: str = "the file") -> list[Export]:
    """The inverse of ``exports_to_bytes``. Raises StateCorrupt, under another key too."""
    nonce, hidden = check_exports(data, source)
    try:
        return [Export(**row) for row in json.loads(_veiled(hidden, key, nonce))]
    except (ValueError, TypeError, RecursionError):
        raise _corrupt(source, "another key") from None


def check_exports(data: bytes, source: str = "the file") -> tuple[bytes, bytes]:
    """Whether the file is whole, without the key; returns what it holds, unread. Raises StateCorrupt."""
    try:
        value = json.loads(data)
        if value["schema"] != SCHEMA or value["sha256"] != _sealed(value["exports"]):
            raise ValueError("another schema or sha256")
        nonce, hidden = map(bytes.fromhex, value["exports"])
        return nonce, hidden
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _corrupt(source, repr(error)) from error


def _corrupt(source: str, got: str) -> StateCorrupt:
    return StateCorrupt(
        f"{source} was changed or cut short: got {got}, expected schema {SCHEMA} and a list that fits the sha256",
        hint="Remove it; adapters that were exported before must then be found and removed by hand.",
    )


def _veiled(data: bytes, key: bytes, nonce: bytes) -> bytes:
    """Data under a keystream of key and nonce (SHAKE-256 as a keyed stream): its own inverse."""
    stream = hashlib.shake_256(key + nonce).digest(len(data))
    return bytes(a ^ b for a, b in zip(data, stream))


def _sealed(rows: object) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

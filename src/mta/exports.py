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

from mta.errors import StateCorrupt
from mta.lora.peft import CONFIG, WEIGHTS, remove_asides

SCHEMA = 1
_NONCE = 16  # bytes, drawn anew for each writing: one keystream never covers two lists


@dataclass(frozen=True, slots=True)
class Export:
    """A folder an adapter was written to: on which host, its absolute path, the sha256 of the adapter's weights.

    The sha256 is empty while it is being written, and stays so where that was interrupted.
    """

    host: str
    folder: str
    sha256: str = ""

    @classmethod
    def begun(cls, folder: str | Path) -> Export:
        """One that is about to be written on this host."""
        return cls(platform.node(), str(Path(folder).resolve()))

    def done(self) -> Export:
        """The same, now that the adapter lies in its folder."""
        return replace(self, sha256=_sha256(Path(self.folder) / WEIGHTS))

    def remove(self) -> str:
        """Remove the adapter's two files, and the folder where nothing else is in it. Why not, in words, or nothing.

        Only on the host it was written on, and only while the weights are the very ones: whatever lies there now may be
        somebody else's. The weights go last, so that an interrupted removal can be repeated.
        """
        folder = Path(self.folder)
        if self.host != platform.node():
            return f"{self.folder} (on the host {self.host!r})"
        try:
            remove_asides(folder)
            if _sha256(folder / WEIGHTS) != self.sha256:
                return f"{self.folder} ({'its adapter was changed since' if self.sha256 else 'it was interrupted'})"
            (folder / CONFIG).unlink(missing_ok=True)
            (folder / WEIGHTS).unlink()
        except (FileNotFoundError, NotADirectoryError):
            pass  # removed before
        except OSError as error:
            return f"{self.folder} ({error.strerror})"
        with contextlib.suppress(OSError):  # other files are in it, or it is not there any more
            folder.rmdir()
        return ""


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

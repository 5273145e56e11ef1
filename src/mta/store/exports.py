"""Records of where a person's adapters were exported to, so that ``forget`` finds them: exports.json beside the states.

The list names folders in clear, and a folder's name may identify its person. On local disks, only the owner can read
the file.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from mta.errors import StateCorrupt
from mta.lora.peft import CARD, CONFIG, WEIGHTS, has_own_card, remove_unfinished
from mta.store.state import opened_json, sealed_json
from mta.system.atomic import file_sha256, sync_folder
from mta.system.storage import Storage

SCHEMA = 3
_BY_HAND = "Remove the file; then find and remove adapters that were exported before by hand."


class Left(NamedTuple):
    """Why an exported adapter was not removed, and whether a later call may succeed."""

    why: str
    later: bool


@dataclass(frozen=True, slots=True)
class Export:
    """A folder with an exported adapter: host, absolute path, and sha256 of its weights ("": incomplete)."""

    host: str
    folder: str
    sha256: str = ""

    @classmethod
    def begun(cls, folder: str | Path) -> Export:
        """Return the record of an export that is about to be written on this host."""
        return cls(platform.node(), str(Path(folder).resolve()))

    def remove(self) -> Left | None:
        """Remove the adapter's files, and the folder if it is then empty. Return what is left, None if nothing is.

        Changed weights stay: they may belong to another person. The weights are removed last, so that an interrupted
        removal can be repeated. Exports on another host, on a disk that is not mounted, or without write permission can
        be removed later, and those that were changed or moved never.
        """
        folder = Path(self.folder)
        if self.host != platform.node() and not self.has_these_weights():  # each container has another host name
            return Left(f"{self.folder} (on the host {self.host!r})", later=True)
        try:
            remove_unfinished(folder)
            if file_sha256(folder / WEIGHTS) != self.sha256:
                why = "its adapter was changed since" if self.sha256 else "it was interrupted"
                return Left(f"{self.folder} ({why})", later=False)
            (folder / CONFIG).unlink(missing_ok=True)
            if has_own_card(folder):
                (folder / CARD).unlink()
            (folder / WEIGHTS).unlink()
            sync_folder(folder)
        except (FileNotFoundError, NotADirectoryError):
            if self.sha256:  # otherwise, the export was never finished
                why = "its weights are missing: removed, renamed, or on a disk that is not mounted"
                return Left(f"{self.folder} ({why})", later=not folder.parent.is_dir())
        except OSError as error:
            return Left(f"{self.folder} ({error.strerror or error})", later=True)
        with contextlib.suppress(OSError):  # the folder holds other files, or was removed already
            folder.rmdir()
            sync_folder(folder.parent)
        return None

    def has_these_weights(self) -> bool:
        """Return whether the folder holds these weights."""
        with contextlib.suppress(OSError):
            return file_sha256(Path(self.folder) / WEIGHTS) == self.sha256
        return False


@dataclass(frozen=True, slots=True)
class Exports:
    """The lists of exports of a store's people, each beside its person's states.

    ``path`` returns a person's folder from an id; its second argument is whether to create a missing store.
    """

    files: Storage
    path: Callable[[str, bool], str]

    def of(self, id: str) -> list[Export]:
        """Return the records of a person's exports. Raises StateCorrupt."""
        data = self.files.read(name := f"{self.path(id, False)}/exports.json")
        return [] if data is None else exports_from_bytes(data, self.files.at(name))

    def written(self, id: str, folder: Path) -> bool:
        """Return whether the adapter in a folder is an export of this person, perhaps one that was interrupted."""
        records = [export for export in self.of(id) if export.folder == Export.begun(folder).folder]
        return any(export.has_these_weights() or not (folder / WEIGHTS).exists() for export in records)

    @contextlib.contextmanager
    def writing(self, id: str, folder: str | Path) -> Iterator[Callable[[Path], None]]:
        """Record that a person's adapter is written to a folder of this host within the block.

        The export is recorded before the block, so that ``forget`` finds killed exports too. The yielded function
        records complete weights: call it before they appear in the folder. Raises StateCorrupt.
        """
        export = Export.begun(folder)
        self._change(id, lambda known: [*known, export])  # keep the record of an earlier export until it is replaced

        def written(weights: Path) -> None:
            nonlocal export
            begun, export = export, replace(export, sha256=file_sha256(weights))
            self._change(id, lambda known: [*_without(known, begun), export])

        try:
            yield written
        except (Exception, KeyboardInterrupt, SystemExit):  # as for a full disk: the earlier export is still there
            if not export.has_these_weights():
                self._change(id, lambda known: _without(known, export))
            raise
        place = export.host, export.folder
        self._change(id, lambda known: [*(one for one in known if (one.host, one.folder) != place), export])

    def forget(self, id: str, keep: bool = False) -> dict[Export | None, Left]:
        """Remove a person's exported adapters; return those that are left.

        Of their records, keep only those that a later call can remove; with ``keep``, keep all.
        """
        with self.files.locked():
            try:
                left: dict[Export | None, Left] = {one: found for one in self.of(id) if (found := one.remove())}
            except StateCorrupt as error:  # a damaged list must not stop `forget`
                left = {None: Left(f"all exports, if there are any ({error.message})", later=False)}
            self._write(id, [export for export, one in left.items() if export and (keep or one.later)])
        return left

    def _change(self, id: str, change: Callable[[list[Export]], list[Export]]) -> None:
        """Replace a person's list by the result of ``change``, under the store's lock."""
        self.path(id, True)  # creates the store, and so the folder of the lock
        with self.files.locked():
            self._write(id, change(self.of(id)))

    def _write(self, id: str, exports: Sequence[Export]) -> None:
        path = self.path(id, bool(exports))
        if exports:
            self.files.write(f"{path}/exports.json", exports_to_bytes(exports))
        else:
            self.files.remove(f"{path}/exports.json")
            remove_if_empty(self.files, path)


def remove_if_empty(files: Storage, folder: str) -> None:
    """Remove a person's folder if it is empty: even an empty folder would reveal that the person was in the store.

    On a local disk, files that another writer creates at the same time stay. Most object stores have no folders.
    """
    if not files.local:
        with contextlib.suppress(Exception):  # clients raise different errors, and most have no folders
            if not files.names(folder):  # some remove a folder with what is in it
                files.fs.rmdir(files.at(folder))
        return
    path = files.inside(folder)
    with contextlib.suppress(OSError):  # the folder is not empty, or was removed already
        path.rmdir()
        sync_folder(path.parent)


def _without(exports: Sequence[Export], export: Export) -> list[Export]:
    """Return the exports without one that equals ``export``; the record of a killed export may equal it too."""
    left = list(exports)
    with contextlib.suppress(ValueError):
        left.remove(export)
    return left


def exports_to_bytes(exports: Sequence[Export]) -> bytes:
    """Return a list of exports as JSON, with a sha256 that detects damage."""
    return sealed_json("exports", [asdict(export) for export in exports], SCHEMA)


def exports_from_bytes(data: bytes, source: str = "the file") -> list[Export]:
    """Invert ``exports_to_bytes``. Raises StateCorrupt."""
    return opened_json("exports", data, SCHEMA, source, _BY_HAND, lambda rows: [Export(**row) for row in rows])

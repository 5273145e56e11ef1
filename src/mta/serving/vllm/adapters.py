"""People's adapters as PEFT folders for vLLM, built from bank and store when a name is first requested."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mta.serving.engine import Version
    from mta.serving.vllm.lora_export import LoraExporter
    from mta.store.state import State

log = logging.getLogger("mta")
_OURS = re.compile(r"\.?[0-9a-f]{32}-[0-9a-f]{32}(\.json)?(\.[0-9a-f]{32})?")


def folder_of(name: str) -> str:
    """Return the folder name of an adapter: hashes of person and name, so that the path reveals no id."""
    from mta.serving.engine import Version
    from mta.serving.model_names import from_wire

    who = from_wire(name)
    return f"{_hash(who.person if isinstance(who, Version) else '')}-{_hash(name)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Adapters:
    """Builds adapters as PEFT folders on first request, by their name in vLLM."""

    def __init__(self, bank: Path, store: str, folder: Path, rank: int) -> None:
        self.bank, self.url, self.folder, self.rank = bank, store, folder, rank
        self._exporter: LoraExporter | None = None
        self._cleaned = False
        self._lock = threading.Lock()

    @classmethod
    def of_environment(cls) -> Adapters:
        """Read bank, store, folder, and rank from the environment of the vLLM server."""
        values = {name: os.environ[f"MTA_VLLM_{name}"] for name in ("BANK", "STORE", "FOLDER", "RANK")}
        return cls(Path(values["BANK"]), values["STORE"], Path(values["FOLDER"]), int(values["RANK"]))

    def path(self, name: str) -> Path | None:
        """Return the folder of an adapter; None if the name is unknown or the adapter cannot be built."""
        from mta.errors import MtaError

        try:
            with self._lock:
                self._clean()
                return self._path(name)
        except MtaError as error:
            log.warning("an adapter could not be built: %s", type(error).__name__)  # the message may hold an id
            return None

    def _clean(self) -> None:
        """Delete what an earlier server left, once; forgetting would not find those files."""
        if not self._cleaned:
            for left in self.folder.iterdir():
                if _OURS.fullmatch(left.name):
                    shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
            self._cleaned = True

    def _path(self, name: str) -> Path | None:
        from mta.lora.peft import read_peft, write_peft
        from mta.personalize.adapters import BASE, Nobody
        from mta.serving.model_names import from_wire
        from mta.system.atomic import write_json

        who = from_wire(name)
        if who is None or who is BASE:
            return None
        folder = self.folder / folder_of(name)
        if not folder.exists():
            state = who if isinstance(who, Nobody) else self._state(who)
            if state is None:
                return None
            adapter, error = self._lora_exporter().adapter(state, isinstance(who, Nobody) or who.stacked)
            write_json(note_of(self.folder, name), {"error": error})
            write_peft(folder, adapter, "")
        read_peft(folder)  # never give vLLM an unreadable adapter
        if isinstance(who, Nobody) or self._is_stored(who):
            return folder
        remove(self.folder, name)  # forgotten meanwhile
        return None

    def _lora_exporter(self) -> LoraExporter:
        from mta.bank.format import read_adapters, read_info, verify
        from mta.serving.vllm.lora_export import LoraExporter

        if self._exporter is None:
            info = read_info(self.bank)
            verify(self.bank, info)
            self._exporter = LoraExporter(*read_adapters(self.bank, info), info.hash, self.rank)
        return self._exporter

    def _state(self, who: Version) -> State | None:
        from mta.store import Store

        return Store(self.url).load(who.person, who.number) if self._is_stored(who) else None

    def _is_stored(self, who: Version) -> bool:
        """Whether the store holds that version with the same content."""
        from mta.store import Store

        seal = Store(self.url).seal(who.person, who.number)
        return seal is not None and seal.startswith(who.seal)


def note_of(folder: Path, name: str) -> Path:
    """Return the path of the file that holds an adapter's truncation error."""
    return folder / f"{folder_of(name)}.json"


def remove(folder: Path, name: str) -> None:
    """Delete an adapter's files. Call this only after vLLM unloaded the adapter: missing files crash vLLM."""
    shutil.rmtree(folder / folder_of(name), ignore_errors=True)
    note_of(folder, name).unlink(missing_ok=True)


def remove_all(folder: Path, person: str) -> None:
    """Delete all remaining files of a person's adapters, such as partial files from a server that stopped."""
    for left in (*folder.glob(f"{_hash(person)}-*"), *folder.glob(f".{_hash(person)}-*")):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

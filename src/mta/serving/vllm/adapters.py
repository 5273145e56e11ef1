"""People's adapters as PEFT folders for vLLM, built from bank and store when a name is first requested."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from functools import cached_property
from pathlib import Path

from mta.bank.format import read_adapters, read_info, verify
from mta.errors import MtaError
from mta.lora.peft import read_peft, write_peft
from mta.personalize.adapters import BASE, Nobody
from mta.serving.engine import Version
from mta.serving.model_names import from_wire
from mta.serving.vllm.lora_export import LoraExporter
from mta.store import Store
from mta.system.atomic import write_json

log = logging.getLogger("mta")
CUT = "cut.json"  # in an adapter's folder: the relative error of the truncation
_OURS = re.compile(r"\.?[0-9a-f]{32}-[0-9a-f]{32}(\.[0-9a-f]{32})?")


def folder_of(name: str) -> str:
    """Return the folder name of an adapter: hashes of person and name, so that the path reveals no id."""
    who = from_wire(name)
    return f"{_hash(who.person if isinstance(who, Version) else '')}-{_hash(name)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def remove_all(folder: Path, person: str) -> None:
    """Delete all files of a person's adapters, also partial files from a server that stopped.

    Call this only after vLLM unloaded the adapters: missing files crash vLLM.
    """
    for left in (*folder.glob(f"{_hash(person)}-*"), *folder.glob(f".{_hash(person)}-*")):
        shutil.rmtree(left, ignore_errors=True)


class Adapters:
    """Builds adapters as PEFT folders on first request, by their name in vLLM."""

    def __init__(self, bank: Path, store: str, folder: Path, rank: int) -> None:
        self.bank, self.store, self.folder, self.rank = bank, Store(store), folder, rank
        for left in folder.iterdir():  # of an earlier server: forgetting would not find those folders
            if _OURS.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)

    @cached_property
    def _exporter(self) -> LoraExporter:
        info = read_info(self.bank)
        verify(self.bank, info)
        return LoraExporter(*read_adapters(self.bank, info), info.hash, self.rank)

    def path(self, name: str) -> Path | None:
        """Return the folder of an adapter; None if the name is unknown or the adapter cannot be built."""
        who = from_wire(name)
        if who is None or who is BASE:
            return None
        try:
            return self._path(who, self.folder / folder_of(name))
        except MtaError as error:
            log.warning("an adapter could not be built: %s", type(error).__name__)  # the message may hold an id
            return None

    def _path(self, who: Version | Nobody, folder: Path) -> Path | None:
        if not folder.exists():
            if isinstance(who, Nobody):
                adapter, error = self._exporter.adapter(who)
            elif self._is_stored(who):
                adapter, error = self._exporter.adapter(self.store.load(who.person, who.number), who.stacked)
            else:
                return None
            write_peft(folder, adapter, "")
            write_json(folder / CUT, {"error": error})
        read_peft(folder)  # never give vLLM an unreadable adapter
        if isinstance(who, Nobody) or self._is_stored(who):
            return folder
        shutil.rmtree(folder, ignore_errors=True)  # forgotten meanwhile
        return None

    def _is_stored(self, who: Version) -> bool:
        """Whether the store holds that version with the same content."""
        seal = self.store.seal(who.person, who.number)
        return seal is not None and seal.startswith(who.seal)

"""People's adapters as PEFT folders for vLLM, each made from bank and store when its name is first asked for."""

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
    from mta.serving.vllm.lora_export import Synthesis
    from mta.store.state import State

log = logging.getLogger("mta")
_OURS = re.compile(r"\.?[0-9a-f]{32}-[0-9a-f]{32}(\.json)?(\.[0-9a-f]{32})?")


def folder_of(name: str) -> str:
    """What the adapter's folder is called: whose it is and which, as hashes, so that no id stands in it."""
    from mta.serving.engine import Version
    from mta.serving.model_names import from_wire

    who = from_wire(name)
    return f"{_hash(who.person if isinstance(who, Version) else '')}-{_hash(name)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Adapters:
    """Adapters of people as PEFT folders, each made when first asked for, by its name on the wire."""

    def __init__(self, bank: Path, store: str, folder: Path, rank: int) -> None:
        self.bank, self.url, self.folder, self.rank = bank, store, folder, rank
        self._made: Synthesis | None = None
        self._begun = False
        self._lock = threading.Lock()

    @classmethod
    def of_environment(cls) -> Adapters:
        """As the server was started."""
        given = {name: os.environ[f"MTA_VLLM_{name}"] for name in ("BANK", "STORE", "FOLDER", "RANK")}
        return cls(Path(given["BANK"]), given["STORE"], Path(given["FOLDER"]), int(given["RANK"]))

    def path(self, name: str) -> Path | None:
        """The folder of an adapter; None for somebody unknown, or whose adapter cannot be made."""
        from mta.errors import MtaError

        try:
            with self._lock:
                self._begin()
                return self._path(name)
        except MtaError as error:
            log.warning("an adapter could not be made: %s", type(error).__name__)  # its message may name somebody
            return None

    def _begin(self) -> None:
        """What a server before this one left is deleted: nobody would forget it."""
        if not self._begun:
            for left in self.folder.iterdir():
                if _OURS.fullmatch(left.name):
                    shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
            self._begun = True

    def _path(self, name: str) -> Path | None:
        from mta.lora.peft import read_peft, write_peft
        from mta.personalize.adapters import BASE, Nobody
        from mta.serving.model_names import from_wire
        from mta.system.atomic import write_json

        who = from_wire(name)
        if who is None or who is BASE:
            return None
        made = self.folder / folder_of(name)
        if not made.exists():
            state = who if isinstance(who, Nobody) else self._state(who)
            if state is None:
                return None
            adapter, error = self._synthesis().adapter(state, isinstance(who, Nobody) or who.stacked)
            write_json(note_of(self.folder, name), {"error": error})
            write_peft(made, adapter, "")
        read_peft(made)  # vLLM is offered nothing that does not read
        if isinstance(who, Nobody) or self._is_there(who):
            return made
        remove(self.folder, name)  # forgotten while it was made
        return None

    def _synthesis(self) -> Synthesis:
        from mta.bank import format as files
        from mta.serving.vllm.lora_export import Synthesis

        if self._made is None:
            info = files.read_info(self.bank)
            files.verify(self.bank, info)
            self._made = Synthesis(*files.read_adapters(self.bank, info), info.hash, self.rank)
        return self._made

    def _state(self, who: Version) -> State | None:
        from mta.store import Store

        return Store(self.url).load(who.person, who.number) if self._is_there(who) else None

    def _is_there(self, who: Version) -> bool:
        """Whether the store holds that version, of that content."""
        from mta.store import Store

        seal = Store(self.url).seal(who.person, who.number)
        return seal is not None and seal.startswith(who.seal)


def note_of(folder: Path, name: str) -> Path:
    """The file beside an adapter that says what its cut loses."""
    return folder / f"{folder_of(name)}.json"


def remove(folder: Path, name: str) -> None:
    """Delete an adapter's files; only once vLLM has unloaded it, or it would end with all who are being answered."""
    shutil.rmtree(folder / folder_of(name), ignore_errors=True)
    note_of(folder, name).unlink(missing_ok=True)


def remove_all(folder: Path, person: str) -> None:
    """Delete whatever is left of a person's adapters: what was being made as a server ended, say."""
    for left in (*folder.glob(f"{_hash(person)}-*"), *folder.glob(f".{_hash(person)}-*")):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

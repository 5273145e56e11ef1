import pytest

from mta.system.units import human_bytes, human_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (61, "61 B"), (999, "999 B"), (4600, "4.6 kB"), (9.96e3, "10 kB"), (1e6, "1 MB"), (3.2e12, "3.2 TB")],
)
def test_sizes_as_people_read_them(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0"), (0.42, "0.4 s"), (9.97, "10 s"), (99.6, "1.7 min"), (7200, "2.0 h")]
)
def test_durations_as_people_read_them(seconds, text):
    assert human_seconds(seconds) == text

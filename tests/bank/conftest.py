import pytest
from builds import build


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A finished bank that no test changes."""
    return build(tmp_path_factory.mktemp("built"))

"""The card of an exported adapter."""

import pytest
from conftest import personalizer
from damage import BASE
from damage import folder as folder  # the fixture
from huggingface_hub import ModelCard
from publishing import NEW
from publishing import bank as bank  # the fixture


@pytest.fixture
def adapter(bank, tmp_path):
    """A Personalizer with a store, who has exported x0."""
    personal = personalizer(BASE, bank, tmp_path / "people")
    personal.personalize(NEW)
    personal.export("x0", tmp_path / "x0-adapter")
    return personal, tmp_path / "x0-adapter"


def test_an_export_has_a_card_that_says_nothing_of_the_person(adapter):
    _, out = adapter
    text = (out / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("peft", "text-generation")
    assert "a merge of " in text
    assert "a stack of rank 1, exactly" in text
    assert not any(telling in text for telling in ("x0", "Film", str(out.parent)))


def test_a_card_that_is_not_ours_is_neither_replaced_nor_removed(adapter):
    personal, out = adapter
    (out / "README.md").write_text("about my friend")
    personal.export("x0", out)
    assert (out / "README.md").read_text() == "about my friend"
    personal.forget("x0")
    assert [path.name for path in out.iterdir()] == ["README.md"]

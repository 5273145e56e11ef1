"""From histories to vectors: each text once, nobody's vector depends on who is encoded with them."""

import pytest
import torch
from conftest import HashEncoder, people_of
from tiny import base_of

from mta.data.history import Item, Person
from mta.model.encoders import BaseEncoder, SentenceEncoder, encode_people

TEXTS = ["short", "a text that is a good deal longer than the others are", "", "naïve café", "x"]


class Recorder(HashEncoder):
    """Remembers what it was asked to encode."""

    def __init__(self):
        self.calls = []

    def encode(self, texts):
        self.calls.append(list(texts))
        return super().encode(texts)


def rated(*ratings, title="Heat"):
    return [Item({"title": title, "genres": "Crime", "rating": str(rating)}) for rating in ratings]


def unit(vectors):
    return torch.nn.functional.normalize(vectors, dim=-1)


# people


def test_each_distinct_text_is_encoded_once(task):
    encoder = Recorder()
    people = [Person.of("ann", rated(4, 2)), Person.of("bob", [*rated(4), *rated(1, title="Alien")])]
    encode_people(encoder, task, people, "input")
    assert encoder.calls == [["Alien Crime", "Heat Crime"]]


def test_a_person_is_the_mean_of_their_items_unit_vectors(task):
    person = people_of(1, items=3)[0]
    rows = unit(HashEncoder().encode([task.text_of(item) for item in person.items]))
    assert torch.allclose(encode_people(HashEncoder(), task, [person], "input")[0], unit(rows.mean(0)))


def test_inputs_and_outputs_tell_two_tastes_apart(task):
    encoder = Recorder()
    ann, bob = encode_people(encoder, task, [Person.of("ann", rated(5)), Person.of("bob", rated(1))], "both")
    assert encoder.calls == [["Heat Crime\n1", "Heat Crime\n5"]]
    assert not torch.allclose(ann, bob)


def test_a_history_can_be_encoded_as_one_text(task):
    encoder = Recorder()
    encode_people(encoder, task, [Person.of("ann", [*rated(5), *rated(1, title="Alien")])], "history")
    assert encoder.calls == [["Heat Crime\n5\nAlien Crime\n1"]]


def test_a_persons_vector_is_independent_of_other_people(task):
    people = people_of(4)
    together = encode_people(HashEncoder(), task, people, "both")
    for person, vector in zip(people, together):
        assert torch.allclose(encode_people(HashEncoder(), task, [person], "both")[0], vector)


# the base as an encoder


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_the_base_encodes_a_text_alike_alone_and_in_a_batch(kind):
    encoder = BaseEncoder(base_of(kind))
    together = encoder.encode(TEXTS)
    for text, vector in zip(TEXTS, together):
        torch.testing.assert_close(encoder.encode([text])[0], vector, rtol=1e-6, atol=1e-6)


def test_a_bases_vector_is_the_mean_of_its_last_hidden_states():
    base = base_of("llama", torch.float32)
    tokens = torch.tensor([base.tokenizer("café")["input_ids"]])
    states = base.model(input_ids=tokens, output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(BaseEncoder(base).encode(["café"])[0], states.mean(0))


# sentence encoders


@pytest.fixture(scope="module")
def minilm(fetched):
    fetched("all-minilm-l6-v2")
    return SentenceEncoder("all-minilm-l6-v2", "cpu")


@pytest.mark.network
def test_real_sentences_of_one_meaning_are_closer(minilm):
    cat, kitten, bank = unit(
        minilm.encode(["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose."])
    )
    assert cat @ kitten > 0.5
    assert cat @ bank < 0.2


def test_many_texts_are_encoded_with_progress(task, monkeypatch):
    people, steps = people_of(5), []
    whole = encode_people(HashEncoder(), task, people, "both", lambda *step: steps.append(step))
    assert steps == []
    monkeypatch.setattr("mta.model.encoders._REPORTED", 7)
    parts = encode_people(HashEncoder(), task, people, "both", lambda *step: steps.append(step))
    assert torch.equal(parts, whole)
    assert [(stage, step.examples) for stage, step in steps[:2]] == [("encoding", 7), ("encoding", 14)]
    assert steps[-1][1].examples == steps[-1][1].examples_total

"""A running gateway with four people, and questions to it."""

import pytest
from served import served
from tiny import base_of, endless, random_loras

from mta.bank.bank import Bank
from mta.serving.api.limits import Limits
from mta.serving.api.streaming import Detokenizer
from mta.store.state import State

ASKED = [{"role": "user", "content": "Film 7"}]


@pytest.fixture(scope="module")
def world(tiny_bank_folder, tmp_path_factory):
    """A server with four people in its store: ann, bob, team/cy, anna."""
    base = endless(base_of())
    bank, folder = Bank.open(tiny_bank_folder, base), tmp_path_factory.mktemp("served")
    with served(base, bank, folder, limits=Limits(forgets=0)) as here:
        for n, id in enumerate(("ann", "bob", "team/cy", "anna")):
            stack = random_loras(base, 1, rank=1, size=0.6, seed=n)
            state = State(bank.hash, (0, 1, 2), (30.0, -20.0, 5.0 * n), "fixed", "", f"work{n}", 0, stack)
            here.service.store.save(id, state)
        yield here


def shown(base, tokens):
    """The text of tokens as a client sees it."""
    text = Detokenizer(base.tokenizer)
    return "".join([*(text.add(token) for token in tokens), text.end()])


def said(client, model, **how):
    found = client.chat.completions.create(model=model, messages=ASKED, max_tokens=12, temperature=0, **how)
    return found.choices[0].message.content

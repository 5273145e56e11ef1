"""Real weights and real people: SmolLM2 and MovieLens through all stages, small enough for every run of the tests."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from mta.bank.bank import Bank
from mta.config import Lora, Run, Training
from mta.data.history import Person
from mta.data.readers import read_people
from mta.data.splits import draw
from mta.model.base import BaseModel
from mta.personalize import Personalizer
from mta.personalize.adapters import BASE, TASK

pytestmark = [pytest.mark.integration, pytest.mark.real, pytest.mark.network]

RUN = Run(
    task="movielens-rating",
    encoder="all-minilm-l6-v2",
    dtype="float32",
    memory="3GiB",
    max_tokens=128,
    task_lora={"items": 32, "training": Training(lr=1e-3, batch_size=16)},
    bank={"anchors": 3, "max_items": 6, "training": Training(lr=4e-4, epochs=1, batch_size=6)},
    merge={"policy": "posterior", "k": 0},
    stack={"lora": Lora(rank=1), "training": Training(lr=5e-4, steps=2, batch_size=8)},
    calibration={"people": 8, "shots": 4, "steps": 1},
)


@pytest.fixture(scope="module")
def world(fetched, tmp_path_factory):
    """Base, bank and three personalized people."""
    fetched("smollm2-135m-instruct"), fetched("all-minilm-l6-v2")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    people = read_people(fetched("movielens-100k"), RUN.task)
    parts = draw(people, 0, task=8, development=0, test=900)
    base = BaseModel.load(RUN.base, RUN.dtype, max_tokens=RUN.max_tokens)
    folder = tmp_path_factory.mktemp("real")
    pooled, candidates = parts.select("task", people), parts.select("candidates", people)
    bank = Bank.build(base, candidates, folder / "bank", run=RUN, task=RUN.task, task_people=pooled)
    tested = [Person(p.id, p.items[:4]) for p in parts.select("test", people)[:3]]
    personal = Personalizer(base, bank, folder / "people", run=RUN)
    personal.personalize(tested)
    yield personal, tested
    torch.set_num_threads(threads)


def test_an_exported_person_is_the_same_to_peft_on_the_original_weights(world, fetched, tmp_path):
    personal, people = world
    personal.export(people[0].id, tmp_path / "out")
    item = people[1].items[0]
    example = personal.base.prompts.example(personal.bank.task, item)
    tokens = torch.tensor([example.tokens])
    original = AutoModelForCausalLM.from_pretrained(fetched("smollm2-135m-instruct"), dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(original, tmp_path / "out").eval()
    with torch.no_grad():
        table = theirs(input_ids=tokens).logits[0]
        with personal.applied([people[0].id]):
            ours = personal.base.model(input_ids=tokens).logits[0]
    torch.testing.assert_close(ours, table, rtol=0, atol=1e-3)
    assert (ours - personal.base.model(input_ids=tokens).logits[0]).abs().max() > 0.1


def test_rows_of_different_people_are_answered_as_if_alone(world):
    personal, people = world
    question = dict(people[2].items[0].fields)
    rows = [(people[0].id, question), (BASE, question), (people[1].id, question), (TASK, question)]
    together = personal.generate(rows, max_new_tokens=6)
    assert together == [personal.generate([row], max_new_tokens=6)[0] for row in rows]
    scores = personal.score([(who, question, "4") for who, _ in rows])
    assert len({round(score, 3) for score in scores}) == 4


def test_the_same_work_gives_the_same_bytes(world, tmp_path):
    """float32, the same plan, another store and another order of the people."""
    personal, people = world
    again = Personalizer(personal.base, personal.bank, tmp_path / "people", run=RUN)
    again.personalize(people[::-1])
    for person in people:
        assert again.state(person.id).to_bytes() == personal.state(person.id).to_bytes()

"""``/v1/classify``: probabilities of all labels, with the models' names and rights of other routes."""

import pytest
from gateway import world as world  # the fixture

FIELDS = [{"title": f"Film {n}", "genres": "Drama"} for n in range(11)]


def ask(world, name, **body):
    with world.http(name) as http:
        return http.post("/v1/classify", json=body)


def prompts(world):
    task = world.service.task
    return [task.prompt(task.asked(fields)) for fields in FIELDS]


def test_an_answer_has_vllms_format(world):
    texts, labels = prompts(world), list(world.service.task.labels)
    found = ask(world, "serve", model="person:ann", input=texts).json()
    assert (found["object"], found["model"], found["labels"]) == ("list", "person:ann", labels)
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] > 0
    for row, one in enumerate(found["data"]):
        assert (one["index"], one["num_classes"]) == (row, len(labels))
        assert one["label"] == max(zip(one["probs"], labels, strict=True))[1]
        assert sum(one["probs"]) == pytest.approx(1)


def test_prompt_and_longest_label_may_fill_the_length(world, monkeypatch):
    """As those of shortened items do."""
    (text, *_), base = prompts(world), world.service.base
    examples = base.prompts.answered(text, world.service.task.labels)
    for length, status in ((max(len(example.tokens) for example in examples), 200), (len(examples[0].prompt) + 1, 400)):
        monkeypatch.setattr(world.service, "length", length)
        found = ask(world, "serve", model="task", input=text)
        assert found.status_code == status, found.text


def test_a_person_key_gets_more_inputs_than_it_may_have_answers_at_once(world):
    found = ask(world, "ann", model="person:ann", input=prompts(world))
    assert len(found.json()["data"]) == len(FIELDS) > world.service.limits.own


def test_a_key_over_its_limit_is_refused_before_its_inputs_are_tokenized(world, monkeypatch):
    monkeypatch.setattr("mta.serving.api.classify._tokenized", lambda *_: pytest.fail("tokenized"))
    monkeypatch.setitem(world.service.answers.used, "ann", 1)
    assert ask(world, "ann", model="person:ann", input=prompts(world)).status_code == 429


def test_one_text_gives_one_row_and_a_fallback_names_the_model_that_answered(world):
    found = ask(world, "serve", model="person:unknown", input=prompts(world)[0], fallback="task").json()
    assert found["model"] == "task"
    assert len(found["data"]) == 1


@pytest.mark.parametrize(
    ("key", "body", "status"),
    [
        ("ann", {"model": "person:bob", "input": "Film"}, 404),
        ("serve", {"model": "person:unknown", "input": "Film"}, 404),
        ("serve", {"model": "task", "input": []}, 400),
        ("serve", {"model": "task", "input": "x" * 10**5}, 400),
        ("serve", {"model": "task", "input": "Film " * 300}, 400),
        ("serve", {"model": "task", "input": "Film", "temperature": 1}, 400),
    ],
)
def test_refused_requests(world, key, body, status):
    found = ask(world, key, **body)
    assert found.status_code == status
    assert found.json()["error"]["message"]


def test_one_input_that_does_not_fit_refuses_all_before_any_is_computed(world):
    asked = world.service.metrics.prompt_tokens._value.get()
    found = ask(world, "ann", model="person:ann", input=[*prompts(world), "Film " * 300])
    assert found.status_code == 400
    assert world.service.engine.facts()["running"][0] == 0
    assert world.service.metrics.prompt_tokens._value.get() == asked
    assert ask(world, "ann", model="person:ann", input=prompts(world)).status_code == 200


def test_a_task_without_labels_is_refused_with_the_route_that_generates(world):
    labelled = world.service.task
    world.service.task = labelled.model_copy(update={"labels": None, "metric": "rouge"})
    try:
        found = ask(world, "serve", model="task", input="Film")
    finally:
        world.service.task = labelled
    assert found.status_code == 400
    assert "/v1/chat/completions" in found.json()["error"]["message"]

"""``/v1/classify``: probabilities of all labels, with the models' names and rights of other routes."""

import asyncio
from contextlib import contextmanager

import pytest
from conftest import people_of
from gateway import world as world  # the fixture

from mta.data.earlier import in_words
from mta.personalize.forgetting import forget_person
from mta.serving.api import classify

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
    read = sum(len(world.service.base.prompts.answered(text, labels)[0].prompt) for text in texts)
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] == read
    for row, one in enumerate(found["data"]):
        assert (one["index"], one["num_classes"]) == (row, len(labels))
        assert one["label"] == max(zip(one["probs"], labels, strict=True))[1]
        assert sum(one["probs"]) == pytest.approx(1)


def test_prompt_and_longest_label_may_fill_the_length(world, monkeypatch):
    """As those of shortened items do."""
    (text, *_), base = prompts(world), world.service.base
    examples = base.prompts.answered(text, world.service.task.labels)
    for length, status in ((max(len(example.tokens) for example in examples), 200), (len(examples[0].prompt) + 1, 400)):
        monkeypatch.setattr(world.service.engine, "length", length)
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


# -- behind earlier items ----------------------------------------------------------------------------------------------

(PERSON,) = people_of(1, items=5)


@contextmanager
def showing(world, count=3):
    """The bank's prompts show earlier items, and ann's are kept."""
    service = world.service
    service.store.save_history(type(PERSON)("ann", PERSON.items))
    service.history = count
    try:
        yield service
    finally:
        service.history = 0


def probs(found):
    assert found.status_code == 200, found.text
    return found.json()["data"][0]["probs"]


@pytest.mark.parametrize(
    ("model", "key", "how", "items"),
    [
        ("person:ann", "ann", {}, 3),
        ("person:ann", "serve", {}, 0),  # it may use her model, but not see her data
        ("person:ann", "ann", {"history_of": ""}, 0),
        ("task", "ann", {"history_of": "ann"}, 3),
        ("task", "ann", {}, 0),
        ("person:bob", "admin", {}, 0),  # nothing is kept
        ("person:unknown", "admin", {"fallback": "task", "history_of": "ann"}, 3),
    ],
)
def test_a_prompt_comes_behind_the_latest_items_of_its_person(world, model, key, how, items):
    (text, *_), given = prompts(world), PERSON.items[-items:] if items else ()
    answers = "task" if model == "person:unknown" else model
    expected = probs(ask(world, "admin", model=answers, input=in_words(world.service.task, given) + text))
    with showing(world):
        found = probs(ask(world, key, model=model, input=text, **how))
    assert found == pytest.approx(expected, abs=1e-9)


def test_items_of_another_person_are_refused(world):
    with showing(world):
        found = ask(world, "ann", model="task", input=prompts(world)[0], history_of="bob")
    assert found.status_code == 404


def test_the_oldest_items_are_left_out_where_they_do_not_fit(world, monkeypatch):
    (text, *_), service = prompts(world), world.service
    two, label = in_words(service.task, PERSON.items[-2:]) + text, service.base.prompts.answer_tokens(service.task)
    room = len(service.chat_tokens([{"role": "user", "content": two}])) + label
    expected = probs(ask(world, "admin", model="person:ann", input=two))
    with showing(world):
        monkeypatch.setattr(service.engine, "length", room)
        assert probs(ask(world, "ann", model="person:ann", input=text)) == pytest.approx(expected, abs=1e-9)


def test_a_text_comes_behind_earlier_items_only_for_those_who_may_read_them(world):
    """It may repeat them."""
    text, shown = "Film 7", in_words(world.service.task, PERSON.items[-1:])

    def said(key, *contents, **how):
        turns = [{"role": role, "content": one} for role, one in zip(("user", "assistant", "user"), contents)]
        body = {"model": "person:ann", "messages": turns, "temperature": 0, "max_tokens": 5, **how}
        with world.http(key) as http:
            found = http.post("/v1/chat/completions", json=body).json()
        return found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens"]

    behind, plain = said("admin", shown + text, "4", text), said("admin", text, "4", text)
    assert behind[1] > plain[1]
    with showing(world, 1):
        assert said("ann", text, "4", text) == said("admin", text, "4", text) == behind
        assert said("serve", text, "4", text) == said("ann", text, "4", text, history_of="") == plain


def test_forgetting_drops_what_prompts_showed_to_other_models(world):
    """Also of a person without a key, and of one whom another process forgot."""
    slots, store = world.service.engine.scheduler.slots, world.service.store
    for person, forget in (("zed", None), ("yan", store)):
        with showing(world):
            store.save_history(type(PERSON)(person, PERSON.items))
            probs(ask(world, "admin", model="task", input="Film 7", history_of=person))
        assert [owner for owner in owners(slots) if owner[1] == f"admin\n{person}"]
        if forget:
            asyncio.run(world.service.drop_forgotten_elsewhere())  # from now on
            forget_person(person, store)
            asyncio.run(world.service.drop_forgotten_elsewhere())
        else:
            with world.http("admin") as http:
                assert http.delete(f"/v1/people/{person}").status_code == 200
        assert not [owner for owner in owners(slots) if person in owner[1]]


def test_a_prompt_with_items_of_a_person_who_was_forgotten_meanwhile_is_not_answered(world, monkeypatch):
    store, plain = world.service.store, classify._tokenized
    monkeypatch.setattr(classify, "_tokenized", lambda *of: forget_person("zed", store) and plain(*of))
    with showing(world):
        store.save_history(type(PERSON)("zed", PERSON.items))
        found = ask(world, "admin", model="task", input="Film 8", history_of="zed")
    assert (found.status_code, found.json()["error"]["code"]) == (409, "person_forgotten")


def test_no_input_begins_after_the_person_of_its_items_was_forgotten(world, monkeypatch):
    """A person's key has fewer answers at once than inputs."""
    service, plain, begun = world.service, classify._scored, []

    async def scored(engine, asked):
        begun.append(asked)
        forget_person("ann", service.store)
        return await plain(engine, asked)

    monkeypatch.setattr(classify, "_scored", scored)
    with showing(world):
        found = ask(world, "ann", model="task", input=["Film 8"] * (service.limits.own + 1), history_of="ann")
    assert (found.status_code, found.json()["error"]["code"]) == (409, "person_forgotten")
    assert len(begun) == service.limits.own


def test_a_continued_text_shows_no_items(world):
    body = {"model": "task", "prompt": "Film 8", "history_of": "ann"}
    with world.http("ann") as http:
        assert http.post("/v1/completions", json=body).status_code == 400


def test_a_sweep_ends_no_answers_that_began_after_this_gateway_forgot_their_person(world, monkeypatch):
    service, dropped = world.service, []
    asyncio.run(service.drop_forgotten_elsewhere())
    with showing(world), world.http("admin") as http:
        service.store.save_history(type(PERSON)("ann", PERSON.items))
        http.delete("/v1/people/ann")  # ann's key stays
        monkeypatch.setattr(type(service.engine), "drop", lambda *of: dropped.append(of))
        asyncio.run(service.drop_forgotten_elsewhere())
    assert dropped == []


def owners(slots):
    return [slot.owner for slot in slots._slots if slot.owner]

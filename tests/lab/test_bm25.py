"""BM25 over a person's own earlier items, and prompts that show them."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from mta.bank.task_lora import not_kept_back
from mta.data.history import Item, Person
from mta.data.sharing import connected
from mta.data.tasks import load_task
from mta_lab.bm25 import retrieve, with_profile, with_profiles

LAMP4 = load_task("lamp4")


def article(text: str, title: str = "a title") -> Item:
    return Item({"text": text, "title": title})


EARLIER = [article("the senate votes on taxes"), article("a cake with lemon and sugar"), article("rain over the bay")]


def test_the_nearest_text_comes_first():
    found = retrieve(LAMP4, article("lemon cake for sunday"), EARLIER, 2)
    assert found[0] is EARLIER[1]
    assert len(found) == 2


def test_an_answer_does_not_find_itself():
    """The title is the target: that it fits the question must not matter."""
    articles = [article("one thing", title="lemon cake"), article("a cake", title="another thing")]
    assert retrieve(LAMP4, article("lemon cake"), articles, 1) == [articles[1]]


@given(st.lists(st.text(max_size=20), max_size=5), st.integers(0, 7))
def test_at_most_k_earlier_items_are_retrieved(texts, k):
    earlier = [article(text) for text in texts]
    found = retrieve(LAMP4, article("some text"), earlier, k)
    assert len(found) == min(k, len(earlier))
    assert all(any(one is item for item in earlier) for one in found)


def test_a_prompt_with_a_profile_shows_items_answers_and_all_before_the_question():
    item = with_profile(LAMP4, article("lemon cake for sunday", "x"), EARLIER, 1, before="About them. ")
    prompt = LAMP4.prompt(item)
    assert prompt == (
        'About them. "a title" is the title for "a cake with lemon and sugar". '
        "Generate a headline for the following article: lemon cake for sunday"
    )
    assert LAMP4.target(item) == "x"


def test_a_task_without_a_sentence_of_its_own_shows_earlier_items_as_they_are_asked():
    task = LAMP4.model_copy(update={"profile": None})
    shown = "Generate a headline for the following article: a cake with lemon and sugar a title"
    assert task.sentence(EARLIER[1]) == shown
    assert task.sentence(with_profile(task, EARLIER[1], EARLIER[:1], 1)) == shown


def test_copies_are_found_below_the_earlier_items_that_they_show():
    text = "An article so long that nobody else writes it by coincidence, word for word."
    people = [Person.of(id, [article(id), article(text)]) for id in ("ann", "bob")]
    shown = [with_profiles(LAMP4, person, 1) for person in people]
    assert connected(shown, LAMP4)[1] == connected(people, LAMP4)[1]
    assert connected(people, LAMP4)[1].items == 1
    again = replace(people[0], items=(people[0].items[1], *people[0].items))
    kept, plain = (not_kept_back(one, 1).items for one in (with_profiles(LAMP4, again, 1), again))
    assert len(kept) == len(plain) == 1


def test_a_query_keeps_its_own_wording():
    task = load_task("lamp1")
    query = Item({"title": "T", "ref1": "A", "ref2": "B", "reference": "[1]"}, id="7", is_query=True)
    paper = Item({"title": "Old", "abstract": "about A"})
    found = with_profile(task, query, [paper], 1)
    assert found.is_query
    assert found.id == "7"
    assert task.prompt(found).startswith('"Old" is the title for "about A". For an author who')
    assert task.labels_of(found) == ("[1]", "[2]")

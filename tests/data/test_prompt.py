"""From an item to tokens: what the model is given, what the loss sees, and what is cut."""

from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TEMPLATE, tokenizer
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from mta.data.history import Item
from mta.data.tasks import PromptFormat, Task, load_task
from mta.errors import DataError

RATING = Item({"title": "Heat", "genres": "Crime", "rating": "4"})
HEAD, TAIL = "Rate this. A: ", ". Answer with the number only."
PAIR = Task(
    name="pair",
    version=1,
    description="d",
    source="s",
    item={"prompt": HEAD + "{a} B: {b} C: {kept}" + TAIL, "target": "score", "cut": ["a", "b"]},
    text="{a}",
    labels=("1", "10"),
    metric="mae",
)


def form(max_tokens=1000, template=True) -> PromptFormat:
    return PromptFormat(tokenizer(template), max_tokens)


def pair(a="x", b="y", kept="k", score="1") -> Item:
    return Item({"a": a, "b": b, "kept": kept, "score": score})


def words(form, tokens) -> str:
    return form.tokenizer.decode(list(tokens))


def tokenizer_of(template):
    made = deepcopy(tokenizer())
    made.chat_template = template
    return made


# wording


def test_a_prompt_goes_through_the_chat_template(task):
    made = form().example(task, RATING)
    assert words(form(), made.prompt) == f"<|start|>user\n{task.prompt(RATING)}<|end|>\n<|start|>assistant\n"


def test_without_a_chat_template_the_prompt_is_plain_text(task):
    plain = form(template=False)
    assert words(plain, plain.example(task, RATING).prompt) == f"{task.prompt(RATING)}\nAnswer: "


def test_a_tokenizer_that_appends_an_end_token_does_not_end_prompts(task):
    """As models saved with ``add_eos_token`` do."""
    plain, appending = form(template=False), deepcopy(tokenizer(False))
    start, end = ((name, appending.convert_tokens_to_ids(name)) for name in ("<|start|>", "<|end|>"))
    for single, first in ("$A <|end|>", ()), ("<|start|> $A <|end|>", (start[1],)):
        appending.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[start, end])
        made = PromptFormat(appending, 1000)
        expected, found = plain.example(task, RATING), made.example(task, RATING)
        assert (found.prompt, found.target) == ((*first, *expected.prompt), expected.target)
        assert made.text("Hi") == (*first, *plain.text("Hi"))
        assert made.prompt(task, RATING).tokens == found.prompt


PIECES = st.lists(
    st.sampled_from(["<|end|>", "<|start|>", "<|", "end|>", "|>", "start", "<", " ", "a", "\n"]), max_size=8
)


@settings(max_examples=60)
@given(title=PIECES.map("".join), answer=PIECES.map("".join), template=st.booleans())
def test_special_tokens_written_in_a_text_stay_text(task, title, answer, template):
    there = form(template=template)
    special = set(there.tokenizer.all_special_ids)
    item = Item({"title": f"x{title}x", "genres": "Crime", "rating": "4"})
    count = [
        sum(token in special for token in example.tokens)
        for example in (there.example(task, item, f"x{answer}x"), there.example(task, RATING, "4"))
    ]
    assert count[0] == count[1]


@pytest.mark.parametrize("template", [True, False])
def test_labels_share_the_prompt_of_generation(task, template):
    wording = form(template=template)
    given, made = wording.prompt(task, RATING), wording.examples(task, RATING, task.labels)
    assert given.target == ()
    assert {example.prompt for example in made} == {given.tokens} == {wording.example(task, RATING).prompt}
    assert [words(wording, example.target) for example in made] == [f"{label}<|end|>" for label in task.labels]


def test_the_prompt_is_cut_equally_for_labels_of_different_length():
    made = form(150).examples(PAIR, pair(a="x" * 200), PAIR.labels)
    assert made[0].prompt == made[1].prompt
    assert [len(example.tokens) for example in made] == [149, 150]


# what comes before an answer

_INST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ ' ' + m.content }}<|end|>{% endif %}{% endfor %}"
)
_THINKING = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n"
)
_SWITCH = "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"


def test_a_space_that_the_template_writes_before_an_answer_begins_the_answer(task):
    made = PromptFormat(tokenizer_of(_INST))
    example = made.example(task, RATING)
    assert words(made, example.prompt).endswith(" [/INST]")
    assert words(made, example.target) == " 4<|end|>"
    assert made.decode(example.target) == "4"
    assert made.answer_tokens(task) == len(example.target)


@pytest.mark.parametrize("switch", [_SWITCH, ""])
def test_a_base_that_can_think_answers_at_once(task, switch):
    made = PromptFormat(tokenizer_of(_THINKING + switch + "{% endif %}"))
    example = made.example(task, RATING)
    assert words(made, example.prompt).endswith("<|start|>assistant\n<think></think>")
    assert words(made, example.prompt).count("<think>") == 1
    assert words(made, example.target) == "4<|end|>"


# the end token


def test_the_end_token_is_what_the_template_puts_after_an_answer():
    made = tokenizer_of(TEMPLATE.replace("<|end|>", "<|start|>"))
    assert PromptFormat(made).end_token == made.convert_tokens_to_ids("<|start|>")


def test_an_end_token_that_is_special_but_has_no_name_ends_an_answer():
    made = tokenizer_of(TEMPLATE.replace("<|end|>", "<end_of_turn>"))
    made.add_tokens([AddedToken("<end_of_turn>", special=True)])
    ends = made.convert_tokens_to_ids("<end_of_turn>")
    assert ends not in made.all_special_ids
    assert PromptFormat(made).end_token == ends


def test_a_template_that_asks_for_the_date_gives_the_same_prompt_every_day(task):
    dated = PromptFormat(tokenizer_of("Today: {{ strftime_now('%d %b %Y') }}\n" + TEMPLATE))
    assert words(dated, dated.example(task, RATING).prompt).startswith("Today: 26 Jul 2024\n<|start|>user")


def test_a_template_that_closes_with_plain_text_leaves_the_tokenizers_end_token():
    made = tokenizer_of(TEMPLATE.replace("<|end|>", "bye"))
    assert PromptFormat(made).end_token == made.eos_token_id


def test_a_tokenizer_without_any_end_token_is_refused():
    made = tokenizer_of(None)
    made.eos_token = None
    with pytest.raises(DataError, match="has no end token"):
        PromptFormat(made)


def test_equal_items_are_tokenized_once_and_items_that_differ_anywhere_apart(monkeypatch):
    made, asked = form(), []
    items = [pair(), pair(score="2"), pair(), Item(pair().fields, is_query=True), Item(pair().fields, time=3, id="z")]
    every, labelled = made.all(PAIR, items), made.all(PAIR, items, ["1", "2"])
    assert every == [[made.example(PAIR, item)] for item in items]
    assert labelled == [made.examples(PAIR, item, ["1", "2"]) for item in items]
    monkeypatch.setattr(made, "examples", lambda task, item, targets: asked.append(item) or [])
    made.all(PAIR, items)
    assert len(asked) == 3


# cutting


def test_an_example_that_is_one_token_too_long_loses_one_token(task):
    whole = form().example(task, RATING)
    assert form(len(whole.tokens)).example(task, RATING) == whole
    made = form(len(whole.tokens) - 1).example(task, RATING)
    assert made.cut == 1
    assert words(form(), made.tokens) == words(form(), whole.tokens).replace("Heat", "Hea")


def test_a_reserve_is_kept_free_for_the_answer(task):
    whole = form().prompt(task, RATING)
    assert form(len(whole.tokens) + 1).prompt(task, RATING, reserve=3).cut == 2


def test_the_longest_field_is_cut_first():
    whole = form().example(PAIR, pair(a="a" * 30, b="b" * 40))
    made = words(form(), form(len(whole.tokens) - 5).example(PAIR, pair(a="a" * 30, b="b" * 40)).tokens)
    assert "A: " + "a" * 30 + " B: " + "b" * 35 + " C:" in made


def test_a_prompt_that_cannot_fit_is_refused_with_the_needed_length():
    needed = len(form().example(PAIR, pair(a="", b="")).tokens)
    with pytest.raises(DataError) as caught:
        form(needed - 1).example(PAIR, pair(a="a" * 90))
    assert caught.value.message == (
        f"task 'pair': instruction and target take {needed} tokens, max_tokens is {needed - 1}"
    )
    assert caught.value.hint.startswith("Raise max_tokens, leave the item out, or list a long input under 'cut'")


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).filter(lambda text: "<|" not in text)


@settings(deadline=None, max_examples=150)
@given(texts, texts, texts, st.sampled_from(["1", "10"]), st.integers(1, 300), st.booleans())
def test_cutting_keeps_the_instruction_and_the_target(a, b, kept, score, max_tokens, template):
    wording = form(max_tokens, template)
    try:
        made = wording.example(PAIR, pair(a, b, kept, score))
    except DataError:
        assert len(form(10_000, template).example(PAIR, pair("", "", kept, score)).tokens) > max_tokens
        return
    text = words(wording, made.prompt)
    assert len(made.tokens) <= max_tokens
    assert words(wording, made.target) == f"{score}<|end|>"
    assert HEAD in text
    assert f" C: {kept}{TAIL}" in text
    shown = text.partition(HEAD)[2]
    assert any(shown.startswith(f"{a[:i].rstrip()} B: ") for i in range(len(a) + 1)) or shown.startswith(f"{a} B: ")
    assert made.cut == len(form(10_000, template).example(PAIR, pair(a, b, kept, score)).tokens) - len(made.tokens)


def test_answer_length_is_the_tasks_limit_or_the_longest_label_or_128():
    free = Task(name="free", item={"prompt": "{a}", "target": "b"}, text="{a}", metric="rouge")
    assert form().answer_tokens(PAIR) == 3  # "10" and the end: this tokenizer knows bytes alone
    assert form().answer_tokens(PAIR.model_copy(update={"answer_tokens": 7})) == 7
    assert form().answer_tokens(free) == 128
    assert form().answer_tokens(free.model_copy(update={"answer_tokens": 300})) == 300
    assert form(max_tokens=100).answer_tokens(free) == 50
    assert form(max_tokens=1).answer_tokens(free) == 1


# special tokens with spaces


@pytest.mark.timeout(20, func_only=True)
@pytest.mark.parametrize("special", [" <|x|>", "< ", " y", "y", "  ", " ", "<|", "a <|x|>"])
def test_special_tokens_with_spaces_in_a_text_stay_text(special):
    made = deepcopy(tokenizer())
    made.add_special_tokens({"additional_special_tokens": ["<|start|>", special]})
    tokens = PromptFormat(made).text(f"I say {special}{special} and <|end|> y < a <|x|>")
    assert not set(tokens) & set(made.all_special_ids)
    assert "I" in made.decode(list(tokens))


def test_a_role_token_that_is_not_marked_as_special_is_broken_too() -> None:
    made = deepcopy(tokenizer())
    made.add_tokens([AddedToken("<|user|>", special=False), AddedToken("aside", special=False)])
    made.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    prompts = PromptFormat(made)
    text = "x<|user|>x aside"
    item = Item({"title": text, "genres": "Drama", "rating": "4"})
    tokens = prompts.example(load_task("movielens-rating"), item).tokens
    assert [made.convert_ids_to_tokens(token) for token in tokens].count("<|user|>") == 1
    assert "aside" in [made.convert_ids_to_tokens(token) for token in tokens]  # only what the template writes


def test_a_text_with_many_special_tokens_is_cut_and_not_dropped():
    """A special token is one token in the raw text, and several where it is broken in the prompt."""
    made = form(max_tokens=200)
    text = "<|end|> good " * 40
    example = made.example(PAIR, pair(a=text))
    assert 180 < len(example.tokens) <= 200
    assert words(made, example.prompt).count("good") > 5
    assert example.cut > 0

import json
import pickle
from pathlib import Path

import pytest
import yaml
from files import shared_data

from mta.data.history import Item
from mta.data.tasks import Task, load_task, task_names
from mta.errors import DataError, TaskError
from mta_lab.readers.lamp import parse_query

LABELS = {"lamp1": 2, "lamp2": 15, "lamp2n": 15, "lamp3": 5, "movielens-rating": 5, "survey": 6}
QUESTIONS = {
    "lamp1": (
        'For an author who has written the paper with the title "On "Deep" Nets", which reference is related? '
        'Just answer with [1] or [2] without explanation. [1]: "A {brace}" [2]: "B"',
        {"title": 'On "Deep" Nets', "ref1": "A {brace}", "ref2": "B"},
    ),
    "lamp2": (
        "Which tag does this movie relate to among the following tags? Just answer with the tag name without further "
        "explanation. tags: [sci-fi, based on a book, comedy, action, twist ending, dystopia, dark comedy, classic, "
        "psychology, fantasy, romance, thought-provoking, social commentary, violence, true story] description: A war.",
        {"description": "A war."},
    ),
    "lamp2n": (
        "Which category does this article relate to among the following categories? Just answer with the category name "
        "without further explanation. categories: [women, religion, politics, style & beauty, entertainment, "
        "culture & arts, sports, science & technology, travel, business, crime, education, healthy living, parents, "
        "food & drink] article: A vote.",
        {"text": "A vote."},
    ),
    "lamp3": (
        "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without "
        "further explanation. review: Good.\nVery.",
        {"text": "Good.\nVery."},
    ),
    "lamp4": ("Generate a headline for the following article: A vote.", {"text": "A vote."}),
    "lamp5": ("Generate a title for the following abstract of a paper: We prove.", {"abstract": "We prove."}),
    "lamp7": ("Paraphrase the following tweet without any explanation before or after it: hi", {"tweet": "hi"}),
}
PLAIN = {
    "name": "mine",
    "version": 1,
    "description": "d",
    "source": "s",
    "item": {"prompt": "Rate {text}", "target": "score", "cut": ["text"]},
    "text": "{text}",
    "labels": ["1", "2"],
    "metric": "mae",
}


def written(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**PLAIN, **changes}), encoding="utf-8")
    return path


def test_every_built_in_loads_and_is_named_as_its_file() -> None:
    assert set(task_names()) == {"text", *QUESTIONS, "movielens-rating", "survey"}
    for name in task_names():
        task = load_task(name)
        assert task.name == name
        assert len(task.labels or ()) == LABELS.get(name, 0)
        assert hash(task) == hash(pickle.loads(pickle.dumps(task)))
        assert Task.model_validate(task.model_dump(mode="json")) == task
        for item in (
            Item(dict.fromkeys(task.fields(), "x")),
            Item(dict.fromkeys(task.fields(True), "x"), is_query=True),
        ):
            assert "x" in task.prompt(item) or not task.form(item).inputs
            assert task.target(item) == "x"


def test_task_names_ignore_case_and_separators_and_have_aliases() -> None:
    assert {load_task(name).lamp for name in ("lamp3", "LaMP-3", "LaMP_3", "lamp 3")} == {"LaMP_3"}
    assert load_task("LaMP-2M").name == "lamp2"
    assert load_task("LaMP-2N").name == "lamp2n"
    assert load_task("MovieLens").name == "movielens-rating"
    task = load_task("text")
    assert load_task(task) is task


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_of_the_benchmark_are_parsed_and_worded_alike(name: str) -> None:
    question, fields = QUESTIONS[name]
    task = load_task(name)
    query = parse_query(task, question, id="7")
    assert (dict(query.fields), query.id, query.is_query) == (fields, "7", True)
    assert task.prompt(query) == question
    assert task.wrong(query) is None
    assert not task.has_target(query)


@pytest.mark.parametrize(
    ("name", "folder"), [("lamp3", "lamp3_amazon"), ("lamp4", "lamp4_huffpost"), ("lamp5", "lamp5_papers")]
)
def test_wording_equals_real_questions(name: str, folder: str) -> None:
    task = load_task(name)
    for question in json.loads(shared_data(f"{folder}/dev_questions.json").read_text(encoding="utf-8")):
        assert task.prompt(parse_query(task, question["input"])) == question["input"]


def test_prompts_do_not_contain_the_target() -> None:
    for name in task_names():
        task = load_task(name)
        for query in (False, True):
            fields = {field: f"<{field}>" for field in task.fields(query)}
            item = Item(fields, is_query=query)
            for text in (task.prompt(item), task.text_of(item)):
                assert task.target(item) not in text
            assert task.target(item) in task.text_of(item, with_target=True)
            assert query or task.target(item) in task.sentence(item)


def test_labels_belong_to_the_benchmarks_question() -> None:
    task = load_task("lamp1")
    paper = Item({"abstract": "We prove.", "title": "A proof"})
    assert task.labels_of(paper) is None
    assert task.wrong(paper) is None
    query = Item({"title": "t", "ref1": "a", "ref2": "b", "reference": "[3]"}, is_query=True)
    assert task.labels_of(query) == ("[1]", "[2]")
    assert task.wrong(query) == ("reference", "unknown label '[3]'; expected one of: [1], [2]")


def test_a_queries_text_is_its_own() -> None:
    task = load_task("lamp1")
    assert task.text_of(parse_query(task, QUESTIONS["lamp1"][0])) == "A {brace} B"
    lamp3 = load_task("lamp3")
    assert lamp3.text_of(Item({"text": "Good.", "score": "5"}), with_target=True) == "Good.\n5"
    tweet = Item({"text": "hi"})
    assert (load_task("lamp7").text_of(tweet), load_task("lamp7").text_of(tweet, with_target=True)) == ("", "hi")


def test_unknown_targets_and_foreign_questions_are_errors() -> None:
    task = load_task("lamp3")
    query = parse_query(task, QUESTIONS["lamp3"][0], id="q")
    with pytest.raises(DataError, match=r"query 'q' has no field 'score'; task 'lamp3' needs it"):
        task.target(query)
    with pytest.raises(DataError, match=r"not a question of task 'lamp3': 'Generate .*'; expected 'What is the score"):
        parse_query(task, QUESTIONS["lamp4"][0])
    with pytest.raises(DataError, match=r"not a question of task 'movielens-rating': 'Toy Story'; expected 'How"):
        parse_query(load_task("movielens-rating"), "Toy Story")
    assert parse_query(load_task("text"), "hi", "ho").fields == {"input": "hi", "output": "ho"}


def test_a_custom_task_is_loaded_from_a_file(tmp_path: Path) -> None:
    task = load_task(written(tmp_path, labels=[1, 2.0, 2.5]))
    assert task.labels == ("1", "2", "2.5")
    assert load_task(str(tmp_path / "mine.yaml")) == task == Task.model_validate(task.model_dump())


FORM = PLAIN["item"]
WRONG = [
    ({"metric": "f1"}, "metric: Input should be 'accuracy', 'mae' or 'rouge' (got 'f1')"),
    ({"colour": 1}, "colour: Extra inputs are not permitted (got 1)"),
    ({"labels": []}, "labels: labels must not be empty, or begin or end with a space (got [])"),
    ({"labels": ["1", 1]}, "labels: labels must be distinct (got ['1', 1])"),
    ({"labels": [True]}, "labels.0: a label that YAML reads as true or false must be written in quotes (got True)"),
    ({"labels": ["1", "b"]}, "metric mae needs labels that are all numbers"),
    ({"text": "{score}"}, "text contains the target {score}; leave it out, mta adds the target where known"),
    ({"text": "all"}, "text contains no field; the prompt has ['text']"),
    ({"text": "{text!r}"}, "{text} is not a field; write {name}, and literal braces as {{ and }}"),
    ({"profile": "{c}"}, "profile has the fields ['c']; items have ['score', 'text']"),
    ({"query_text": "{text}"}, "query_text needs a query, and the task has no query"),
    (
        {"query": {"prompt": "{tweet}", "target": "score"}},
        "text (there is no query_text) has the fields ['text']; the prompt has ['tweet']",
    ),
    (
        {"item": {**FORM, "target": "film.score"}},
        "item: {film.score} is not a field; write {name}, and literal braces as {{ and }}",
    ),
    (
        {"item": {**FORM, "prompt": "{text} {score}"}},
        "item: the prompt contains the target {score}, which would reveal the answer",
    ),
    (
        {"item": {**FORM, "prompt": "{text"}},
        "item: '{text': expected '}' before end of string; literal braces are written {{ and }}",
    ),
    ({"item": {**FORM, "cut": ["score"]}}, "item: cut names 'score', which is not a field of the prompt"),
    (
        {"item": {**FORM, "pattern": "("}},
        "item: pattern is not a regular expression: missing ), unterminated subpattern at position 0",
    ),
    (
        {"item": {**FORM, "pattern": "(?P<a>.)"}},
        "item: pattern has the groups ['a']; the prompt has the fields ['text']",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_misspelled_key_of_a_task_is_reported(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(TaskError) as caught:
        load_task(path)
    assert caught.value.message == f"{path}: {message}"
    assert "See docs/how-to/add-a-task.md" in caught.value.hint


@pytest.mark.parametrize("form", ["item", "query"])
def test_an_unknown_key_of_a_task_is_reported_with_the_known_keys(tmp_path: Path, form: str) -> None:
    with pytest.raises(TaskError, match="Extra inputs are not permitted") as caught:
        load_task(written(tmp_path, **{form: {**FORM, "targets": ""}}))
    assert caught.value.hint.startswith("Did you mean target? Settings here are: prompt, target, cut, pattern.")


def test_files_that_are_no_task(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no such task file: .*none\.yaml\n  Built-in tasks: lamp1, "):
        load_task(tmp_path / "none.yaml")
    path = tmp_path / "bad.yaml"
    for content, message in [
        (b"a: [", "is not readable YAML: while parsing"),
        (b"- a", "expected a mapping of settings, got list"),
        (b"\xff\xfe\xff", "is not readable YAML: 'utf-8' codec can't decode"),
        (b"a: !!python/object/apply:os.getcwd []", "is not readable YAML: could not determine a constructor"),
        (b"[" * 5000, "is not readable YAML"),
    ]:
        path.write_bytes(content)
        with pytest.raises(TaskError, match=message):
            load_task(path)


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(TaskError) as caught:
        load_task("lampp3")
    assert caught.value.message.startswith("unknown task 'lampp3'; built-in tasks: lamp1, lamp2, ")
    assert caught.value.hint == "Did you mean 'lamp3'? For a task of your own, give the path of a .yaml file."


def test_the_answer_limit_is_not_part_of_a_tasks_identity(tmp_path: Path) -> None:
    plain, limited = load_task(written(tmp_path)), load_task(written(tmp_path, answer_tokens=200))
    assert plain.identity == limited.identity
    assert limited.model_dump(mode="json") == plain.model_dump(mode="json") | {"answer_tokens": 200}
    assert (plain.answer_tokens, Task.model_validate(limited.model_dump()).answer_tokens) == (None, 200)


def test_examples_are_questions_of_the_task_and_not_part_of_its_identity(tmp_path: Path) -> None:
    for name in task_names():
        task = load_task(name)
        for example in task.examples:
            assert task.prompt(task.asked(example))
    plain, shown = load_task(written(tmp_path)), load_task(written(tmp_path, examples=[{"text": "Nice."}]))
    assert plain.identity == shown.identity
    assert shown.examples == ({"text": "Nice."},)
    with pytest.raises(TaskError, match=r"an example has the fields \['title'\]; the prompt has \['text'\]"):
        load_task(written(tmp_path, examples=[{"title": "Nice."}]))


@pytest.mark.parametrize("name", ["profile", "person", "time", "id"])
def test_a_field_cannot_have_a_name_that_readers_use(tmp_path, name) -> None:
    with pytest.raises(TaskError, match=f"a field cannot be called '{name}'"):
        load_task(written(tmp_path, item={"prompt": f"About {{{name}}}", "target": "score"}, text=f"{{{name}}}"))

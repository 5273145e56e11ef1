"""The benchmark's scores against examples computed by hand."""

import json

import pytest

from mta.data.tasks import load_task
from mta.errors import DataError, InputError
from mta_lab.lamp_scores import score
from mta_lab.readers.lamp import read_answers

RATING, TAG, HEADLINE = load_task("lamp3"), load_task("lamp2"), load_task("lamp4")


def numbered(*texts):
    return {str(number): text for number, text in enumerate(texts)}


def test_tags_match_exactly_and_f1_averages_all_labels():
    # comedy: 1 right, 1 missed, none wrong; action the same: F1 2/3 each. Nothing is of the other 13 labels: 0.
    found = score(TAG, numbered("comedy", "Comedy", "", " action\n"), numbered("comedy", "comedy", "action", "action"))
    assert found == {"accuracy": 0.5, "F1": pytest.approx(2 * (2 / 3) / 15)}


def test_a_wrong_label_lowers_its_own_f1():
    # comedy: 1 right, 1 wrong: precision 1/2, recall 1, F1 2/3. action: missed once: 0.
    found = score(TAG, numbered("comedy", "comedy"), numbered("comedy", "action"))
    assert found == {"accuracy": 0.5, "F1": pytest.approx((2 / 3) / 15)}


def test_ratings_that_are_not_numbers_get_the_largest_error():
    # |4-5| = 1; of 1 and 5 the farther from 2 is 5: 3; 0.5; an empty answer to 3: 2.
    found = score(RATING, numbered("4", "bad", "2.5", ""), numbered("5", "2", "3", "3"))
    assert found == {"MAE": pytest.approx(6.5 / 4), "RMSE": pytest.approx((14.25 / 4) ** 0.5)}


def test_headlines_are_compared_without_stemming_or_case():
    # Two of three words each way, in order; "runs" is not "run"; nothing has no word.
    said, true = numbered("The cat sat.", "dog run", ""), numbered("the cat ran", "Dog runs", "a b")
    found = score(HEADLINE, said, true)
    assert found == {"ROUGE-1": pytest.approx((2 / 3 + 1 / 2) / 3), "ROUGE-L": pytest.approx((2 / 3 + 1 / 2) / 3)}


@pytest.mark.parametrize(
    ("said", "true", "message"),
    [
        ({"1": "4"}, {"1": "4", "2": "5"}, "1 of 2 questions have no answer, '2' first"),
        ({"1": "4", "2": "5"}, {"1": "4"}, "1 of 2 questions were never asked, '2' first"),
        ({}, {}, "no question to score"),
    ],
)
def test_answers_must_match_the_questions(said, true, message):
    with pytest.raises(InputError, match=message):
        score(RATING, said, true)


def written(path, answers):
    rows = [{"id": id, "output": text} for id, text in answers.items()]
    path.write_text(json.dumps({"task": "LaMP_3", "golds": rows}))
    return path


def test_an_answer_may_be_empty_but_a_gold_may_not(tmp_path):
    path = written(tmp_path / "predictions.json", {"10": "4", "20": ""})
    assert read_answers(path, RATING, empty=True) == {"10": "4", "20": ""}
    with pytest.raises(DataError, match=r"predictions\.json:\d+: element 2: field 'output': empty"):
        read_answers(path, RATING)
    with pytest.raises(DataError, match="holds answers for 'LaMP_3'; task 'lamp4' is 'LaMP_4'"):
        read_answers(path, HEADLINE)


def test_a_models_answers_are_those_of_the_file_itself(tmp_path):
    """The outputs beside a file of questions are the true answers, whose score would be perfect."""
    written(tmp_path / "dev_outputs.json", {"1": "4"})
    (tmp_path / "dev_questions.json").write_text("[]")
    with pytest.raises(DataError, match=r"dev_questions\.json"):
        read_answers(tmp_path / "dev_questions.json", RATING, empty=True)
    path = written(tmp_path / "my_questions.json", {"1": "5"})
    assert read_answers(path, RATING, empty=True) == {"1": "5"}


def test_golds_are_found_in_the_folder_of_their_questions(tmp_path):
    (tmp_path / "dev_questions.json").write_text("[]")
    with pytest.raises(DataError, match="no outputs file beside"):
        read_answers(tmp_path, RATING)
    written(tmp_path / "dev_outputs.json", {"1": "4"})
    for path in (tmp_path, tmp_path / "dev_questions.json", tmp_path / "dev_outputs.json"):
        assert read_answers(path, RATING) == {"1": "4"}

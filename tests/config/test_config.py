"""Settings: YAML, key=value over it, and errors that name key, value and source."""

import shlex

import pytest

from mta.config import CompareSettings, Lora, Run, override, parse_size
from mta.config.loader import dump_yaml, read_yaml
from mta.errors import ConfigError
from mta.tools.demo import load_demo


def written(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(path=None, *words, kind=Run):
    with pytest.raises(ConfigError) as caught:
        override(kind(), words, path)
    return caught.value


# values


def test_defaults_are_those_of_the_paper():
    run = override(Run(), [])
    assert (run.bank.anchors, run.bank.min_items, run.bank.lora) == (50, 11, Lora(rank=8, alpha=16))
    assert run.bank.lora.scale == 2.0


def test_a_partial_group_keeps_its_other_defaults(tmp_path):
    path = written(tmp_path, "stack: {training: {lr: 0.5}}\n")
    given, default = override(Run(), [], path).stack.training, Run().stack.training
    assert given == default.model_copy(update={"lr": 0.5})


@pytest.mark.parametrize("words", [["stack.training.epochs=3"], ["stack={training: {epochs: 3}}"]])
def test_epochs_replace_the_default_steps(words):
    training = override(Run(), words).stack.training
    assert (training.epochs, training.steps) == (3, None)


def test_words_override_the_file(tmp_path):
    path = written(tmp_path, "seed: 3\nbank: {anchors: 20, min_items: 5}\n")
    run = override(Run(), ["bank.anchors=7", "stack.training.lr=1e-3"], path)
    assert (run.seed, run.bank.anchors, run.bank.min_items) == (3, 7, 5)
    assert run.stack.training.lr == 1e-3


@pytest.mark.parametrize(
    "words", [["merge.k=2", "merge={policy: similarity}"], ["merge={policy: similarity}", "merge.k=2"]]
)
def test_words_for_a_group_and_for_a_part_of_it_add_up(words):
    merge = override(Run(), words).merge
    assert (merge.k, merge.policy) == (2, "similarity")


def test_a_value_may_hold_an_equals_sign_a_list_or_nothing():
    assert override(Run(), ["base=a=b"]).base == "a=b"
    assert override(CompareSettings(), ["seeds=[1, 2]"]).seeds == (1, 2)
    assert override(Run(), ["task_lora.unseen=null"]).task_lora.unseen is None


@pytest.mark.parametrize("settings", [Run(), Run(seed=4, merge={"k": 3}), CompareSettings(seeds=(0, 1))])
def test_settings_survive_yaml(tmp_path, settings):
    assert override(type(settings)(), [], written(tmp_path, dump_yaml(settings))) == settings


# mistakes


def test_an_unknown_key_is_named_with_its_value():
    error = refused(None, "bank.ankers=3")
    assert error.message == "the command line: bank.ankers: Extra inputs are not permitted (got 3)"
    assert error.hint.startswith("Did you mean anchors? Settings here are: anchors, min_items, ")


@pytest.mark.parametrize(
    ("word", "key", "got", "hint"),
    [
        ("bank.anchors=many", "bank.anchors", "'many'", "The default:  bank.anchors=50"),
        ("bank.anchors=0", "bank.anchors", "0", "The default:  bank.anchors=50"),
        ("merge.k=-1", "merge.k", "-1", "k: anchors retrieved, 0 = all; the paper takes 2. The default:  merge.k=0"),
        ("seed=1.5", "seed", "1.5", "The default:  seed=0"),
        ("seed=-1", "seed", "-1", "The default:  seed=0"),
        ("bank.training.epochs=.inf", "bank.training.epochs", "inf", ""),
        ("merge.policy=best", "merge.policy", "'best'", "The default:  merge.policy=auto"),
        ("bank=3", "bank", "3", "Set a key of the group, for example:  bank.anchors=…"),
        ("memory=lots", "memory", "'lots'", "Write a size such as  4GiB"),
    ],
)
def test_a_bad_value_is_reported_with_its_key_and_the_expected_form(word, key, got, hint):
    error = refused(None, word)
    assert error.message.startswith(f"the command line: {key}: ")
    assert error.message.endswith(f"(got {got})")
    assert error.hint.endswith(hint)


@pytest.mark.parametrize("word", ["bank.anchors", "=3", ""])
def test_a_word_without_an_equals_sign_is_refused_with_the_form(word):
    assert str(refused(None, word)) == f"not a setting: {word!r}; expected key=value\n  For example:  memory=8GiB"


@pytest.mark.parametrize("value", ["[1", "2020-99-99", "0b_", "[" * 2000])
def test_a_value_that_is_not_yaml_is_reported(value):
    error = refused(None, f"seed={value}")
    assert error.message == f"'seed={value}': the value is not readable YAML"
    assert error.hint == "If it is text, quote it:  'seed=\"…\"'"


def test_a_key_below_a_single_value_is_refused(tmp_path):
    error = refused(written(tmp_path, "seed: 3\n"), "seed.deep.x=1")
    assert error.message == "'seed.deep.x=1': 'seed' is a single value, not a group of settings"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["seeds=3"], "The default:  'seeds=[]'"),
        (["shots.x=1"], "Set it directly:  shots=…"),
        (["b.jsonl"], "For example:  shots=8"),
    ],
)
def test_hints_can_be_typed(words, hint):
    with pytest.raises(ConfigError) as caught:
        override(CompareSettings(), words)
    assert caught.value.hint.endswith(hint)
    typed = shlex.split(hint.partition("  ")[2])
    assert override(CompareSettings(), [typed[0].replace("…", "2")])


def test_a_missing_file_is_named(tmp_path):
    assert refused(tmp_path / "no.yaml").message == f"no such configuration file: {tmp_path / 'no.yaml'}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [1", " is not readable YAML: "),
        ("\t- x: :", " is not readable YAML: "),
        ("- 1\n", ": expected a mapping of settings, got list"),
    ],
)
def test_a_file_that_is_no_mapping_of_settings_is_reported(tmp_path, text, reason):
    path = written(tmp_path, text)
    assert refused(path).message.startswith(f"{path}{reason}")


# sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [("1024", 1024), ("4GiB", 4 * 2**30), ("500 MB", 500 * 10**6), ("1.5KiB", 1536), (" 2 kb ", 2000), ("7B", 7)],
)
def test_a_size_is_a_number_with_a_unit(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "GiB", "4 XB", "4 GiB GiB", "-1GiB", "0", "inf", "nan"])
def test_an_invalid_size_is_refused(text):
    with pytest.raises(ConfigError, match="not a size"):
        parse_size(text)


# recipes


@pytest.mark.parametrize("name", ["nothing", "nothing.yaml"])
def test_an_unknown_recipe_is_reported_with_the_known_ones(name):
    with pytest.raises(ConfigError, match=f"no recipe '{name}'") as caught:
        load_demo(name)
    assert "movielens" in caught.value.hint


@pytest.mark.parametrize("text", ["- 1\n", "", "a: [1"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="recipe"):
        load_demo(written(tmp_path, text))


def test_a_key_that_is_merged_may_be_overridden_and_one_that_is_written_twice_not(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, y: 3}\n<<: *b\n")
    assert read_yaml(path)["c"]["y"] == 3
    for text in ("a: 1\na: 2\n", "b: {c: 1, d: 2, c: 3}\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="occurs twice"):
            read_yaml(path)

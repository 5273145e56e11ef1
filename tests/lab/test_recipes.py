"""Recipes of experiments: that they can be read, and what they refuse."""

from functools import cache

import pytest

from mta.config import StackSettings, override
from mta.errors import ConfigError, InputError
from mta_lab.experiments.recipe import difference, load_experiment, names, wanted

recipe = cache(load_experiment)


def test_every_recipe_can_be_read_and_names_its_task():
    lamp, authors = ("1", "2", "2n", "3", "4", "5", "7"), range(1, 6)
    known = {*(f"lamp{n}" for n in lamp), *(f"authors-lamp{n}" for n in authors), "movielens", "smoke", "survey"}
    assert set(names()) == known
    for name in names():
        assert {"main", "ablation", "shots", "k", "alpha", "anchors", "efficiency"} <= set(recipe(name).exhibits)


def test_one_method_with_two_merges_on_one_bank_is_refused_before_it_runs():
    def parts(words):
        given = f"exhibits.main=[{{methods: [mta]}}, {{words: [{words}], methods: [{{method: mta, name: x}}]}}]"
        return override(recipe("smoke"), [given, "exhibits.ablation=[]"])

    with pytest.raises(InputError, match="two parts run 'x' on bank 'main' with different words"):
        wanted(parts("merge.policy=posterior"), "test", ["main"])
    assert wanted(parts("memory=2GiB"), "test", ["main"]) == ["main"]
    other = "exhibits.main=[{bank: other, words: [bank.anchorz=3], methods: [mta]}]"
    with pytest.raises(ConfigError, match="anchorz"):  # before the banks of other parts are built
        wanted(override(recipe("smoke"), [other]), "test", ["main"])


def test_recipes_may_differ_in_what_is_run_but_not_in_what_both_run():
    known = load_experiment("survey")
    fewer = known.model_copy(update={"exhibits": {"rivals": known.exhibits["rivals"]}, "seeds": (7,)})
    assert difference(known, fewer) is None
    assert difference(fewer, known) is None
    (first, *rest) = known.exhibits["rivals"]
    other = first.methods[-1].model_copy(update={"stack": StackSettings(enabled=False)})
    changed = fewer.model_copy(update={"exhibits": {"rivals": (first.model_copy(update={"methods": (other,)}), *rest)}})
    assert difference(known, changed)[0] == "mta 'MTA' on bank main"
    trained = {"rivals": (rest[0].model_copy(update={"words": ("task_lora.history=3",)}),)}
    assert difference(known, fewer.model_copy(update={"exhibits": trained}))[0] == "bank history"


def test_a_recipe_extends_a_recipe_in_the_same_folder(tmp_path):
    (tmp_path / "below.yaml").write_text("over: smoke\nqueries: 1\n")
    (tmp_path / "above.yaml").write_text("over: below.yaml\nshots: 2\ntuned: {OPPU: {training: {steps: 1}}}\n")
    found = load_experiment(tmp_path / "above.yaml")
    assert (found.shots, found.queries, found.few) == (2, 1, 2)
    oppu = next(m for m in found.exhibits["main"][0].methods if m.name == "OPPU")
    assert (oppu.training.steps, oppu.training.lr) == (1, 2e-4)
    with pytest.raises(ConfigError, match="no recipe"):
        load_experiment(tmp_path / "missing.yaml")


def test_tuned_settings_reach_methods_within_others(tmp_path):
    """A control, for example, must have the settings of the method that it controls."""
    (tmp_path / "mine.yaml").write_text("over: smoke\ntuned: {MTA: {merge: {policy: uniform}}}\n")
    methods = {m.name: m for m in load_experiment(tmp_path / "mine.yaml").exhibits["main"][0].methods}
    tuned = [methods["MTA"], methods["MTA, other person's shots"].over, methods["MTA + RAG"].over]
    tuned += [one for one in methods["MTA, chosen"].candidates if one.name == "MTA"]
    assert [one.merge.policy for one in tuned] == ["uniform"] * 4


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("{words: [bank.anchors=2], methods: [base]}", "give it a name"),
        ("{retrieve: 1, methods: [base]}", "give it a name"),
        ("{pool: everything, methods: [base]}", "give it a name"),
        ("{bank: other, words: [max_tokens=9], methods: [base]}", "would change the base"),
        ("{bank: other, words: [base=x], methods: [base]}", "would change the base"),
        (
            "{methods: [base]}, {bank: a, retrieve: 1, methods: [base]}, {bank: a, methods: [task-lora]}",
            "train bank 'a'",
        ),
        ("{people: 0, methods: [base]}", "people"),
        ("{shots: [0], methods: [base]}", "shots"),
    ],
)
def test_parts_that_would_mix_banks_are_refused(part, reason):
    with pytest.raises(ConfigError, match=reason):
        override(recipe("smoke"), [f"exhibits.main=[{part}]"])


def test_parts_of_other_merges_and_of_named_banks_are_accepted():
    free = "[merge.k=1, 'stack={enabled: false}', memory=2GiB]"
    good = f"[{{words: {free}, methods: [base]}}, {{bank: a, retrieve: 1, methods: [base]}}]"
    override(recipe("smoke"), [f"exhibits.main={good}"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("over: smoke\nexhibits: {main: [{methods: }]}", "methods is a list"),
        ("over: smoke\nexhibits: {main: {methods: [base]}}", "exhibits are lists of parts"),
        ("over: smoke\nexhibits: {main: [{methods: [oppo]}]}", "no such method: 'oppo'"),
        (
            "over: smoke\nexhibits: {main: [{methods: [{method: merge, name: twice}, {method: mta, name: twice}]}]}",
            "two methods called 'twice'",
        ),
        ("over: smoke\ntuned: [base]", "tuned names methods"),
        ("over: smoke\ntuned: {task LoRA: 3}", "tuned names methods"),
        ("over: mine.yaml", "mine.yaml is over itself"),
        ("over: [lamp3]", r"over is \['lamp3'\], expected one recipe"),
        ("over: smoke\nexhibits: {main: [{methods: [{method: [merge]}]}]}", "no such method"),
        ("over: other.yaml", "mine.yaml is over itself"),
        ("over: smoke\nexhibits: {main: [{methods: [{method: base, name: [a]}]}]}", "name"),
        ("run: {}", "exhibits are missing"),
        ("", "exhibits are missing"),
    ],
)
def test_a_mistake_in_a_recipe_is_an_error(text, reason, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text("over: mine.yaml")
    with pytest.raises(ConfigError, match=reason):
        load_experiment(tmp_path / "mine.yaml")


@pytest.mark.parametrize("word", ["seeds=[]", "shots=0", "queries=0", "compared=0", "few=0"])
def test_sizes_of_nothing_are_refused(word):
    with pytest.raises(ConfigError):
        override(recipe("smoke"), [word])

"""Every verb, end to end, from a saved base and a file of ratings."""

import contextlib
import json
import re
import shutil

import pytest
from world import ANN, BOB, MEMBER, QUESTION, mta, ratings, run, tree, written
from world import world as world  # the fixture

from mta.bank.format import read_info
from mta.cli import options
from mta.cli.options import executor_at, open_bank
from mta.data.history import Person
from mta.personalize import Personalizer

# bank


def test_bank_build_reports_the_bank(world):
    assert world.built.json["anchors"] == 2
    assert "task LoRA: 8/8 examples" in world.built.err
    assert set(world.built.json["seconds"]) == {"task LoRA", "anchors", "calibration"}


def test_settings_come_from_a_file_then_words_then_options(world, tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 4\nbank: {anchors: 9, max_items: 9}\n")
    shutil.copytree(world.base, tmp_path / "2024")
    given = [*world.settings, "seed=5", "--config", "run.yaml", "--base", "2024", "--seed", 6, "--out", "bank"]
    with contextlib.chdir(tmp_path):
        mta("bank", "build", world.members, *given)
        shown = mta("bank", "show", "bank", "--json").json
    settings = shown["run"]
    assert (shown["base"], settings["seed"]) == ("2024", 6)
    assert (settings["bank"]["anchors"], settings["bank"]["max_items"]) == (2, 4)


def test_a_copy_is_calibrated(world, tmp_path):
    people, copy = written(tmp_path / "others.jsonl", ratings("other", "ruiz", 9)), tmp_path / "copy"
    words = ["bank", "calibrate", world.bank, people, "--out", copy, "calibration.people=8", "calibration.steps=1"]
    found = mta(*words, "--json").json
    assert (found["folder"], found["calibration"]["people"]) == (str(copy), 8)
    card = mta("bank", "show", copy).out
    assert "Measured on 8 people, on items that the bank was not trained on" in card
    assert "| 1 | " in card
    assert mta("bank", "show", copy, "--json").json["hash"] == found["hash"] != world.built.json["hash"]
    said = run(*words, "max_tokens=64")
    assert (said.code, "'max_tokens' cannot be changed here" in said.err) == (1, True), said.err
    said = run(*words[:-2], "calibration.people=4")
    assert (said.code, "calibration.people is 4; at least 8 are needed" in said.err) == (1, True), said.err


def test_a_marked_anchor_is_trained_anew_without_the_person(world, tmp_path):
    at, new = world.copy(tmp_path / "here"), tmp_path / "new"
    rebuild = ["bank", "rebuild", at[1], world.members, "--out", new, "memory=1GiB", "--json"]
    said = run(*rebuild)
    assert (said.code, "mta forget marks the groups of a person" in said.err) == (1, True), said.err
    people, members = map(json.loads, world.members.open()), read_info(at[1]).members
    anchor = next(one["person"] for one in people if members.trained(one["person"], "anchor"))
    mta("forget", anchor, *at)
    found = mta(*rebuild).json
    assert found["hash"] != world.built.json["hash"]
    assert "anchor" not in mta("bank", "show", new, "--json").json["needs_rebuild"]


@pytest.mark.parametrize("command", ["calibrate", "rebuild"])
def test_a_copy_that_cannot_be_written_is_refused_before_anything_is_computed(world, command):
    said = run("bank", command, world.bank, world.members, "--out", "/proc/copy")
    assert (said.code, "/proc/copy cannot be written" in said.err) == (1, True), said.err


def test_bank_show_prints_the_card_and_counts_the_members_without_their_hashes(world):
    said = mta("bank", "show", world.bank).out
    assert said.startswith("# A bank of 2 anchors for `movielens-rating`")
    assert (world.bank / "README.md").read_text().strip().endswith(f"---\n\n{said.strip()}")
    shown = mta("bank", "show", world.bank, "--json").json
    assert shown["task"]["name"] == "movielens-rating"
    assert set(shown["members"]) == {"task", "candidates", "anchors", "sha256"}


# people


def test_update_starts_from_existing_states(world, tmp_path):
    at = world.copy(tmp_path)
    grown = written(tmp_path / "grown.jsonl", ratings("new", "quispe", 4, items=8) + ratings("later", "quispe", 1))
    found = mta("personalize", grown, *at, "--update", "--json").json
    assert found["kept"] + found["retrained"] + found["refreshed"] == 4
    assert (found["begun"], found["unchanged"], found["failed"]) == (1, 0, {})
    again = mta("personalize", grown, *at, "--update", "--json").json  # who was kept is looked at again
    assert (again["unchanged"], again["kept"]) == (5 - found["kept"], found["kept"])


def test_an_update_from_fewer_items_keeps_the_states_unless_asked_for_the_latest(world, tmp_path):
    at = world.copy(tmp_path)
    before = tree(tmp_path / "people")
    few = written(tmp_path / "few.jsonl", ratings("new", "quispe", 4, items=3))
    said = mta("personalize", few, *at, "--update")
    assert "their models know more items than the file: 4 people" in said.err
    assert tree(tmp_path / "people") == before
    assert mta("personalize", few, *at, "--update", "--latest", 3, "--json").json["begun"] == 4


def test_workers_of_a_cluster_take_no_gpu_for_the_cpu(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "mta.distributed.ray.Cluster", lambda *_, **how: asked.append(how["gpu"]) or contextlib.nullcontext()
    )
    for device in ("cpu", "auto", "cuda:1"):
        with executor_at("local", 2, device):
            pass
    assert asked == [False, None, None]


@pytest.mark.slow
def test_workers_of_a_cluster_make_the_states(world, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'merge-then-adapt[ray]'")
    words = ["--bank", world.bank, "--store", tmp_path / "people", "--cluster", "local", "--workers", 2]
    found = mta("personalize", world.new, *words, "--together", 2, "--json")
    result = found.json
    assert len(result.pop("plan")) == 64
    assert result == {"trained": 4, "unchanged": 0, "shortened": 0, "failed": {}, "forgotten": []}
    assert "fleet: 4/4" in found.err
    assert mta("store", "check", tmp_path / "people", "--json").json["states"] == 4


def test_personalizing_again_changes_nothing(world):
    first, before = world.personalized.json, tree(world.store)
    assert len(first.pop("plan")) == 64
    assert first == {"trained": 4, "unchanged": 0, "shortened": 0, "failed": {}, "forgotten": []}
    assert mta("personalize", world.new, *world.at).out.startswith("0 people personalized, 4 were up to date")
    assert tree(world.store) == before


def test_generate_answers_for_each_person_and_without_a_person(world):
    asked = [QUESTION, "--person", BOB, "--person", ANN, "--shared"]
    answers = mta("generate", *asked, *world.at, "--json").json
    assert [answer["person"] for answer in answers] == [BOB, ANN, "(task)", "(base)"]
    assert all(sum(answer["shares"].values()) == pytest.approx(1) for answer in answers)
    assert all(answer["answer"] == max(answer["shares"], key=answer["shares"].get) for answer in answers)
    assert answers[0]["shares"] != answers[1]["shares"]
    line = mta("generate", QUESTION, "--person", ANN, *world.at).out
    assert re.match(rf"{ANN}: [1-5]   ([1-5] \d+%  ){{4}}[1-5] \d+%\n", line)
    written_texts = mta("generate", *asked, *world.at, "--max-new-tokens", 3, "--write", "--json").json
    assert len({answer["answer"] for answer in written_texts}) > 1


def test_export_loads_no_weights_and_equals_the_librarys(world, tmp_path, monkeypatch):
    base, bank, settings = open_bank(world.bank)
    Personalizer(base, bank, world.store, run=settings).export(ANN, tmp_path / "library")
    monkeypatch.setattr("mta.model.base.load_weights", None)  # fails if weights are loaded
    said = mta("export", ANN, "--out", tmp_path / "ann", *world.at, "--json").json
    config = json.loads((tmp_path / "ann" / "adapter_config.json").read_text())
    assert said.pop("max_lora_rank") >= config["r"]
    assert said == {"folder": str(tmp_path / "ann"), "rank": config["r"], "relative_error": 0.0}
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ann" / name).read_bytes() == (tmp_path / "library" / name).read_bytes()


def test_export_replaces_an_earlier_export_and_no_other_adapter(world, tmp_path):
    at, mine = world.copy(tmp_path), tmp_path / "mine"
    for _ in range(2):
        mta("export", ANN, "--out", mine, *at)
    before = tree(mine)
    said = run("export", BOB, "--out", mine, *at)
    assert (said.code, tree(mine)) == (1, before)
    assert f"InputError: {mine} holds another adapter" in said.err


def test_export_reports_the_error_of_compression(world, tmp_path):
    said = mta("export", ANN, "--out", tmp_path / "a", *world.at, "--rank", 1)
    assert "rank 1: a vLLM server needs --max-lora-rank 8" in said.err
    said = mta("export", ANN, "--out", tmp_path / "ann", *world.at, "--rank", 1, "--json").json
    assert 0 < said["relative_error"] < 1
    assert (said["rank"], said["max_lora_rank"]) == (1, 8)


def test_forget_removes_a_person(world, tmp_path):
    at = world.copy(tmp_path)
    result = {"states_removed": True, "needs_rebuild": [], "exports_left": [], "published": [], "unknown": []}
    result |= {"unmarked": {}, "complete": True}
    assert mta("forget", ANN, *at, "--json").json == result
    assert run("generate", QUESTION, "--person", ANN, *at).err.splitlines()[-2].startswith("PersonNotFound: ")
    assert mta("forget", ANN, *at).out == "nothing is stored for this person\n"


def test_forget_names_exports_that_it_cannot_remove(world, tmp_path):
    at = world.copy(tmp_path)
    mta("export", ANN, "--out", tmp_path / "out", *at)
    (tmp_path / "out" / "adapter_model.safetensors").write_bytes(b"changed")
    said = mta("forget", ANN, *at).out
    assert said.startswith("removed\n")
    assert f"exported and not removed: {tmp_path}/out (its adapter was changed since)\n" in said


@pytest.mark.parametrize("update", [[], ["--update"]])
def test_a_kept_history_is_whole_where_a_state_is_made_from_the_latest_items(world, tmp_path, update):
    at = world.copy(tmp_path)
    mta("personalize", world.new, *at, "--latest", 2, "--keep-histories", *update)
    assert mta("person", "show", ANN, *at, "--json").json["history"] == 6


def test_person_show_explains_a_state(world, tmp_path):
    at = world.copy(tmp_path)
    mta("personalize", world.new, *at, "--keep-histories")
    mta("export", ANN, "--out", tmp_path / "out", *at)
    result, said = mta("person", "show", ANN, *at, "--json").json, mta("person", "show", ANN, *at).out
    assert said.startswith("version 1, saved 20")
    assert f"bank {result['bank'][:12]}, the one at {tmp_path}/bank\nmerge: posterior, 2 anchors\n" in said
    shown = re.findall(r"anchor (\d+) +([+-]\d\.\d{3})", said)
    assert shown == [(anchor, f"{w:+.3f}") for anchor, w in result["weights"].items()]
    assert re.search(
        r"nats per token on their shots \(12 target tokens\): pooled model \d\.\d{3}, with the merge \d\.", said
    )
    assert "history: 6 items kept\n" in said
    assert f"exported to {tmp_path}/out on " in said
    assert "parts of the bank that were trained on them: none\n" in said
    for text in ("Zorblax", "Drama"):
        assert text not in said
        assert text not in json.dumps(result)


def test_person_show_reports_a_missing_stack_and_history(world, tmp_path):
    at = world.copy(tmp_path)
    mta("personalize", world.new, *at, "stack.enabled=false", "merge.policy=uniform")
    said = mta("person", "show", BOB, *at).out
    assert said.startswith("version 2, saved 20")
    assert "kept: 1, 2\n" in said
    assert "stack: none, the merge alone\n" in said
    assert "history: not kept\n" in said
    assert "pooled model  " not in said


def test_person_show_lists_few_anchors_also_of_equal_weight(world, tmp_path, monkeypatch):
    at = world.copy(tmp_path)
    mta("personalize", world.new, *at, "merge.policy=uniform")
    monkeypatch.setattr("mta.cli.person.SHOWN", 1)
    said = mta("person", "show", BOB, *at).out
    assert len(re.findall(r"(?m)^anchor \d", said)) == 1
    assert "and 1 others" in said


def test_an_earlier_version_is_restored(world, tmp_path):
    at, store = world.copy(tmp_path), ["--store", tmp_path / "people"]
    mta("personalize", world.new, *at, "merge.policy=uniform")
    show = lambda: mta("person", "show", ANN, *at, "--json").json  # noqa: E731
    assert (show()["policy"], show()["version"]) == ("uniform", 2)
    assert mta("person", "rollback", ANN, 1, *store).out == "the newest version is 3, with the content of version 1\n"
    assert mta("person", "rollback", ANN, 1, *store, "--json").json == {"content_of": 1, "version": 3}
    assert (show()["policy"], show()["version"], show()["versions"]) == ("posterior", 3, [1, 2, 3])


def test_forget_marks_every_bank_that_is_named_and_names_the_parts_trained_on_the_person(world, tmp_path):
    banks = [shutil.copytree(world.bank, tmp_path / name) for name in ("one", "two")]
    named = [word for bank in banks for word in ("--bank", bank)]
    said = mta("forget", MEMBER, *named, "--store", shutil.copytree(world.store, tmp_path / "store")).out
    trained = "^trained on the person, until you rebuild the bank without them: (task LoRA|clusters)"
    assert re.search(trained, said, re.MULTILINE)
    assert "adapters exported with such a bank hold these parts, too" in said
    assert all((bank / "needs-rebuild.json").exists() for bank in banks)


def test_forget_without_the_bank_removes_the_person_and_exits_with_3_until_the_bank_is_there(world, tmp_path):
    at = world.copy(tmp_path)
    (tmp_path / "bank").rename(tmp_path / "moved")
    said = run("forget", MEMBER, *at)
    assert said.code == 3
    assert f"not marked as needing a rebuild: {tmp_path}/bank (no bank at {tmp_path}/bank: bank.json is missing)" in (
        said.out
    )
    assert f"mta forget {MEMBER} --bank {tmp_path}/bank --store {tmp_path}/people" in said.err
    said = run("forget", ANN, *at, "--json")
    assert (said.code, said.json["states_removed"], list(said.json["unmarked"])) == (3, True, [f"{tmp_path}/bank"])
    (tmp_path / "moved").rename(tmp_path / "bank")
    assert mta("forget", ANN, *at, "--json").json["complete"]
    assert mta("forget", MEMBER, *at, "--json").json["needs_rebuild"]


def test_forget_says_that_there_is_no_store_even_if_the_person_is_in_the_bank(world, tmp_path):
    world.copy(tmp_path)
    said = run("forget", MEMBER, "--bank", tmp_path / "bank", "--store", tmp_path / "wrong")
    assert said.code == 3
    assert f"there is no store at {tmp_path}/wrong" in said.out
    assert "no states were looked for" in said.err
    assert "nothing is stored" not in said.out


def test_forget_with_an_unknown_hub_id_still_removes_the_person(world, tmp_path):
    at = world.copy(tmp_path)
    said = run("forget", ANN, "--store", at[3], "--bank", "nobody/nothing", "--json")
    assert (said.code, said.json["states_removed"], list(said.json["unmarked"])) == (3, True, ["nobody/nothing"])


def test_people_whose_items_are_all_asked_are_left_out(world, tmp_path, monkeypatch):
    """As in LaMP's files: each question is about an item of the profiles of the person's other questions."""
    read = options.people_in
    monkeypatch.setattr(options, "people_in", lambda *given: [*read(*given), Person("all-asked", ())])
    said = mta("personalize", world.new, *world.copy(tmp_path))
    assert "1 of 5 people have no item besides their own questions: left out" in said.err

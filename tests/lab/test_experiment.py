"""An experiment on a tiny model: every method and exhibit, resuming, reports, and no texts of people in reports."""

import gzip
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import people_of
from tiny import save_base

from mta.bank.calibration.people import measured_items
from mta.bank.task_lora import LOSSES, pooled_candidates, pooled_items
from mta.config import override
from mta.data.history import Item, People, Person
from mta.data.readers import read_people
from mta.data.tasks import load_task
from mta.errors import DataError, InputError
from mta.evaluation.protocol import TestBatch
from mta_lab.behind import behind_bank
from mta_lab.experiments import runner
from mta_lab.experiments import workspace as workspace_module
from mta_lab.experiments.recipe import load_experiment, wanted
from mta_lab.experiments.results import Results, read_records
from mta_lab.experiments.runner import run_experiment
from mta_lab.experiments.workspace import BATCH, MAIN, Workspace, batches
from mta_lab.methods.combined import folds_of
from mta_lab.methods.named import method_names
from mta_lab.reports.report import report

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A saved tiny base and people's ratings."""
    root = tmp_path_factory.mktemp("experiment")
    save_base(root / "base")
    write_rows(root / "people.jsonl", people_of(30, items=8), "-hoxha")
    return root


def write_rows(path: Path, people: list[Person], surname: str = "") -> None:
    rows = [{"person": p.id + surname, **item.fields, "time": item.time} for p in people for item in p.items]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def workspace_of(world: Path, out: Path, *words: str, **how) -> Workspace:
    given = [f"run.base={world / 'base'}", "run.task=movielens-rating", "run.dtype=float32", *words]
    recipe = override(load_experiment("smoke"), given)
    return Workspace.open(recipe, out, str(world / "people.jsonl"), **how)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """Every exhibit of the smoke recipe, run once."""
    out = tmp_path_factory.mktemp("runs") / "smoke"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTA_CACHE", str(world / "cache"))
        run_experiment(workspace_of(world, out))
    return out


def test_an_experiment_tests_people_of_another_file(world, cache, tmp_path):
    others = tmp_path / "others.jsonl"
    write_rows(others, people_of(4, items=6, seed=9))
    workspace = workspace_of(world, tmp_path / "run", test=str(others))
    assert [id.partition("/")[2] for id in workspace.splits.test] == [person.id for person in people_of(4)]
    run_experiment(workspace, ["ablation"])
    found = Results.read(tmp_path / "run")
    assert found.name == "movielens-rating-others"
    assert found.comparison("ablation").people == 4


def test_results_hold_hashed_groups(world, cache, tmp_path):
    people = people_of(30, items=8)

    def paired(path, task):
        return [replace(p, group=f"pair-{n // 2}") for n, p in enumerate(read_people(path, task))]

    run_experiment(workspace_of(world, tmp_path / "run", read=paired), ["ablation"])
    found = Results.read(tmp_path / "run")
    groups = found.comparison("ablation").groups
    assert len(groups) == 4
    assert len(set(groups)) == 2
    assert not any("pair" in group or group in {p.id for p in people} for group in groups)


@pytest.mark.parametrize("unseen", [None, 3])
def test_the_fair_pool_trains_on_all_that_the_bank_saw_and_for_as_many_examples(
    world, cache, tmp_path, monkeypatch, unseen
):
    words = [
        "run.task_lora.training.batch_size=3",
        "run.task_lora.rounds=2",
        f"run.task_lora.unseen={unseen or 'null'}",
    ]
    workspace = workspace_of(world, tmp_path / "run", *words, "people.task=14", "run.task_lora.items=20")
    monkeypatch.setattr("mta.bank.task_lora._held_out", lambda people, seed: {people[0].id})
    _, everything, as_many, _ = workspace.recipe.exhibits["main"]
    main, seen = workspace.bank(MAIN, 0), {}
    build = workspace_module.build_bank

    def watched(given):
        seen[given.out.name] = given.task_people, given.held_out
        return build(given)

    pools = []
    monkeypatch.setattr(workspace_module, "build_bank", watched)
    monkeypatch.setattr(
        "mta.bank.build.pooled_items", lambda *given: (pools.append(found := pooled_items(*given)), found)[1]
    )
    pooled, longer = workspace.bank(everything, 0), workspace.bank(as_many, 0)
    trained, held_out = seen["everything-0"]
    parts = {p.id: main.info.members.parts_of(p.id) for p in workspace.people}
    task, candidates = (workspace.splits.select(name, workspace.people) for name in ("task", "candidates"))
    anchors = {id for id, part in parts.items() if "anchor" in part}
    settings = main.info.run.task_lora
    own, held = pooled_items(task, settings, 0, candidates=pooled_candidates(candidates, anchors, settings))
    wanted = {id(item) for item in own} | {id(item) for p in candidates if p.id in anchors for item in p.items[-4:]}
    measured = [p for p in candidates if "calibration" in parts[p.id]]
    for person, (shots, queries) in zip(measured, measured_items(measured, main.info.run.calibration), strict=True):
        wanted |= set(map(id, person.items[:unseen] if unseen else (*shots, *queries)))
    assert sorted(id(item) for person in trained for item in person.items) == sorted(wanted)
    assert {id(item) for person in held_out for item in person.items} == set(map(id, held)) != set()
    assert [(sorted(map(id, pool)), sorted(map(id, stop))) for pool, stop in pools[:1]] == [
        (sorted(wanted), sorted(map(id, held)))
    ]
    assert len({person.id for person in trained}) == len(trained)
    assert all("task LoRA" in pooled.info.members.parts_of(p.id) for p in (*trained, *held_out))
    rounds = len(json.loads((tmp_path / "run" / "banks" / "main-0" / "run.json").read_text())["sittings"][0][LOSSES])
    steps = rounds * math.ceil(len(own) / 3) + math.ceil(4 * len(main) / 3)  # anchors have four items, trained on once
    assert longer.info.run.task_lora.training.steps == steps
    assert longer.info.run.task_lora.rounds == 1
    assert not torch.equal(*(next(iter(b.task_lora.factors.values())).b for b in (main, pooled)))


def test_a_bank_without_a_task_lora_saw_no_items_of_task_people(world, cache, tmp_path):
    workspace = workspace_of(world, tmp_path / "run", "run.task_lora.enabled=false")
    task, candidates = (workspace.splits.select(name, workspace.people) for name in ("task", "candidates"))
    people, held_out = behind_bank(workspace.bank(MAIN, 0), task, candidates, 0)
    assert held_out == []
    assert people
    assert {person.id for person in people} <= {person.id for person in candidates}


def test_another_recipe_and_other_items_in_the_same_folder_are_refused_and_leave_it_as_it_was(world, cache, tmp_path):
    out, first = tmp_path / "run", workspace_of(world, tmp_path / "run", "run.merge.policy=posterior")
    run_experiment(first, ["banks"])

    def refused(match, *words, **how):
        with pytest.raises(InputError, match=match) as error:
            run_experiment(workspace_of(world, out, "run.merge.policy=posterior", *words, **how), ["ablation"])
        return error.value.hint

    def files():
        return {path: path.read_bytes() for path in out.iterdir() if path.is_file()}

    before = files()
    for word in ("run.merge.policy=uniform", "shots=2", "run.bank.lora.rank=3", "tuned={MTA: {name: x}}"):
        hint = refused(rf"run holds results of another recipe: {word.partition('=')[0]}.* is .*, expected ", word)
        assert hint.endswith(f"or repeat its own recipe:  mta-lab evaluate {out}/recipe.yaml")
    for part in ("test", "candidates"):
        someone = getattr(first.splits, part)[0]

        def changed(source, task, someone=someone):
            people = read_people(source, task)
            mine = [replace(p, items=p.items[:-1] + p.items[:1]) if p.id == someone else p for p in people]
            return People(mine, people.task)

        refused("run holds results of other people, items, or another task: their digest is", read=changed)
    assert before == files()


def test_more_people_seeds_and_exhibits_of_a_recipe_are_added_to_its_folder(world, cache, tmp_path, monkeypatch):
    out, computed = tmp_path / "run", []
    compute = runner.compute_records
    monkeypatch.setattr(runner, "compute_records", lambda space, run: (computed.append(run), compute(space, run))[1])
    for exhibit, *words in (["ablation", "compared=2"], ["ablation", "seeds=[0,1]"], ["gradient", "seeds=[1]"]):
        run_experiment(workspace_of(world, out, *words), [exhibit])
    found = Results.read(out)
    assert found.seeds("ablation") == [0, 1]
    assert len({run.where for run in computed if run.exhibit == "gradient"}) == 2  # task LoRA and MTA are known
    assert found.comparison("gradient").people == 4


def test_an_item_of_a_tested_person_that_is_too_long_is_named_before_anything_is_trained(world, cache, tmp_path):
    def with_long(path, task):
        people = read_people(path, task)
        long = {"title": "Long", "genres": "Drama, " * 1000, "rating": "3"}
        return [Person.of(p.id, [*p.items[:-1], Item(long, p.items[-1].time)]) for p in people]

    with pytest.raises(DataError, match=r"^an item of '.*': .* instruction and target take"):
        run_experiment(workspace_of(world, tmp_path / "run", read=with_long), ["ablation"])
    assert not (tmp_path / "run" / "banks").exists()


def test_a_bank_that_comes_before_the_main_one_has_its_task_lora_too(world, cache, tmp_path):
    """So that an interrupted experiment finds the banks that it built."""
    hard = {"bank": "hard", "words": ["bank.training.epochs=2"], "methods": [{"method": "mta", "name": "MTA, longer"}]}
    given = f"exhibits.ablation={json.dumps([hard, {'methods': ['task-lora']}])}"
    for _ in range(2):
        workspace = workspace_of(world, tmp_path / "run", given)
        run_experiment(workspace, ["ablation"])
    hard, main = (workspace.bank(part, 0) for part in workspace.recipe.exhibits["ablation"])
    assert hard.folder != main.folder
    assert all(torch.equal(a, b) for a, b in zip(hard.task_lora.tensors().values(), main.task_lora.tensors().values()))


def test_workers_of_a_cluster_have_the_people_that_were_read(world, cache, tmp_path):
    workspace = workspace_of(world, tmp_path / "run", read=lambda path, task: read_people(path, task)[:28])
    there = workspace.opener()
    assert (there.people, there.splits, there.sizes) == (workspace.people, workspace.splits, workspace.sizes)
    assert len(there.people) == 28


def test_smoke_runs_every_registered_method(finished):
    recipe = load_experiment("smoke")
    listed = {m.method for parts in recipe.exhibits.values() for part in parts for m in part.methods}
    assert listed == set(method_names())
    found = Results.read(finished)
    main = found.comparison("main")
    wanted = [m.name for part in recipe.exhibits["main"] for m in part.methods]
    assert [row.name for row in main.rows] == wanted
    for row in main.rows:
        assert row.people["MAE"].shape == (1, 4)
        assert all(torch.isfinite(values).all() for values in row.people.values())
    ablation = found.comparison("ablation")
    assert [row.name for row in ablation.rows] == ["task LoRA", "MTA", "no stack", "no merge", "no task LoRA"]
    assert torch.equal(ablation.row("no stack").people["NLL"], main.row("merge only, laplace").people["NLL"])
    for name in ("retrieved", "k", "alpha", "anchors", "efficiency"):
        assert found.comparison(name) is not None, name


def test_retrieved_prompts_show_earlier_shots_and_never_what_is_asked(world, finished, cache):
    workspace = workspace_of(world, finished)
    batch = next(workspace.batches_of(workspace.recipe.exhibits["retrieved"][1], 0, 3))
    plain = load_task("movielens-rating")
    assert batch.task == batch.bank.task == plain
    for person, queries in zip(batch.people, batch.queries):
        texts = [f"{plain.sentence(item)}. " for item in person.items]
        assert [item.fields["profile"] for item in person.items[:2]] == ["", texts[0]]
        assert {item.fields["profile"] for item in queries} <= set(texts)
    folds, _ = folds_of(batch, 2)
    for person, held in zip(folds.people, folds.queries):
        shown = {item.fields["profile"] for item in (*person.items, *held)}
        assert not shown & {f"{plain.sentence(item)}. " for item in held}
        assert shown <= {"", *(f"{plain.sentence(item)}. " for item in person.items)}
    by_bank = {r.bank: r.metrics["NLL"] for r in read_records(finished) if r.method.startswith("MTA") and r.shots == 3}
    assert by_bank["retrieved"] != by_bank["main"]


def test_a_bank_with_history_is_asked_with_all_shots_in_its_prompts(world, finished, cache):
    workspace = workspace_of(world, finished)
    batch = next(workspace.batches_of(workspace.recipe.exhibits["rivals"][1], 0, 3))
    plain = load_task("movielens-rating")
    assert batch.bank.history == 8
    for person, queries in zip(batch.people, batch.queries):
        texts = [plain.sentence(item) for item in person.items]
        assert [item.fields.get("profile", "").count(" stars for ") for item in person.items] == [0, 1, 2]
        assert {item.fields["profile"] for item in queries} == {f"Earlier answers of this person: {'; '.join(texts)}. "}


def test_existing_results_are_not_computed_again(world, finished, cache, monkeypatch):
    before = [(finished / name).read_bytes() for name in ("scores.jsonl", "banks.json")]
    monkeypatch.setattr(runner, "compute_records", None)  # fails if a result is missing
    monkeypatch.setattr(TestBatch, "evidence", None)  # Figure 2 needs no pass for every anchor
    workspace = workspace_of(world, finished)
    run_experiment(workspace, [name for name in wanted(workspace.recipe, "test", ()) if name != "banks"])
    assert [(finished / name).read_bytes() for name in ("scores.jsonl", "banks.json")] == before


def test_a_resumed_experiment_equals_an_uninterrupted_one(world, cache, tmp_path, monkeypatch):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    run_experiment(workspace_of(world, whole), ["ablation"])
    compute, calls = runner.compute_records, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 3:
            (run,) = json.loads((torn / "run.json").read_text())["sittings"]
            assert run["hours"] is None  # as a killed process leaves it
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(runner, "compute_records", killed)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(workspace_of(world, torn), ["ablation"])
    (run,) = json.loads((torn / "run.json").read_text())["sittings"]
    assert (run["exhibits"], run["stopped"]) == (["ablation"], "KeyboardInterrupt")
    with (torn / "scores.jsonl").open("a") as file:
        file.write('{"kind": "torn')  # an incomplete line of a killed run
    run_experiment(workspace_of(world, torn), ["ablation"])
    plain = [sorted(r.model_dump_json(exclude={"seconds"}) for r in read_records(f)) for f in (whole, torn)]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("people", [0, 1, 15, 16, 17, 33, 240])
def test_batches_hold_each_person_once_and_at_least_two_people(people):
    found = batches(people)
    assert [n for batch in found for n in batch] == list(range(people))
    assert all(len(batch) <= BATCH for batch in found)
    assert people < 2 or min(map(len, found)) >= BATCH // 2 or len(found) == 1


def test_the_batch_size_does_not_change_answers(world, cache, tmp_path, monkeypatch):
    together, apart = tmp_path / "together", tmp_path / "apart"
    words = ["run.dtype=float64"]  # in float32, rounding decides between candidates with almost equal losses
    run_experiment(workspace_of(world, together, *words), ["main", "ablation"])
    monkeypatch.setattr("mta_lab.experiments.workspace.BATCH", 1)
    run_experiment(workspace_of(world, apart, *words), ["main", "ablation"])
    one, other = ({(r.where, r.person): r for r in read_records(folder)} for folder in (together, apart))
    assert one.keys() == other.keys()
    for key, record in one.items():
        assert record.answers == other[key].answers, key
        assert record.nll is None or record.nll == pytest.approx(other[key].nll, abs=1.1e-5), key


def test_the_report_needs_only_the_files_and_contains_no_texts(finished, tmp_path):
    out = tmp_path / "results"
    drawn = report([finished], out)
    titles = {line.split(": ", 1)[1] for line in drawn}
    assert {"Every method", "Ablation", "Score against shots", "Size of the bank"} <= titles
    assert "Primary comparisons, named in advance" in titles  # of one set, too
    folder = out / "people.jsonl"
    for name in ("README.md", "index.html", "main.svg", "main.png", "k.svg", "efficiency-time.png"):
        assert (folder / name).stat().st_size > 0, name
    for path in folder.rglob("*"):
        text = path.read_bytes()
        text = gzip.decompress(text) if path.suffix == ".gz" else text
        assert b"hoxha" not in text, path
        assert path.name == "README.md" or not re.search(rb"Film \d", text), path
    written = (folder / "README.md").read_text()
    assert "Film" not in written
    assert "base, float32. " in written  # a base that needs no note has none
    again = tmp_path / "again"
    report([folder], again)  # from what was published
    assert (again / "people.jsonl" / "main.svg").read_bytes() == (folder / "main.svg").read_bytes()
    assert (again / "people.jsonl" / "README.md").read_text() == (folder / "README.md").read_text()


def test_texts_are_reported_only_on_request_in_the_lamp_format(finished, tmp_path):
    report([finished], tmp_path, texts=True)
    files = sorted((tmp_path / "people.jsonl" / "answers").glob("task-lora*.json"))
    found = json.loads(files[0].read_text())
    assert found.keys() == {"task", "golds"}
    assert len({row["id"] for row in found["golds"]}) == len(found["golds"]) == 4 * 2
    assert {row["output"] for row in found["golds"]} <= {"1", "2", "3", "4", "5"}
    with pytest.raises(DataError, match="holds people's texts"):  # which a report to publish must not have beside it
        report([finished], tmp_path)


def test_development_people_are_not_test_people_and_have_their_own_folder(world, finished, cache):
    run_experiment(workspace_of(world, finished, which="development"), ["ablation"])
    test, development = ({r.person for r in read_records(f)} for f in (finished, finished / "development"))
    assert len(development) == 2
    assert not test & development
    assert Results.read(finished / "development").comparison("ablation") is not None


def test_mistakes_are_refused(world, cache, tmp_path):
    workspace = workspace_of(world, tmp_path / "one")
    with pytest.raises(InputError, match="no exhibit 'figure9'"):
        run_experiment(workspace, ["figure9"])
    workspace.splits.save(tmp_path / "one" / "splits.json")
    with pytest.raises(DataError, match="holds other splits"):
        run_experiment(workspace_of(world, tmp_path / "one", "people.test=3"), ["main"])
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["splits.json"]
    with pytest.raises(InputError, match="brings no data"):
        Workspace.open(load_experiment("lamp3"), tmp_path)
    with pytest.raises(DataError, match=r"holds no scores\.jsonl"):
        read_records(tmp_path / "one")


def test_an_experiment_without_people_to_test_trains_nothing(world, cache, tmp_path):
    workspace = workspace_of(world, tmp_path / "run", "queries=50", "few=4")
    for exhibits in (["main"], ["banks"]):
        with pytest.raises(InputError, match="people have 3 shots and 50 answered questions"):
            run_experiment(workspace, exhibits)
    assert not (tmp_path / "run").exists()

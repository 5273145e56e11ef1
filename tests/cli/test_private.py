"""With an ordinary umask, only the owner (or the sharing group) can read what the verbs write about people."""

from world import ANN, BOB, MEMBER, closed, modes, mta, ratings, written
from world import world as world  # the fixture


def test_only_the_owner_can_read_a_bank_and_a_store(world):
    mta("personalize", world.new, *world.at, "--keep-histories", "--run", world.root / "runs" / "one")
    closed(world.bank)
    closed(world.store)
    closed(world.root / "runs")


def test_only_the_owner_can_read_an_export(world):
    out = world.root / "exports" / "adapter"
    mta("export", ANN, *world.at, "--out", out)
    closed(out.parent)
    closed(world.store)
    mine = world.root / "mine"
    mine.mkdir()
    mta("export", BOB, *world.at, "--out", mine)
    found = modes(mine)
    assert found.pop("mine") == "0o755"
    assert set(found.values()) == {"0o600"}


def test_only_the_owner_can_read_an_evaluation_and_its_report(world):
    out = world.root / "evaluation"
    mta("compare", world.new, "--bank", world.bank, "--out", out / "new", "shots=2", "queries=1", "brief=true")
    closed(out)
    mta("report", out / "new", "--out", world.root / "report")
    closed(world.root / "report")


def test_only_the_owner_can_read_rejected_rows(world):
    source = written(world.root / "some.jsonl", [*ratings("new", "quispe", 2), "no row"])
    mta("data", "describe", source, "--task", "movielens-rating", "--skip-bad", world.root / "rejects" / "rows.jsonl")
    closed(world.root / "rejects")


def test_only_the_owner_can_read_keys(world):
    mta("serve", "--keys", world.root / "keys" / "keys.yaml", "--new-key", "ops")
    closed(world.root / "keys")


def test_forget_writes_no_file_that_others_can_read(world):
    at = world.copy(world.root / "copy")
    for path in (world.root / "copy").rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    (world.root / "copy").chmod(0o700)
    mta("forget", MEMBER, *at)
    closed(world.root / "copy")


def test_with_mta_shared_the_group_can_read_and_write(world, monkeypatch):
    monkeypatch.setenv("MTA_SHARED", "group")
    store = world.root / "shared"
    mta("personalize", world.new, "--bank", world.bank, "--store", store, "--keep-histories")
    mta("export", ANN, "--bank", world.bank, "--store", store, "--out", store.with_name("shared-export"))
    for root in (store, store.with_name("shared-export")):
        for name, mode in modes(root).items():
            assert mode == ("0o2770" if (root.parent / name).is_dir() else "0o660"), name
    assert "others can read" not in mta("store", "check", store).out


def test_check_names_a_store_that_others_can_read(world):
    store = world.root / "open"
    mta("personalize", world.new, "--bank", world.bank, "--store", store)
    assert "chmod" not in mta("store", "check", store).out
    for path in (store, *store.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    said = mta("store", "check", store)
    assert f"others can read this store: chmod -R go= {store}" in said.out
    assert mta("store", "check", store, "--json").json["exposed"] == f"chmod -R go= {store}"

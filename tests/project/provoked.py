"""What raises each error of mta: one real cause per class."""

import asyncio
import importlib
import shutil
from dataclasses import replace
from types import SimpleNamespace

from conftest import TINY_RUN, HashEncoder, people_of, personalizer
from served import stepped
from tiny import base_of, tokenizer
from transformers import MambaConfig, MambaForCausalLM

import mta
from mta.bank.bank import Bank
from mta.config import Run, override
from mta.model.base import BaseModel
from mta.personalize.adapters import TASK
from mta.personalize.forgetting import forget_person
from mta.serving.api.auth import LOCAL, Keys
from mta.serving.api.jobs import Jobs
from mta.serving.api.service import Service
from mta.serving.embedded.engine import EmbeddedEngine
from mta.serving.engine import EngineRequest, Version
from mta.serving.vllm.server import VllmServer, VllmSettings
from mta.store import Store
from mta.system.extras import require

ASTRAY = TINY_RUN.stack.model_copy(update={"training": TINY_RUN.stack.training.model_copy(update={"lr": 1e300})})


class World:
    """A tiny base and bank, a store with one person, and an engine where it is asked for."""

    def __init__(self, bank_folder, tmp_path):
        self.tmp, self.bank_folder = tmp_path, bank_folder
        self.base = base_of()
        self.bank = Bank.open(bank_folder, self.base)
        self.store = Store(tmp_path / "people")
        self.ann = people_of(1)[0]

    def personal(self, **changes):
        return personalizer(self.base, self.bank, self.store, **changes)

    def known(self):
        """Somebody with a state."""
        self.personal().personalize([self.ann])
        return self.ann.id

    def written(self, text):
        path = self.tmp / "people.jsonl"
        path.write_text(text, encoding="utf-8")
        return path

    def asked(self, *asks, close=False, forget="", **how):
        """Answers of an embedded engine, asked for together.

        With ``close`` the engine has stopped before; the person ``forget`` is forgotten while the engine answers.
        """

        async def go():
            base = self.base.twin()
            base.model.generation_config.eos_token_id = base.prompts.end_token = 259  # hardly ever said
            engine = EmbeddedEngine(base, self.bank, self.store, **{"slots": 1, "length": 64} | how)
            answers = [engine.answer(ask) for ask in asks]
            try:
                if close:
                    await engine.close()
                with stepped(engine.scheduler) as steps:
                    steps.release(20)
                    for answer in answers:
                        await anext(answer)
                    forgetting = asyncio.create_task(engine.forget(forget))
                    await asyncio.sleep(0)
                await forgetting
                for answer in answers:
                    async for _ in answer:
                        pass
            finally:
                for answer in answers:
                    await answer.aclose()
                await engine.close()

        asyncio.run(go())

    def who(self, model, strict=None):
        """Whom the gateway takes a model for."""
        jobs = Jobs(self.personal())
        engine = SimpleNamespace(most=1)
        service = Service(engine, self.base, self.store, self.bank.task, Keys(), jobs, strict_bank=strict)
        try:
            asyncio.run(service.resolve_model(model, LOCAL))
        finally:
            asyncio.run(jobs.close())

    def vllm(self):
        server = VllmServer(VllmSettings("false", "base", "bank", "people", 64))
        try:
            server.start()
        finally:
            server.stop()


def overtaken(world):
    """Another writer comes in between the look for the newest version and the write."""
    id = world.known()
    state = world.store.load(id)
    late, other = Store(world.tmp / "people"), world.personal(seed=5)
    create = late.files.create

    def second(name, data):
        other.personalize([world.ann])
        create(name, data)

    late.files.create = second
    late.save(id, replace(state, work="another"))


def forgotten(world):
    """A state is saved that was made of items from before its person was forgotten."""
    id = world.known()
    state, known = world.store.load(id), world.store.tombstones.of(id)
    forget_person(id, world.store)
    world.store.save(id, state, known)


def changed(world, pattern):
    """A bit of a file is turned."""
    path = next((world.tmp / "people").rglob(pattern))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def damaged_state(world):
    id = world.known()
    changed(world, "1.safetensors")
    world.store.load(id)


def damaged_bank(world):
    folder = shutil.copytree(world.bank_folder, world.tmp / "damaged")
    (folder / "index.safetensors").write_bytes(b"torn")
    Bank.open(folder, world.base)


def damaged_store(world):
    world.known()
    (world.tmp / "people" / "store.json").write_text("{}")
    Store(world.tmp / "people").check()


def another_banks(world):
    id = world.known()
    out = world.tmp / "other"
    people = people_of(4, prefix="t"), people_of(12, prefix="c", seed=3)
    run = TINY_RUN.model_copy(update={"seed": 9})
    Bank.build(world.base, people[1], out, task=run.task, run=run, task_people=people[0], encoder=HashEncoder())
    personalizer(world.base, Bank.open(out, world.base), world.store).generate([(id, world.ann.items[0].fields)])


def recurrent(_):
    model = MambaForCausalLM(MambaConfig(vocab_size=260, hidden_size=8, state_size=4, num_hidden_layers=1))
    BaseModel(model, tokenizer(), "tiny")


def built_over(world, out=None):
    Bank.build(
        world.base, people_of(12, prefix="c"), out or world.bank_folder, task="movielens-rating", encoder=HashEncoder(),
        run=TINY_RUN.model_copy(update={"seed": 9}), task_people=people_of(4, prefix="t"),
    )  # fmt: skip


def built_beside(world):
    (world.tmp / "mine").mkdir()
    (world.tmp / "mine" / "notes.txt").write_text("mine")
    built_over(world, world.tmp / "mine")


BAD = '{"person": "ann", "title": "Heat", "genres": "Crime", "rating": "9"}\n'
LONG = EngineRequest(tuple(range(10, 80)), TASK, max_tokens=8)
SHORT = EngineRequest((40, 50, 60), TASK, max_tokens=8)
ODD = EngineRequest((40, 50, 60), TASK, max_tokens=8, top_logprobs=10**6)

# class: what provokes it; what happened, what was found, what was expected; what to type next
PROVOKED = {
    "InputError": (
        lambda w: mta.read_people(w.written(BAD), "movielens-rating", skip_bad="."),
        ("bad rows cannot be written", "it is a folder", "expected the name of a file"),
        r"for example rejects\.jsonl",
    ),
    "DataError": (
        lambda w: mta.read_people(w.written(BAD), "movielens-rating"),
        (r"people\.jsonl:1: field 'rating'", "unknown label '9'", "expected one of: 1, 2, 3, 4, 5"),
        r"--skip-bad FILE",
    ),
    "TaskError": (
        lambda w: mta.load_task("lampe3"),
        ("unknown task", "'lampe3'", "built-in tasks: lamp1, "),
        r"Did you mean 'lamp3'\?",
    ),
    "ConfigError": (
        lambda w: override(Run(), ["bank.anchors=0"]),
        (r"the command line: bank\.anchors", r"\(got 0\)", "greater than or equal to 1"),
        r"bank\.anchors=50",
    ),
    "PersonNotFound": (
        lambda w: w.personal().generate([("eve", w.ann.items[0].fields)]),
        ("no state of 'eve'", "'eve'", "in the store .*/people"),
        "mta personalize",
    ),
    "AnchorNotFound": (
        lambda w: w.personal(merge=TINY_RUN.merge.model_copy(update={"k": 9})).personalize([w.ann]),
        (r"merge\.k is 9", "9", "the bank has 3 anchors"),
        r"Lower merge\.k, or use 0 for all",
    ),
    "ModelError": (
        lambda w: BaseModel.load("smollm2-135m-instruct", dtype="float8"),
        ("dtype 'float8' cannot be used", "'float8'", "expected auto, "),
        "dtype=auto",
    ),
    "UnsupportedModel": (
        recurrent,
        ("carries a recurrent state", "'mamba'", "shared prefixes need attention"),
        "Llama, Mistral, Qwen",
    ),
    "MemoryBudgetError": (
        lambda w: w.personal(memory="1KiB").personalize([w.ann]),
        ("one person needs about", r"\d MiB", r"the budget is 0\.0 MiB"),
        "memory=…",
    ),
    "Diverged": (
        lambda w: w.personal(stack=ASTRAY).personalize(people_of(2)),
        ("losses on shots are invalid", "nan|inf", "expected finite numbers"),
        r"Lower stack\.training\.lr",
    ),
    "MissingExtra": (
        lambda w: require("eval", "no-such-package"),
        ("no-such-package is not installed", "no-such-package", "belongs to the extra 'eval'"),
        "pip install bm25s matplotlib rouge-score",
    ),
    "AssetError": (
        lambda w: BaseModel.load("./no"),
        ("no such file or folder", r"\./no", "expected an existing path, a hub id .* or one of the assets"),
        r"ls \.",
    ),
    "HubError": (
        lambda w: w.bank.push_to_hub("no name"),
        ("is not a repository name", "'no name'", "."),
        "Write it as owner/name",
    ),
    "ClusterError": (
        lambda w: importlib.import_module("mta.distributed.ray").Cluster("127.0.0.1:1"),
        ("no Ray cluster at", r"'127\.0\.0\.1:1'", "refused"),
        r"local, host:6379 or ray://host:10001",
    ),
    "BankError": (
        built_beside,
        ("holds notes", r"notes\.txt", "does not belong to a bank"),
        "--out",
    ),
    "BankRefused": (
        built_over,
        ("holds a bank built from", r"bank\d*", "other people, another base, or other settings"),
        "--out",
    ),
    "BankMismatch": (
        lambda w: Bank.open(w.bank_folder, base_of("gpt2")),
        ("was built for base 'tiny-llama'", r"the loaded base is 'tiny-gpt2'", r"sha256 \w{8}"),
        r"mta bank build --base tiny-gpt2",
    ),
    "BankNotFound": (
        lambda w: Bank.open(w.tmp, w.base),
        ("no bank at", r"no bank at /", r"bank\.json is missing"),
        "mta bank build --help",
    ),
    "BankCorrupt": (
        damaged_bank,
        ("was changed or cut short", r"its sha256 is \w{12}…", r"bank\.json says \w{12}…"),
        "Copy the bank again from its source",
    ),
    "StoreError": (
        damaged_store,
        ("is damaged or missing", r"store\.json", "expected schema 1 and a 64-digit key"),
        "Restore the file from a backup",
    ),
    "StateCorrupt": (
        damaged_state,
        ("was changed or cut short", r"its sha256 is \w{12}…", r"expected b'\w{12}'…"),
        "mta personalize",
    ),
    "OtherBank": (
        another_banks,
        ("was made with bank", r"made with bank \w{8}…", r"this bank is \w{8}…"),
        "mta personalize",
    ),
    "PersonForgotten": (
        forgotten,
        ("the person was forgotten meanwhile", "nothing made from their earlier items", "is saved"),
        "To add the person again, personalize from items",
    ),
    "StoreConflict": (
        overtaken,
        ("was created by another writer meanwhile", "version 2 of 'p0'", "this state was not saved"),
        "Save again: it becomes version 3",
    ),
    "Refused": (
        lambda w: w.asked(LONG),
        ("the prompt has 70 tokens", "max_tokens is 8", "together more than 64"),
        r"lower max_tokens",
    ),
    "QueueFull": (
        lambda w: w.asked(SHORT, SHORT, waiting=0),
        ("requests are running or waiting already", "1 requests", "already"),
        "Retry a little later",
    ),
    "AnswerLost": (
        lambda w: w.asked(ODD),
        ("this answer could not be computed", "this answer", "computed"),
        "Ask again",
    ),
    "ModelRemoved": (
        lambda w: w.asked(EngineRequest((40, 50, 60), Version(w.known(), 1), max_tokens=50), forget="p0"),
        ("the person was forgotten", "person", "forgotten"),
        "Ask the pooled model",
    ),
    "EngineGone": (
        lambda w: w.asked(SHORT, close=True),
        ("the engine has stopped", "engine", "stopped"),
        "GET /readyz",
    ),
    "UnknownOrForbidden": (
        lambda w: w.who("person:eve"),
        ("does not exist, or this key may not use it", "'person:eve'", "may not use it"),
        "GET /v1/models",
    ),
    "NeedsRebuild": (
        lambda w: w.who("task", strict=(w.tmp, "")),
        ("the bank must be rebuilt", "a forgotten person", "without"),
        "Ask the base",
    ),
    "VllmNotStarted": (
        lambda w: w.vllm(),
        ("vLLM did not start", r"exit status 1", "the log is empty"),
        r"false -m vllm\.entrypoints",
    ),
}  # fmt: skip

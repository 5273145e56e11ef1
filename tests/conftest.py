"""Fixtures shared by all tests: tiny people, a tiny bank, and real assets where they can be had."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if any(os.environ.get(name) for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")):
    for name in ("no_proxy", "NO_PROXY"):  # a proxy does not reach the servers of tests
        os.environ[name] = f"{os.environ.get(name, '')},127.0.0.1,localhost".lstrip(",")

from contextlib import contextmanager, suppress

import fsspec
import hypothesis
import pytest
import torch

from mta.config import Lora, MergeSettings, Run, Training
from mta.data.history import Item, Person
from mta.data.tasks import load_task
from mta.kernels.compile import failure, obstacle

_HOW = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("mta", **_HOW, derandomize=True, max_examples=40)
hypothesis.settings.register_profile("explore", **_HOW)  # new cases in each run, and more
hypothesis.settings.load_profile("mta")
os.fsync = lambda _: None  # no machine loses power during tests; those of the order of writes patch it themselves
os.umask(0o022)  # so that a file with a mode of its own differs from any other
torch.set_num_threads(1)  # tiny matrices: threads only wait for each other


def pytest_addoption(parser):
    """``--device cuda`` walks the whole way on a GPU (tests/project/test_on_device.py)."""
    parser.addoption("--device", default="cpu", help="device of tests/project/test_on_device.py: cpu, cuda, auto")


def pytest_configure(config):
    """Hide GPUs from all other tests, and from the processes that these start: tiny models are for the CPU."""
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


class HashEncoder:
    """Texts to fixed pseudo-random vectors: an encoder that needs no weights."""

    name = "hash"
    fingerprint = "hash-1"

    def encode(self, texts):
        rows = []
        for text in texts:
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
            rows.append(torch.randn(8, generator=torch.Generator().manual_seed(seed)))
        return torch.stack(rows)


def people_of(count: int, items: int = 6, prefix: str = "p", seed: int = 0) -> list[Person]:
    """People who rate made-up movies, each with a taste of their own."""
    made = []
    for n in range(count):
        g = torch.Generator().manual_seed(seed * 1000 + n)
        draws = torch.randint(0, 1000, (items,), generator=g).tolist()
        rows = [
            Item(
                {"title": f"Film {d}", "genres": "Drama" if d % 2 else "Comedy", "rating": str(1 + (d + n) % 5)},
                time=float(t),
            )
            for t, d in enumerate(draws)
        ]
        made.append(Person.of(f"{prefix}{n}", rows))
    return made


def memory_for(base, jobs, numbers: int, people: int, **how) -> str:
    """The smallest budget, within a KiB, in which that many people are trained together. Keywords: as in plan_cohorts.

    In it fewer people are trained together than in any larger one, so it is found by halving.
    """
    from mta.errors import MemoryBudgetError
    from mta.training.plan import plan_cohorts

    def together(memory: int) -> int:
        with suppress(MemoryBudgetError):
            return len(plan_cohorts(base, jobs, numbers, memory, **how).cohorts[0])
        return 0

    low, high = 0, 2**30
    while high - low > 2**10:
        middle = (low + high) // 2
        low, high = (low, middle) if together(middle) >= people else (middle, high)
    assert together(high) == people
    return f"{high}B"


TINY_RUN = Run(
    base="tiny-llama",
    task="movielens-rating",
    encoder="hash",
    dtype="float64",
    memory="64MiB",
    max_tokens=512,
    task_lora={"lora": Lora(rank=2), "training": Training(lr=5e-3, epochs=1, batch_size=4), "items": 16},
    bank={
        "anchors": 3,
        "min_items": 3,
        "max_items": 4,
        "lora": Lora(rank=2),
        "training": Training(lr=5e-3, epochs=2, batch_size=2),
    },
    calibration={"enabled": True, "people": 8, "shots": 2, "queries": 1, "steps": 1},
    merge={"policy": "posterior", "k": 0},
    stack={"lora": Lora(rank=1, alpha=4.0), "training": Training(lr=1e-2, steps=2, batch_size=8)},
)


@pytest.fixture
def anyio_backend() -> str:
    """What tests that are coroutines (``pytest.mark.anyio``) run in."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def _kernels():
    """Load the kernels from the user's cache: tests with their own cache would compile them again."""
    if not obstacle():
        failure()


@pytest.fixture(scope="session")
def task():
    return load_task("movielens-rating")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("MTA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def bucket():
    """A bucket's URL on an S3 server that speaks HTTP: moto's, for Amazon's own cannot be had in tests."""
    import logging
    import threading

    import boto3
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    one, put = threading.Lock(), S3Response.put_object

    def put_object(response):
        """Write one object at a time: a conditional write is atomic at Amazon, but not in moto."""
        with one:
            return put(response)

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    own = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    own |= {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        patch.setattr(S3Response, "put_object", put_object)
        boto3.client("s3").create_bucket(Bucket="mta")
        yield "s3://mta"
    server.stop()


@pytest.fixture(params=["folder", "file", "memory", pytest.param("s3", marks=pytest.mark.integration)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where a new store may be created: in a folder, in memory, or in a bucket."""
    if request.param == "s3":
        yield f"{request.getfixturevalue('bucket')}/{tmp_path.name}/people"
    elif request.param == "memory":
        yield f"memory://{tmp_path.name}/people"
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)
    else:
        yield f"file://{tmp_path}/people" if request.param == "file" else str(tmp_path / "people")


@pytest.fixture(scope="session")
def fetched():
    """The folder of a real asset by its name; the test is skipped where it cannot be had."""
    from mta.errors import AssetError
    from mta.system.assets import fetch

    def folder(name):
        try:
            return fetch(name)
        except AssetError as error:
            if error.message.startswith("cannot fetch"):
                pytest.skip(error.message)
            raise

    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A finished bank of the people in ``builds``, which no test changes."""
    from builds import build

    return build(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="session")
def tiny_bank_folder(tmp_path_factory):
    """A bank of three anchors over the tiny Llama, built once."""
    from builds import build  # which imports this module

    return build(tmp_path_factory.mktemp("bank"), people_of(4, prefix="t"), people_of(12, prefix="c"))


def opened(folder):
    from tiny import base_of

    from mta.bank.bank import Bank

    base = base_of()
    return base, Bank.open(folder, base)


@pytest.fixture
def tiny(tiny_bank_folder, cache):
    """Base and bank, ready to personalize."""
    return opened(tiny_bank_folder)


@pytest.fixture
def own_bank(tiny, tmp_path):
    """The same with a copy of the bank, which a test may mark as needing a rebuild."""
    base, bank = tiny
    return base, type(bank).open(shutil.copytree(bank.folder, tmp_path / "bank"), base)


def trust(folder):
    """Give a tiny bank a calibration by which people get coefficients of their own; few people cannot find one."""
    from arrays import normal

    from mta.bank.calibration.info import CalibrationInfo
    from mta.bank.calibration.laplace import Calibration, curvature_of
    from mta.bank.format import CALIBRATION, file_hashes, read_info, with_hash, write_info
    from mta.system.atomic import write_tensors

    info, gain = read_info(folder), {"shots": 8, "people": 8, "mean": 0.1, "low": 0.0, "high": 0.2, "worse": 0.0}
    found = CalibrationInfo(ridge=0.3, prior=4.0, rate=1e-3, people=8, gains=(gain,))
    made = Calibration(0.2 * normal(3), curvature_of(normal(30, 3, seed=6)), found)
    write_tensors(folder / CALIBRATION, made.tensors(), {})
    changed = {"calibration": found, "files": info.files | file_hashes(folder, [CALIBRATION])}
    write_info(folder, with_hash(info.model_copy(update=changed)))


@pytest.fixture(scope="session")
def trusting_bank_folder(tmp_path_factory, tiny_bank_folder):
    """The tiny bank with a calibration that trusts people's gradients."""
    folder = shutil.copytree(tiny_bank_folder, tmp_path_factory.mktemp("trusting") / "bank")
    trust(folder)
    return folder


@pytest.fixture
def trusting(trusting_bank_folder, cache):
    """Base and bank, ready to personalize by gradients."""
    return opened(trusting_bank_folder)


@pytest.fixture(params=["posterior", "laplace"])
def by_policy(request, tiny, trusting):
    """Base, bank, and the settings of a merge: by likelihoods, and by gradients."""
    return (*(trusting if request.param == "laplace" else tiny), MergeSettings(policy=request.param, k=0))


def personalizer(base, bank, store=None, **changes):
    """A Personalizer over the tiny bank."""
    from mta.personalize import Personalizer

    run = TINY_RUN.model_copy(update=changes)
    return Personalizer(base, bank, store, run=run, encoder=HashEncoder())


@pytest.fixture
def known(tiny, tmp_path):
    """A Personalizer that knows all people of ``crowd``."""
    from crowd import knowing  # which imports this module

    return knowing(*tiny, tmp_path / "people")


@contextmanager
def stopped_when(due):
    """Yield an ``on_step`` that stops what runs in the block, as Ctrl+C does, at the first step that is ``due``."""

    def stop(stage, step):
        if due(stage, step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        yield stop

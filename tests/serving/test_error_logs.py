"""What goes wrong is logged by its type and place: messages of errors may hold a person's words or id."""

import asyncio
from types import SimpleNamespace

import pytest

from mta.errors import BankCorrupt, MtaError, StoreError
from mta.personalize.adapters import TASK
from mta.serving.api.errors import error_of
from mta.serving.api.limits import Guard
from mta.serving.api.service import Service
from mta.serving.embedded.scheduler import Scheduler
from mta.serving.engine import AnswerLost
from mta.serving.vllm.engine import VllmEngine

SECRET = "Xylograd wrote to person:ann"


def check(log):
    """The log names the error's type, and nothing of its message."""
    assert "Error" in log.text
    assert "Xylograd" not in log.text
    assert "person:" not in log.text


def raised():
    """An error as it is caught."""
    try:
        raise RuntimeError(SECRET)
    except RuntimeError as error:
        return error


def test_of_a_decoding_step(caplog):
    scheduler = SimpleNamespace(failed=0, lost=0, _failures_in_a_row=0, _failure_counts=True)
    Scheduler.fail(scheduler, [], raised())
    assert scheduler.failed == 1
    check(caplog)


def test_of_an_answer_of_vllm(caplog):
    def held(who):
        raise raised()

    engine, queue = SimpleNamespace(has_task_lora=True, adapters=SimpleNamespace(held=held)), asyncio.Queue()
    asyncio.run(VllmEngine._forward(engine, SimpleNamespace(who=TASK), queue))
    lost = queue.get_nowait()
    assert isinstance(lost, AnswerLost)
    assert "Xylograd" not in str(lost)
    check(caplog)


@pytest.mark.parametrize("kind", [MtaError, StoreError, BankCorrupt])
def test_of_a_request(kind):
    status, body, _ = error_of(kind(SECRET, hint=""))
    assert status >= 500
    assert "Xylograd" not in str(body)


def test_of_an_endpoint(caplog):
    sent = []

    async def app(scope, receive, send):
        raise raised()

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    asyncio.run(Guard(app, 99)({"type": "http", "headers": []}, receive, send))
    assert sent[0]["status"] == 500
    assert "Xylograd" not in str(sent)
    check(caplog)


def test_of_the_sweep_for_people_forgotten_elsewhere(caplog):
    class Failing:
        sweep = 0.0
        count = 0

        async def drop_forgotten_elsewhere(self):
            self.count += 1
            if self.count > 1:
                raise asyncio.CancelledError
            raise raised()

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(Service.keep_sweeping(Failing()))
    check(caplog)

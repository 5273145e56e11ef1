"""Hundreds of careless or hostile requests, generated from the gateway's OpenAPI description."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from served import served
from tiny import base_of

from mta.bank.bank import Bank
from mta.serving.api.limits import Limits


@pytest.fixture(scope="module")
def world(tiny_bank_folder, tmp_path_factory):
    base = base_of()
    bank = Bank.open(tiny_bank_folder, base)
    with served(base, bank, tmp_path_factory.mktemp("odd"), limits=Limits(max_tokens=4)) as here:
        yield here


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("each", [5, pytest.param(70, marks=pytest.mark.slow)])
def test_no_generated_request_gets_a_server_error(world, mode, each):
    schemathesis = pytest.importorskip("schemathesis")  # a second to import
    schema = schemathesis.openapi.from_url(f"{world.url}/openapi.json")
    headers = {"Authorization": f"Bearer {world.secrets['admin']}"}
    how = {"deadline": None, "database": None, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}
    asked = []
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(max_examples=each, **how)
        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
        def ask(case):
            answer = case.call(headers=headers, timeout=60)
            asked.append(case.operation.label)
            assert answer.status_code < 500, (case.as_curl_command(), answer.text)

        try:
            ask()
        except Unsatisfiable:  # a route that takes nothing cannot be asked wrongly
            assert operation.method == "get"
    assert len(set(asked)) >= 5
    assert len(asked) >= 6 * each
    assert world.service.engine.ready

"""Requests of all kinds that the API's own description allows, and others: the server never fails.

`SPARSE_DIT_FUZZ=2000 pytest tests/serve/test_fuzz.py` sends so many.
"""

import os

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error

from sparse_dit.serve.app import create_app
from sparse_dit.serve.claims import Claims, Worker
from sparse_dit.serve.options import Limits
from sparse_dit.serve.plans import Plans, Served
from tests.helpers.plan_cases import small
from tests.helpers.serve_cases import MODEL, stub_card, stub_service, working

CASES = int(os.environ.get("SPARSE_DIT_FUZZ", "100"))
ROUTES = 19


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    """The description of a server that works."""
    card = stub_card(plans=Plans([Served("fast", small(), None)]), image="may")
    limits = Limits(pixels=64 * 64, frames=16, steps=20, rate="100000/second")
    service = stub_service(tmp_path_factory.mktemp("fuzz"), card, limits=limits)
    # no process gives signs of life, so /health would say after a while that it fails
    Claims(service.store).register(Worker("worker", MODEL, "cpu", ()), os.getpid(), "starting")
    with working(service):
        yield schemathesis.openapi.from_asgi("/openapi.json", create_app(service))
    service.store.close()


def test_no_request_makes_the_server_fail(schema):
    sent = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        each = -(-CASES // ROUTES)

        @hypothesis.settings(
            max_examples=each,
            deadline=None,
            database=None,
            derandomize=CASES == 100,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def ask(case):
            response = case.call()
            codes = sent.setdefault(case.operation.label, [])
            codes.append(response.status_code)
            case.validate_response(response, checks=[not_a_server_error])

        ask()
    assert len(sent) == ROUTES, sorted(sent)
    every = [code for codes in sent.values() for code in codes]
    print(f"{len(every)} requests: { {code: every.count(code) for code in sorted(set(every))} }")
    assert len(every) >= 0.5 * CASES and 200 in every and 400 in every

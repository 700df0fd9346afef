"""Requests of all kinds that the API's own description allows, and others: the server never fails.

`SPARSE_DIT_FUZZ=2000 pytest tests/serve/test_fuzz.py` sends so many to each server.
"""

import os

import hypothesis
import pytest
import schemathesis
from hypothesis.strategies import one_of
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from sparse_dit.serve.app import create_app
from sparse_dit.serve.options import Limits
from sparse_dit.serve.plans import Plans, Served
from tests.helpers.plan_cases import small
from tests.helpers.serve_cases import stub_card, stub_service, working
from tests.helpers.text_site import save_writer, text_service

CASES = int(os.environ.get("SPARSE_DIT_FUZZ", "100"))
RATE = "100000/second"
MOST = {"num_inference_steps": 4, "num_frames": 16, "max_tokens": 32, "block_length": 16}
PATIENCE = 600  # seconds, for what waits for its job on a busy machine


def pictures(folder):
    """A server of videos without a model."""
    card = stub_card(plans=Plans([Served("fast", small(), None)]), image="may")
    limits = Limits(pixels=64 * 64, frames=16, steps=20, rate=RATE)
    return stub_service(folder, card, limits=limits), None


def texts(folder):
    """A server of a tiny random diffusion language model, and what writes."""
    service, load = text_service(
        folder, save_writer(folder), limits=Limits(prompt=200, steps=16, rate=RATE)
    )
    return service, load("cpu")


def feasible(body):
    """A request with nothing that isn't there, and as little as both servers can do."""
    kept = {name: value for name, value in body.items() if name not in ("model", "plan", "size")}
    if not str(kept.get("prompt", "")).strip():
        kept["prompt"] = "a"
    if not kept.get("stream"):
        kept.pop("stream_options", None)
    for name, most in MOST.items():
        if type(kept.get(name)) is int:
            kept[name] = 1 + kept[name] % most
    return kept


def ask(operation, count, ids):
    """The codes of answers to so many requests, some against the description; of those by it every other one
    is of a job that is there, or that can be."""
    codes = []

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=CASES == 100,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=one_of(*map(operation.as_strategy, GenerationMode)))
    def one(case):
        if len(codes) % 2:
            if "id" in (case.path_parameters or {}) and ids:
                case.path_parameters["id"] = ids[len(codes) % 8 % len(ids)]
            if isinstance(case.body, dict):
                case.body = feasible(case.body)
        response = case.call(timeout=PATIENCE)
        codes.append(response.status_code)
        case.validate_response(response, checks=[not_a_server_error])

    one()
    return codes


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize(("made", "routes"), [(pictures, 19), (texts, 8)])
def test_no_request_makes_the_server_fail(made, routes, tmp_path):
    service, engine = made(tmp_path)
    sent = {}
    with working(service, engine, alive=True):
        schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service))
        for result in schema.get_all_operations():
            operation, ids = result.ok(), sorted(service.store.known())
            sent[operation.label] = ask(operation, -(-CASES // routes), ids)
    service.store.close()
    assert len(sent) == routes, sorted(sent)
    every = [code for codes in sent.values() for code in codes]
    print({label: {c: codes.count(c) for c in set(codes)} for label, codes in sent.items()})
    print(f"{len(every)} requests: { {code: every.count(code) for code in sorted(set(every))} }")
    assert len(every) >= 0.5 * CASES and 200 in every and 400 in every

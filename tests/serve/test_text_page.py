"""The page of a server that writes, in a real browser: the text appears, and can be stopped."""

from types import SimpleNamespace

import pytest

from tests.helpers.serve_cases import working
from tests.helpers.text_site import listening, save_writer, text_service
from tests.serve.test_browser import CHROMIUM, browser, expect, window

__all__ = ["browser"]  # the fixture
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
    pytest.mark.filterwarnings("ignore"),
]


def test_a_text_appears_and_is_stopped(browser, tmp_path):
    service, load = text_service(tmp_path, save_writer(tmp_path))
    engine = load("cpu")
    with (
        listening(service) as url,
        window(browser, SimpleNamespace(url=url), allowed="400") as page,
    ):
        page.goto(url)
        page.get_by_label("Prompt").fill("Anna lives in the mill.")
        page.get_by_label("Seed").fill("5")
        page.get_by_role("button", name="Write").click()
        expect(page.locator("#state")).to_have_text("Waiting")
        with working(service, engine):
            expect(page.locator("#facts")).to_be_visible()
            (job,), _ = service.store.list("text", after=None, limit=1, order="desc")
            assert page.locator("#canvas").text_content() == job.result["text"]
            page.get_by_label("Tokens").fill("400")
            page.get_by_role("button", name="Write").click()
            expect(page.locator("#canvas .wait").first).to_be_visible()
            page.get_by_role("button", name="Stop").click()
            expect(page.locator("#state")).to_have_text("Stopped")
        page.get_by_label("Tokens").fill("500")
        page.get_by_role("button", name="Write").click()
        expect(page.locator("#wrong")).to_contain_text("must fit into the model's 512 tokens")
    newest = service.store.list("text", after=None, limit=1, order="desc")[0][0]
    assert newest.status == "cancelled" or newest.cancel
    service.store.close()

"""The page in a real browser, Chromium: what people do with it, and what happens meanwhile."""

import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from tests.helpers.page_cases import Site

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")
expect = sync_api.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
ARGUMENTS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
PATIENCE = 60_000  # milliseconds
HELD = 4  # the step of twelve at which a job is met while it runs
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser():
    """One browser for all tests; each opens windows of its own in it."""
    expect.set_options(timeout=PATIENCE)
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield started
        started.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The server of all tests but one."""
    made = Site(tmp_path_factory.mktemp("site"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def finished(site, browser):
    """The address of a finished job that was compared, submitted on the page."""
    with window(browser, site) as page:
        page.goto(site.url)
        submit(page, "a red square moves right")
        expect(page.locator("#split")).to_be_visible()
        return page.url


@contextmanager
def window(browser, site, *, allowed=None, **options):
    """A page of its own; at the end nothing may be on the console, and no other host have been asked.

    Args:
        browser, site: See there.
        allowed: What may be in the lines of the console.
        options: Of the browser's context.
    """
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE)
    seen = SimpleNamespace(said=[], hosts=set())
    page = context.new_page()
    page.on("console", lambda message: seen.said.append(message.text))
    page.on("pageerror", lambda error: seen.said.append(str(error)))
    page.on("request", lambda request: seen.hosts.add(request.url.split("/")[2]))
    try:
        yield page
    finally:
        context.close()
    said = [one for one in seen.said if not (allowed and allowed in one)]
    assert not said
    assert seen.hosts <= {site.url.removeprefix("http://")}


def submit(page, prompt):
    """Type a prompt and press the button; the page of the job comes."""
    before = page.url
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Generate").click()
    page.wait_for_url(lambda url: "/jobs/" in url and url != before)


def job_of(site, page):
    """The job that a page shows."""
    return site.service.store.get(page.url.rpartition("/")[2])


def scrolls_sideways(page):
    """Whether the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth > window.innerWidth")


@pytest.fixture
def held(site):
    """Jobs that wait in the middle, until they are let go on."""
    site.wait_until_idle()
    site.held_at = HELD
    yield site
    site.held_at = None


def test_a_job_from_the_form_to_the_result(held, browser):
    with window(browser, held) as page:
        page.goto(held.url)
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        submit(page, "a blue square <b>moves</b>")
        expect(page.get_by_role("heading", level=1)).to_have_text("a blue square <b>moves</b>")
        expect(page.locator("#previews img").first).to_be_visible()
        expect(page.locator("#left")).to_contain_text("left")
        expect(page.locator("#state")).to_have_text("Running, sparse")
        expect(page.locator("#said")).to_contain_text("Running, sparse, 3 of 12 steps")
        held.held_at = 2 * HELD
        expect(page.locator("#state")).to_have_text("Running, dense")
        expect(page.get_by_role("img", name="Latents, dense, step 1")).to_be_visible()
        held.held_at = None
        expect(page.locator("#split")).to_be_visible()
        expect(page.locator(".facts")).to_contain_text("35.6 dB")
        expect(page.locator("#history")).to_contain_text("35.6 dB")
        expect(page.get_by_role("button", name="Pause")).to_be_visible()  # the videos run
        assert page.evaluate("document.querySelector('video.dense').readyState") >= 2
        page.get_by_text("What ran dense, and why").click()
        expect(page.get_by_text("4: a stage that is dense")).to_be_visible()
        page.get_by_text("The atlas of heads").click()
        expect(page.locator("#atlas-heads img")).to_have_count(4)
        with page.expect_download() as download:
            page.get_by_role("link", name="side by side").click()
        assert download.value.suggested_filename.endswith("side_by_side.mp4")
        assert page.get_by_label("Link to this job").input_value() == page.url


def test_a_line_between_two_videos_is_moved_by_keys_and_by_dragging(site, finished, browser):
    with window(browser, site, reduced_motion="reduce") as page:
        page.goto(finished)
        split = page.get_by_role("slider", name="Where dense ends and sparse begins")
        split.focus()
        for key, value in (("ArrowRight", 51), ("End", 100), ("ArrowLeft", 99), ("Home", 0)):
            page.keyboard.press(key)
            expect(split).to_have_value(str(value))
            clip = page.evaluate("getComputedStyle(document.querySelector('.dense')).clipPath")
            assert clip == f"inset(0px {100 - value}% 0px 0px)"
        expect(split).to_have_attribute("aria-valuetext", "0 % dense, 100 % sparse")
        box = split.bounding_box()
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + 2, middle)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.75, middle, steps=3)
        page.mouse.up()
        assert abs(int(split.input_value()) - 75) <= 1
        assert page.evaluate("document.querySelector('video.sparse').paused"), "motion is unwanted"
        page.get_by_role("button", name="Play").click()
        expect(page.get_by_role("button", name="Pause")).to_be_visible()


def test_the_dial_tells_what_to_expect_and_is_what_is_asked_for(site, finished, browser):
    with window(browser, site) as page:
        page.goto(site.url)
        dial = page.get_by_role("slider", name="How fast")
        expect(page.locator("#expected")).to_contain_text("35.5 dB")
        dial.focus()
        page.keyboard.press("ArrowRight")
        expect(page.locator("#expected")).to_contain_text("28.0 dB")
        expect(page.locator("#expected")).to_contain_text("4.00 s")
        assert "PSNR 28.0 dB" in dial.get_attribute("aria-valuetext")
        expect(page.locator("#dial-for")).to_contain_text("where the plan was made")
        page.get_by_label("Size").select_option("64x96")
        expect(page.locator("#dial-for")).to_contain_text("another size: there it isn't known")
        page.get_by_label("Compare with dense").uncheck()
        submit(page, "the fastest")
        spec = job_of(site, page).spec
        assert (spec.plan, spec.speedup, spec.compare) == ("front", 2.5, False)
        assert (spec.width, spec.height) == (64, 96)
        expect(page.locator(".facts")).to_contain_text("30.0 %")  # of which it computed
        page.get_by_label("Attention", exact=True).select_option("dense")
        expect(page.locator("#dial")).to_be_hidden()
        submit(page, "all of it")
        assert job_of(site, page).spec.plan == "dense"
        expect(page.locator("video")).to_have_count(1)


def test_a_notice_that_the_model_is_loaded_goes_when_it_is(site, browser):
    site.state = "loading"
    site.beat()
    with window(browser, site) as page:
        page.goto(site.url)
        notice = page.get_by_text("The model is being loaded")
        expect(notice).to_be_visible()
        site.state = "idle"
        expect(notice).to_have_count(0)


def test_a_refusal_is_told_at_the_field(site, browser):
    with window(browser, site, allowed="status of 400") as page:
        page.goto(site.url)
        prompt = page.get_by_label("Prompt", exact=True)
        prompt.fill("   ")
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#wrong")).to_contain_text("prompt: must be text that is not empty")
        expect(prompt).to_be_focused()
        expect(prompt).to_have_attribute("aria-invalid", "true")
        submit(page, "better")


def test_a_job_is_cancelled_within_a_step(held, browser):
    with window(browser, held) as page:
        page.goto(held.url)
        submit(page, "not this one")
        expect(page.locator("#state")).to_contain_text("Running")
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#job")).to_contain_text("Cancelled.")
        assert job_of(held, page).status == "cancelled"
        expect(page.locator("#history")).to_contain_text("cancelled")


def test_a_reload_in_the_middle_goes_on_with_the_same_job(held, browser):
    with window(browser, held) as page:
        page.goto(held.url)
        submit(page, "a long one")
        expect(page.locator("#previews img").first).to_be_visible()
        address = page.url
        page.reload()
        assert page.url == address
        expect(page.locator("#step")).to_have_text(str(HELD - 1))
        expect(page.locator("#previews img")).to_have_count(2)
        held.held_at = None
        expect(page.locator("#split")).to_be_visible()
        job = job_of(held, page)
        assert job.status == "completed" and job.attempt == 1


def test_a_preview_that_goes_before_it_is_seen_is_no_error(held, browser):
    with window(browser, held) as page, window(browser, held) as late:
        page.goto(held.url)
        submit(page, "too late")
        expect(page.locator("#previews img").first).to_be_visible()
        for picture in held.service.files.making(job_of(held, page)).iterdir():
            picture.unlink()  # as when the job is cancelled between two looks at it
        with late.expect_response("**/previews/*") as answer:
            late.goto(page.url)
        assert answer.value.status == 204
        page.get_by_role("button", name="Cancel").click()
        expect(late.locator("#job")).to_contain_text("Cancelled.")


def test_two_tabs_follow_their_jobs(held, browser):
    with window(browser, held) as first:
        first.goto(held.url)
        submit(first, "the first")
        second = first.context.new_page()
        second.goto(held.url)
        submit(second, "the second")
        expect(second.locator("#state")).to_have_text("Waiting")
        expect(second.locator("#left")).to_contain_text("next in the queue")
        third = first.context.new_page()
        third.goto(second.url)  # the same job once more
        second.get_by_role("button", name="Cancel").click()
        expect(second.locator("#job")).to_contain_text("Cancelled.")
        expect(third.locator("#job")).to_contain_text("Cancelled.")
        held.held_at = None
        expect(first.locator("#split")).to_be_visible()


def test_a_restart_of_the_server_in_the_middle_is_survived(tmp_path, browser):
    own = Site(tmp_path / "site")
    own.held_at = HELD
    try:
        with window(browser, own, allowed="ERR_") as page:
            page.goto(own.url)
            submit(page, "it goes on")
            expect(page.locator("#previews img").first).to_be_visible()
            own.stop()
            expect(page.locator("#trouble")).to_be_visible()
            own.held_at = None
            own.start()
            expect(page.locator("#split")).to_be_visible()
            expect(page.locator("#trouble")).to_be_hidden()
            assert job_of(own, page).attempt == 2
    finally:
        own.stop()


def test_a_request_that_was_sent_twice_makes_one_job(tmp_path, browser):
    own = Site(tmp_path / "site")
    try:
        with window(browser, own, allowed="ERR_") as page:
            page.goto(own.url)

            def lost(route):
                route.fetch()  # it arrives, and its answer doesn't
                route.abort()

            page.route("**/v1/videos", lost, times=1)
            page.get_by_label("Prompt", exact=True).fill("once")
            page.get_by_role("button", name="Generate").click()
            expect(page.locator("#wrong")).to_contain_text("Press again")
            page.get_by_role("button", name="Generate").click()
            page.wait_for_url("**/jobs/*")
            assert sum(own.service.store.counts().values()) == 1
    finally:
        own.stop()


def test_nothing_is_wider_than_a_phone(site, finished, browser):
    phone = {"width": 320, "height": 640}
    with window(browser, site, viewport=phone, has_touch=True, is_mobile=True) as page:
        page.goto(site.url)
        assert not scrolls_sideways(page)
        page.get_by_text("More settings").click()
        assert not scrolls_sideways(page)
        page.goto(finished)
        for words in ("What ran dense, and why", "The atlas of heads", "Latents on the way"):
            page.get_by_text(words).click()
        expect(page.locator("#atlas-heads img").first).to_be_visible()
        assert not scrolls_sideways(page)
        small = page.evaluate(
            "[...document.querySelectorAll('button, select, input[type=number], textarea')]"
            ".filter(e => e.offsetHeight && e.offsetHeight < 44).map(e => e.id)"
        )
        assert not small, "fingers find it"


def test_a_job_is_submitted_by_keys_alone(site, finished, browser):
    with window(browser, site) as page:
        page.goto(site.url)
        reached = []
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id"))
            if reached[-1] == "prompt":
                page.keyboard.type("by keys")
            if reached[-1] == "submit":
                break
        wanted = ["split", "prompt", "size", "seed", "plan", "stop", "compare", "submit"]
        assert [name for name in reached if name in wanted] == wanted
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        page.wait_for_url("**/jobs/*")
        assert job_of(site, page).spec.prompt == "by keys"

"""The page without a browser: what it shows in every state, what it offers, and whom it lets in."""

import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from fastapi.testclient import TestClient

from sparse_dit.resources import shipped
from sparse_dit.search.front import front_path
from sparse_dit.serve.app import create_app
from sparse_dit.serve.dial import plan_choices, sizes
from sparse_dit.serve.example import shipped_example
from sparse_dit.serve.options import Limits
from sparse_dit.serve.plans import Plans, Served, load_plans
from sparse_dit.serve.requests import VideoRequest
from tests.helpers.page_cases import FORECASTS, PageEngine, page_card, page_plans
from tests.helpers.plan_cases import small
from tests.helpers.serve_cases import StubEngine, claimed, stub_card, stub_service, work

NASTY = """"><script>alert(1)</script> 'x' {{ 77777 * 77777 }} &amp; <img src=x onerror=alert(2)>"""
LONG_AGO = "video_" + "0" * 32


class Elements(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def values(self, *names):
        """The values of attributes."""
        return [value for _, attrs in self.found for name, value in attrs.items() if name in names]


@pytest.fixture
def service(tmp_path, request):
    """A server without HTTP, with a plan that has a front."""
    made = stub_service(tmp_path, page_card(), **getattr(request, "param", {}))
    yield made
    made.store.close()


@pytest.fixture
def client(service):
    """Somebody who looks."""
    return TestClient(create_app(service))


def asked(client, **changes):
    """Put a job into the queue; its id."""
    answer = client.post("/v1/videos", json={"prompt": "a cat"} | changes)
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def finish(service):
    """Run what waits."""
    return work(service, PageEngine(plans=service.card.plans))


def in_every_state(service, client, prompt):
    """A job of each status; addresses of all pages."""
    ids = [asked(client, prompt=prompt, compare=True), asked(client, prompt=prompt, plan="dense")]
    finish(service)
    ids.append(asked(client, prompt=f"broken {prompt}"))
    finish(service)
    ids.append(asked(client, prompt=prompt))
    claimed(service)
    ids += [asked(client, prompt=prompt), asked(client, prompt=prompt)]
    client.post(f"/v1/videos/{ids[-1]}/cancel")
    states = [client.get(f"/v1/videos/{id}").json()["status"] for id in ids]
    assert {*states} == {"completed", "failed", "in_progress", "queued", "cancelled"}
    return ["/", *(f"/jobs/{id}" for id in ids), f"/jobs/{ids[0]}/atlas", f"/jobs/{LONG_AGO}"]


def test_the_first_visit_shows_an_example_that_says_that_it_ships(client):
    page = client.get("/")
    assert page.status_code == 200
    for words in ("an example that ships with sparse_dit", "a toy model", "not by this server"):
        assert words in page.text, words
    example = shipped_example()
    assert example.machine in page.text and str(example.made) in page.text
    assert f"{example.video.psnr_db:.1f} dB" in page.text
    elements = Elements(page.text)
    wanted = {"prompt", "size", "seed", "plan", "compare", "negative_prompt", "num_frames"}
    assert wanted < {*elements.values("name")}
    assert "No worker is ready" in page.text, "a server without workers says so"
    assert re.search(r'<textarea id="prompt"[^>]*></textarea>', page.text), "the form is empty"
    films = [attrs["src"] for tag, attrs in elements.found if tag == "video"]
    sizes = []
    for address in films:
        answer = client.get(address, headers={"Range": "bytes=0-99"})
        assert answer.status_code == 206 and answer.headers["content-type"] == "video/mp4"
        sizes.append(int(answer.headers["content-range"].rpartition("/")[2]))
    assert len(films) == 2 and sum(sizes) < 300_000
    assert not re.search(r"/(jobs|v1/videos)/video_", page.text), "it is no job of this server"


def test_an_example_is_the_newest_that_was_compared(service, client):
    shown = asked(client, prompt="compared", compare=True)
    asked(client, prompt="newer, alone")
    finish(service)
    page = client.get("/").text
    assert f'data-id="{shown}"' in page and "the newest example" in page
    for words in ("35.6 dB", "SSIM", "density", "What ran dense, and why", "stage that is dense"):
        assert words in page, words
    assert f'href="/jobs/{shown}"' in page, "it stands in the list too"
    assert re.search(r'<textarea id="prompt"[^>]*></textarea>', page), "the form is empty"


def test_what_people_write_is_never_code(service, client):
    for address in in_every_state(service, client, NASTY):
        page = client.get(address).text
        assert "alert(1)" in page or address.endswith(("atlas", LONG_AGO)), address
        elements = Elements(page)
        scripts = [attrs.get("src", "") for tag, attrs in elements.found if tag == "script"]
        assert all(src.startswith("/static/page.js?") for src in scripts), address
        names = {name for _, attrs in elements.found for name in attrs}
        assert not {n for n in names if n.startswith("on") or n == "style"}, address
        assert "style" not in {tag for tag, _ in elements.found}
        assert "6049261729" not in page, "templates aren't rendered twice"


def test_every_link_leads_somewhere_on_this_server(service, client):
    for address in in_every_state(service, client, "a cat"):
        elements = Elements(client.get(address).text)
        for link in {*elements.values("href", "src", "data-address")}:
            assert link.startswith(("/", "#", "data:")), link
            if link.startswith("/"):
                answer = client.get(link.partition("#")[0])
                assert answer.status_code == 200, (address, link)
        ids = {*elements.values("id")}
        anchors = {link[1:] for link in elements.values("href") if link.startswith("#")}
        assert anchors | {*elements.values("for", "aria-labelledby", "aria-describedby")} <= ids


def test_every_field_and_picture_has_words(service, client):
    for address in in_every_state(service, client, "a cat"):
        elements = Elements(client.get(address).text)
        labelled = {*elements.values("for")}
        for tag, attrs in elements.found:
            if tag in ("input", "select", "textarea", "progress") and attrs.get("type") != "hidden":
                assert attrs.get("id") in labelled or attrs.get("aria-label"), (address, attrs)
            if tag == "img":
                assert "alt" in attrs, address
            if tag == "video":
                assert attrs["aria-label"], address
        assert [tag for tag, _ in elements.found].count("h1") == 1, address


def test_pages_keep_the_content_security_policy(service, client):
    for address in in_every_state(service, client, "a cat"):
        policy = client.get(address).headers["content-security-policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy


def test_a_job_that_is_gone_is_told_on_the_page(client):
    for id in (LONG_AGO, "video_x", "%3Cscript%3E"):
        answer = client.get(f"/jobs/{id}")
        assert answer.status_code == 404 and "There is no such job" in answer.text
        assert 'id="ask"' in answer.text and id not in answer.text
    assert client.get(f"/jobs/{LONG_AGO}/atlas").status_code == 404


def test_the_form_has_what_the_job_was_asked_for(client):
    id = asked(client, prompt="a dog", seed=9, size="64x96", speedup=1.2, num_inference_steps=4)
    page = client.get(f"/jobs/{id}").text
    assert '<textarea id="prompt"' in page and ">a dog</textarea>" in page
    elements = Elements(page)
    fields = {a["id"]: a for tag, a in elements.found if tag == "input" and "id" in a}
    assert (fields["seed"]["value"], fields["steps"]["value"]) == ("9", "4")
    assert fields["stop"]["data-at"] == "1" and "checked" not in fields["compare"]
    chosen = [a["value"] for tag, a in elements.found if tag == "option" and "selected" in a]
    assert chosen == ["64x96", "front"]


def test_stops_of_the_dial_are_points_that_requests_get():
    front, single = plan_choices(page_card())
    plans = page_plans()
    assert [stop.speedup for stop in front.stops] == [point[0] for point in FORECASTS]
    assert front.at == 2 and front.stops[2].ask is None and front.stops[2].psnr_db == 35.5
    for number, stop in enumerate(front.stops):
        assert plans.named("front", stop.ask).density == stop.density
        assert front.at_speedup(stop.ask) == number
    assert [stop.measured for stop in front.stops] == [False, False, True, False]
    assert len(single.stops) == 1 and single.stops[0].seconds is None


def test_points_that_no_request_gets_are_no_stops():
    served = page_plans()["front"]
    worse = served.front.points[1].model_copy(update={"speedup": 1.1, "error": 0.9})
    points = (served.front.points[0], worse, *served.front.points[1:])
    front = type(served.front)(served.front.config_hash, 10.0, served.front.patterns, points)
    (choice,) = plan_choices(page_card(Plans([Served("front", served.plan, front)])))
    assert 1.1 not in [stop.speedup for stop in choice.stops] and len(choice.stops) == 4


def test_the_embedded_models_plan_has_a_dial():
    folder = shipped("profiles") / "tiny-wan"
    assert front_path(folder / "plan.json").stat().st_size <= 60_000
    plans = load_plans(["tiny-wan"])
    (choice,) = plan_choices(replace(page_card(), plans=plans))
    own, stops = choice.stops[choice.at], choice.stops
    assert len(stops) >= 8 and 0 < choice.at < len(stops) - 1
    assert (
        own.ask is None
        and own.measured
        and own.psnr_db == plans["tiny-wan"].plan.measured["psnr_db"]
    )
    for less, more in itertools.pairwise(stops):
        assert less.speedup < more.speedup and less.seconds > more.seconds
        assert less.psnr_db > more.psnr_db and less.density > more.density
    for stop in stops:
        plan = plans.named("tiny-wan", stop.ask)
        assert plan.forecast["speedup"] == pytest.approx(stop.speedup)
        assert plan.density == pytest.approx(stop.density)


def test_every_size_that_is_offered_can_be_made():
    card, limits = page_card(), Limits(pixels=128 * 96)
    offered = sizes(card, limits)
    assert {"96x64", "64x96", "48x32"} <= {*offered} and "192x128" not in offered
    for size in offered:
        card.spec_of(VideoRequest(prompt="a cat", size=size), False, limits)
    assert sizes(stub_card(plans=Plans([Served("fast", small(), None)])), limits)[0] == "16x16"


def test_older_jobs_are_on_further_pages(client):
    ids = [asked(client, prompt=f"number {n}") for n in range(15)]
    first = client.get("/").text
    assert "number 14" in first and "number 2<" not in first
    (older,) = re.findall(r'href="(/\?after=[^"#]+)', first)
    assert older.endswith(ids[3])
    second = client.get(older).text
    assert "number 2<" in second and "number 14" not in second and "Older" not in second
    assert client.get("/?after=video_x").status_code == 200


def test_the_atlas_shows_the_point_that_ran(service, client):
    ids = [asked(client, speedup=speedup) for speedup in (1.0, 2.5)]
    plain, sparse = (client.get(f"/jobs/{id}/atlas").text for id in ids)
    assert plain.count("<img") == sparse.count("<img") == 4
    assert "far field" in sparse and "window" in sparse and "window" not in plain
    dense = asked(client, plan="dense")
    assert client.get(f"/jobs/{dense}/atlas").status_code == 404
    assert 'id="atlas"' not in client.get(f"/jobs/{dense}").text


def test_static_files_are_kept_by_browsers_for_as_long_as_they_are_the_same(client):
    page = client.get("/").text
    for name, kind in (("page.css", "text/css"), ("page.js", "text/javascript")):
        (address,) = re.findall(rf'"(/static/{name}\?[0-9a-f]+)"', page)
        answer = client.get(address)
        assert answer.headers["content-type"].startswith(kind)
        assert "immutable" in answer.headers["cache-control"]
    for name in ("page.py", "..%2fpage.py", "page.html.j2"):
        assert client.get(f"/static/{name}").status_code == 404
    assert client.get("/").headers["cache-control"] == "no-store"


def test_a_pipeline_of_images_has_the_same_page(tmp_path):
    plans = Plans([Served("fast", small(), None)])
    service = stub_service(tmp_path, stub_card("image", plans=plans))
    client = TestClient(create_app(service))
    first = client.get("/").text
    assert "Nothing was generated yet" in first and "The image is made twice" in first
    assert 'action="/v1/images"' in first and 'name="num_frames"' not in first
    form = {"prompt": (None, "a cat"), "compare": (None, "true"), "seed": (None, "")}
    job = client.post("/v1/images", files=form).json()
    address = f"/v1/images/{job['id']}"
    assert f'data-address="{address}"' in client.get(f"/jobs/{job['id']}").text
    work(service, StubEngine(plans=plans, encode=True))
    elements = Elements(client.get("/").text)
    shown = [attrs for tag, attrs in elements.found if tag == "img" and "class" in attrs]
    assert [attrs["class"] for attrs in shown] == ["sparse", "dense"]
    for attrs in shown:
        answer = client.get(attrs["src"])
        assert answer.headers["content-type"] == "image/png" and answer.content
    done = client.get(address).json()
    assert (done["object"], done["file_name"]) == ("image", "image.png")
    assert done["variants"] == ["image", "thumbnail", "dense"] and done["psnr_db"] > 30
    assert client.get(f"{address}/content").headers["content-type"] == "image/png"
    assert "it makes images" in client.get(f"{address}/content?variant=video").text
    assert client.get(f"/v1/videos/{job['id']}").status_code == 404
    assert client.delete(address).json()["object"] == "image.deleted"
    service.store.close()


@pytest.mark.parametrize("service", [{"api_keys": ("other", "right")}], indirect=True)
def test_a_key_is_asked_for_and_kept_where_scripts_cannot_read_it(service):
    client = TestClient(create_app(service), follow_redirects=False)
    for address in ("/", f"/jobs/{LONG_AGO}", f"/jobs/{LONG_AGO}/atlas"):
        answer = client.get(address)
        assert answer.status_code == 401 and 'name="key"' in answer.text
        assert f'value="{address}"' in answer.text and 'id="ask"' not in answer.text
    wrong = client.post("/key", data={"key": "wrong"})
    assert wrong.status_code == 401 and "none of its keys" in wrong.text
    assert "set-cookie" not in wrong.headers
    evil = client.post("/key", data={"key": "right", "next": "//evil.example"})
    assert evil.headers["location"] == "/"
    client.cookies.clear()
    right = client.post("/key", data={"key": " right ", "next": f"/jobs/{LONG_AGO}"})
    assert (right.status_code, right.headers["location"]) == (303, f"/jobs/{LONG_AGO}")
    cookie = right.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert client.get("/").status_code == 200 and client.get("/v1/videos").status_code == 200
    assert client.get("/static/page.css").status_code == 200


@pytest.mark.parametrize("service", [{"api_keys": ("right",)}], indirect=True)
def test_keys_cannot_be_tried_at_will(service):
    client = TestClient(create_app(service))
    codes = [client.post("/key", data={"key": f"wrong {n}"}).status_code for n in range(12)]
    assert codes == [401] * 10 + [429] * 2
    headers = {"Origin": "https://evil.example"}
    assert client.post("/key", data={"key": "right"}, headers=headers).status_code == 403

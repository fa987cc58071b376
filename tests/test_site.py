"""The built site in a browser: nothing is missing or comes from elsewhere, and all is seen."""

import functools
import http.server
import shutil
import threading
from pathlib import Path

import pytest

SITE = Path(__file__).parents[1] / "docs" / "_build" / "html"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
PAGES = [page for page in PAGES if not page.startswith("_")]
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PAGES, reason="there is no site: make docs"),
    pytest.mark.skipif(not BROWSER, reason="there is no chromium: apt-get install chromium"),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *message):
        pass


@pytest.fixture(scope="module")
def address():
    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install --group docs")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser, address, page, size="desktop"):
    """The page, and what went wrong on the way."""
    width, height = SIZES[size]
    view, faults = browser.new_page(viewport={"width": width, "height": height}), []
    view.on("pageerror", lambda error: faults.append(str(error)))
    view.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
    view.on("requestfailed", lambda request: faults.append(request.url))

    def look(response):
        local = response.url.startswith((address, "data:", "blob:"))
        if not local or response.status >= 400:
            faults.append(f"{response.status} {response.url}")

    view.on("response", look)
    view.goto(address + page, wait_until="networkidle")
    return view, faults


@pytest.mark.parametrize("size", SIZES)
def test_every_page_is_whole_and_does_not_scroll_sideways(size, browser, address):
    assert len(PAGES) > 40
    for page in PAGES:
        view, faults = opened(browser, address, page, size)
        assert not faults, page
        wide, room = view.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= room, page
        broken = view.evaluate(
            "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
        )
        assert not broken, page
        view.close()


def test_search_finds(browser, address):
    view, faults = opened(browser, address, "search.html?q=importance+factor")
    view.wait_for_selector("#search-results li a")
    found = view.locator("#search-results li a").all_inner_texts()
    assert any("method" in text.lower() or "API" in text for text in found), found
    assert not faults


def test_formulas_are_rendered(browser, address):
    view, _ = opened(browser, address, "method.html")
    view.wait_for_selector("mjx-container svg, mjx-container mjx-math")
    assert view.locator("mjx-container").count() > 3
    assert "\\sum" not in view.locator("article").inner_text()


@pytest.mark.parametrize("size", SIZES)
def test_results_can_be_explored(size, browser, address):
    view, faults = opened(browser, address, "explore.html", size)
    frame = view.frame_locator("iframe.explorer")
    frame.locator("canvas, svg").first.wait_for()
    choice = frame.locator("form.vega-bindings select")
    options = choice.locator("option").all_inner_texts()
    assert len(options) > 10
    before = frame.locator(".vega-embed").first.screenshot()
    choice.select_option(options[-1])
    view.wait_for_timeout(1000)
    assert frame.locator(".vega-embed").first.screenshot() != before
    assert not faults


def test_notebooks_have_their_pictures(browser, address):
    for page in (page for page in PAGES if page.startswith("gallery/")):
        view, _ = opened(browser, address, page)
        assert view.locator("article img").count() >= 1, page
        view.close()

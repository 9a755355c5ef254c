"""The book in headless Chromium: `make test-browser`, outside `make test`."""

import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

BOOK = Path(__file__).parents[1] / "runs/book/html"
WRONG = """[...document.querySelectorAll("img, .math, mjx-merror, .tag_solution")].filter((e) =>
  e.matches("img[alt=''], img[alt$='.png'], .math:not(:has(mjx-container)), mjx-merror,"
    + ".tag_solution:not(:has(details:not([open])))") || e.naturalWidth === 0
).map((e) => e.outerHTML).concat(document.documentElement.scrollWidth > innerWidth ? "wide" : [])"""


@pytest.fixture(scope="module")
def browser() -> Browser:
    if not (chromium := shutil.which(os.environ.get("CHROMIUM", "/usr/bin/chromium"))):
        pytest.exit("no Chromium: install it, or set CHROMIUM to its path", 1)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium)


@pytest.mark.parametrize("width", [1200, 400])
def test_every_page_of_the_book_is_whole_without_a_network(browser: Browser, width: int) -> None:
    page, wrong = browser.new_page(viewport={"width": width, "height": 900}), []
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on("request", lambda request: "file:" in request.url or wrong.append(request.url))
    for path in BOOK.rglob("*.html"):
        page.goto(path.as_uri())
        page.evaluate("async () => { await window.MathJax?.startup.promise }")
        wrong += [f"{path.name}: {what[:300]}" for what in page.evaluate(WRONG)]
    page.goto((BOOK / "search.html").as_uri() + "?q=codebook")
    page.locator("#search-results a[href*='03_']").wait_for()
    assert not wrong

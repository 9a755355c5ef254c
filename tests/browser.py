"""The book and JupyterLab in headless Chromium: `make test-browser`, outside `make test`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Error, sync_playwright

ROOT = Path(__file__).parents[1]
BOOK, LAB = ROOT / "runs/book/html", "http://localhost:18888/lab/tree/00_quickstart.ipynb"
SERVE = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=18888"]
SERVE += ["--port-retries=0", "--IdentityProvider.token="]
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


def test_the_quickstart_runs_in_jupyterlab_and_its_panel_redraws(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(ROOT / "notebooks/00_quickstart.ipynb", tmp_path)
    settings = tmp_path / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')  # cells out of sight are on the page, too
    monkeypatch.setenv("JUPYTERLAB_SETTINGS_DIR", str(tmp_path / "settings"))
    page, lab = browser.new_page(), subprocess.Popen(SERVE, cwd=tmp_path)
    page.set_default_timeout(300_000)
    try:
        while lab.poll() is None and page.url != LAB:
            try:
                page.goto(LAB)
            except Error:  # it has not started yet
                page.wait_for_timeout(1000)
        page.get_by_text("(ipykernel) | Idle").wait_for()
        for item in ("Run", "Run All Cells"):
            page.get_by_role("menuitem", name=item, exact=True).click()
        panel = page.locator(".widget-interact")
        panel.locator("select").select_option("fluent")
        panel.get_by_role("button").click()
        panel.locator("img").wait_for()
        page.get_by_text("'n_psnr'").wait_for()  # of the last cell
    finally:
        lab.terminate()
        lab.wait()

"""A real Chromium for the tests of pages, where there is one."""

import shutil
import sys
from pathlib import Path

import pytest

# pytest imports each test file on its own; `from recordings import …` needs the folder.
sys.path.insert(0, str(Path(__file__).parent))

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium without a window. The tests skip where it, or Playwright, is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def open_page(browser):
    """`open_page(file, width=, scheme=)`: the page; the test fails if the page reports an error or loads anything."""
    troubles, contexts = [], []

    def open_it(file, width=1200, height=900, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        address = Path(file).as_uri()
        page.on("request", lambda request: troubles.append(request.url) if foreign(request.url, address) else None)
        page.goto(address)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert troubles == []


def foreign(url, own):
    """Whether an address leads out of the page."""
    return url != own and not url.startswith("data:")

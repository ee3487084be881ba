"""Pages in a real browser, and what is wrong with them."""

import sys
from pathlib import Path

import pytest

# pytest imports each test file on its own; `from recordings import …` needs the folder.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def violations():
    """`violations(page)`: what axe-core finds wrong with a page for readers who see, hear or type otherwise."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

    def find(page):
        found = axe.Axe().run(page).response["violations"]
        return [f"{rule['id']}: {node['html']}" for rule in found for node in rule["nodes"]]

    return find


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

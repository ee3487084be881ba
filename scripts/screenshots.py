"""Takes the screenshots of docs/inspect.md from pages that `mixhead inspect` wrote, with a real Chromium.

python scripts/screenshots.py docs/images --texts two.html --pictures dino.html --drawing dit.html \
    --translation moa.html --play ADDRESS
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


class Camera:
    def __init__(self, browser, out):
        self.browser, self.out = browser, Path(out)

    def open(self, where, width, height, scheme="light"):
        page = self.browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.goto(where if where.startswith("http") else Path(where).resolve().as_uri())
        return page

    def shoot(self, page, name, top=None):
        if top is not None:
            page.evaluate(
                "id => { document.documentElement.style.scrollBehavior = 'auto';"
                " document.getElementById(id).scrollIntoView(); }",
                top,
            )
        page.wait_for_timeout(800)
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        # Under 200 kB.
        picture = picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        picture.save(self.out / name, optimize=True)


def texts(camera, file):
    light = camera.open(file, 1200, 1150)
    light.locator("#flow .t").nth(25).hover()
    camera.shoot(light, "inspect.png")
    camera.shoot(camera.open(file, 1200, 900, "dark"), "inspect-compare.png", "compare")
    phone = camera.open(file, 390, 760)
    phone.locator("#heads button").nth(3).click()
    phone.locator("#flow .t").nth(25).click()
    camera.shoot(phone, "inspect-phone.png", "tokens")


def pictures(camera, file):
    page = camera.open(file, 1200, 640)
    page.locator("#layer").fill("8")
    page.locator("#heads button").nth(2).click()
    page.locator("#flow canvas").nth(1).hover()
    camera.shoot(page, "inspect-pictures.png", "tokens")


def drawing(camera, file):
    page = camera.open(file, 900, 560)
    page.locator("#time").fill("4")
    page.locator("#heads button").nth(2).click()
    camera.shoot(page, "inspect-drawing.png", "tokens")


def translation(camera, file):
    page = camera.open(file, 900, 560)
    page.locator("#layer").fill("4")
    page.locator("#flow .flow").nth(1).locator(".t").nth(5).click()
    camera.shoot(page, "inspect-translation.png", "tokens")


def play(camera, address):
    page = camera.open(address, 1200, 900)
    page.locator("#everywhere label", has_text="3").click()
    page.locator("#write").click()
    said = page.locator("#said")
    page.locator("#said", has_text="the texts part").or_(said.filter(has_text="both wrote")).wait_for(timeout=300_000)
    camera.shoot(page, "play.png")


KINDS = {"texts": texts, "pictures": pictures, "drawing": drawing, "translation": translation, "play": play}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    for kind in KINDS:
        parser.add_argument(f"--{kind}", metavar="PAGE")
    given = vars(parser.parse_args())
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        camera = Camera(browser, given["out"])
        for kind, take in KINDS.items():
            if given[kind] is not None:
                take(camera, given[kind])
        browser.close()


if __name__ == "__main__":
    main()

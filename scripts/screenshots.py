"""Takes the screenshots of docs/inspect.md from pages that `mixhead inspect` wrote, with a real Chromium.

python scripts/screenshots.py TEXTS.html PICTURES.html docs/images [ADDRESS of a running `mixhead play`]
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def main(texts, pictures, out, address=None):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)

        def page(where, width, height, scheme):
            opened = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            opened.goto(where)
            return opened

        def shoot(opened, name, top=None):
            if top is not None:
                opened.evaluate(f"document.documentElement.style.scrollBehavior = 'auto'; {top}.scrollIntoView()")
            opened.wait_for_timeout(400)
            picture = Image.open(io.BytesIO(opened.screenshot())).convert("RGB")
            picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
                Path(out) / name, optimize=True
            )  # under 200 kB

        light = page(Path(texts).resolve().as_uri(), 1200, 1150, "light")
        light.locator("#flow .t").nth(25).hover()
        shoot(light, "inspect.png")
        dark = page(Path(texts).resolve().as_uri(), 1200, 900, "dark")
        shoot(dark, "inspect-compare.png", "document.getElementById('compare')")
        phone = page(Path(texts).resolve().as_uri(), 390, 760, "light")
        phone.locator("#heads button").nth(3).click()
        phone.locator("#flow .t").nth(25).click()
        shoot(phone, "inspect-phone.png", "document.getElementById('tokens')")
        image = page(Path(pictures).resolve().as_uri(), 1200, 640, "light")
        image.locator("#layer").fill("8")
        image.locator("#heads button").nth(2).click()
        image.locator("#flow canvas").nth(1).hover()
        shoot(image, "inspect-pictures.png", "document.getElementById('tokens')")
        if address is not None:
            play = page(address, 1200, 900, "light")
            play.locator("#everywhere label", has_text="3").click()
            play.locator("#write").click()
            play.locator("#said", has_text="the texts part").or_(play.locator("#said", has_text="both wrote")).wait_for(
                timeout=300_000
            )
            shoot(play, "play.png")
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A visit to the demo page in headless Chromium, run by `test_demo.py`.

python browser_visit.py CHROMIUM ADDRESS CLIP BAD_FILE SCREENSHOTS
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

SECONDS = 60_000  # milliseconds that anything may take on a busy machine

QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def visit(page: Page, address: str, clip: str, bad: str, folder: Path) -> None:
    """What a first visitor does."""
    strangers: list[str] = []
    page.on("request", lambda request: strangers.append(request.url))
    page.goto(address)
    expect(page.get_by_role("heading", name="DashengTokenizer")).to_be_visible()
    page.locator("#clip input[type=file]").set_input_files(clip)
    expect(page.locator("#clip").get_by_label("Play", exact=True)).to_be_visible()
    page.locator("#reconstruct").click()
    expect(page.locator("#figures")).to_contain_text("135 a channel, 25 a second")
    expect(page.locator("img[alt*=plot], .plot-container img, img[src^='data:image']").first).to_be_visible()
    play = page.locator("#reconstruction").get_by_label("Play", exact=True)
    play.click()
    expect(page.locator("#reconstruction").get_by_label("Pause", exact=True)).to_be_visible()
    page.wait_for_timeout(500)
    page.screenshot(path=folder / "reconstruct.png", full_page=True)
    page.get_by_role("tab", name="Look inside").click()
    page.locator("#compare").click()
    expect(page.locator("#nearest")).to_contain_text("speech-russian")
    page.screenshot(path=folder / "inside.png", full_page=True)
    page.get_by_role("button", name="noisy-speech").click()
    page.get_by_role("tab", name="Enhance speech").click()
    page.locator("#enhance").click()
    expect(page.locator("#enhanced").get_by_label("Play", exact=True)).to_be_visible()
    page.screenshot(path=folder / "enhance.png", full_page=True)
    page.get_by_role("tab", name="Generate").click()
    page.locator("#text textarea").fill("a loud bell")
    page.locator("#generate").click()
    expect(page.locator("#generated").get_by_label("Play", exact=True)).to_be_visible()
    page.screenshot(path=folder / "generate.png", full_page=True)
    page.reload()
    page.locator("#clip input[type=file]").set_input_files(bad)
    page.locator("#reconstruct").click()
    expect(page.get_by_text("notes.wav is not audio")).to_be_visible()
    page.screenshot(path=folder / "error.png", full_page=True)
    foreign = [url for url in strangers if not url.startswith((address, "data:", "blob:"))]
    assert not foreign, f"the page asks others for {foreign}"


if __name__ == "__main__":
    browser_path, address, clip, bad, screenshots = sys.argv[1:]
    expect.set_options(timeout=SECONDS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=list(QUIET))
        tab = browser.new_page(viewport={"width": 1280, "height": 1000})
        tab.set_default_timeout(SECONDS)
        visit(tab, address, clip, bad, Path(screenshots))
        browser.close()

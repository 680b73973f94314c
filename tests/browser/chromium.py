"""A headless Chromium under selenium, and pictures of feature pages with it.

    python tests/browser/chromium.py data/runs/laptop/features/<hook>/<dictionary> 83 docs/images

writes a picture of the page of feature 83 at desktop and at phone width. Wants Debian's chromium and chromium-driver, and the
extra ``browser`` of pyproject.toml.
"""

import base64
import shutil
import sys
import tempfile
import time
from pathlib import Path

from saelib import files

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}


def start(profile: Path):
    """A running browser with its profile in the folder `profile`. Raises `LookupError` where none is installed."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        raise LookupError("no Chromium and chromedriver on this machine: install Debian's chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in [*FLAGS, f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))


def resize(browser, width: int, height: int) -> None:
    """Give the window this size in CSS pixels; a narrow one is a phone's."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def until(browser, script: str, seconds: float = 10):
    """Wait until the JavaScript `script` returns something true, and return that."""
    end = time.monotonic() + seconds
    while not (result := browser.execute_script(script)):
        assert time.monotonic() < end, f"waited {seconds} s for: {script}"
        time.sleep(0.02)
    return result


def picture(browser, page: Path, feature: int, path: Path, width: int, height: int) -> None:
    """The page of a feature as PNG, `height` pixels of it."""
    resize(browser, width, height)
    browser.get("about:blank")
    browser.get(f"{(page / 'index.html').resolve().as_uri()}#f{feature}")
    until(browser, "return document.querySelector('#feature:not([hidden]) h2')")
    time.sleep(0.5)  # for the last paint
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    with files.atomic(path) as temporary:
        temporary.write_bytes(base64.b64decode(shot))


if __name__ == "__main__":
    page, feature, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    with tempfile.TemporaryDirectory() as place:
        browser = start(Path(place))
        for name, measures in WIDTHS.items():
            picture(browser, page, feature, out / f"feature_page_{name}.png", *measures)
        browser.quit()

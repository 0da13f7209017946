"""A headless Chromium that opens pages from disk and tells what they did."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
HOW = "install it with: apt-get install chromium chromium-driver"
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
           "--window-size=1400,1000", "--force-device-scale-factor=1")  # fmt: skip


class Browser:
    """One Chromium; `open` loads a page and waits until its scripts have run."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.page: Path | None = None

    def open(self, page: Path, *, dark: bool = False, fragment: str = "") -> Browser:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.page = page
        self.driver.get(page.as_uri() + fragment)
        assert self.js("return document.documentElement.dataset.ready") == "true"
        return self

    @contextmanager
    def screen(self, width: int, height: int) -> Iterator[None]:
        """Meanwhile a screen of this size, px."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def js(self, script: str, *args: Any) -> Any:
        return self.driver.execute_script(script, *args)

    def draw_all(self) -> None:
        """Opens every window and draws every part, as scrolling through the page would."""
        self.js(
            "document.querySelectorAll('details').forEach((d) => { d.open = true; });"
            "return Promise.all([...document.querySelectorAll('[data-part]')].map(sglprof.draw))"
            ".then(() => sglprof.allLoaded);"
        )

    def console(self) -> list[str]:
        """Everything that the page wrote to the console, errors of scripts included."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the page was opened, other than the page."""
        found = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                found.append(message["params"]["request"]["url"].split("#")[0])
        assert self.page is not None
        return [url for url in found if url != self.page.as_uri()]

    def axe(self) -> list[dict[str, Any]]:
        """Violations that axe-core calls serious or critical: id, and the first elements."""
        import axe_core_python

        script = Path(str(axe_core_python.__file__)).with_name("axe.min.js").read_text()
        # From outside of the page's own policy, as a devtools extension would.
        self.driver.execute_cdp_cmd("Page.setBypassCSP", {"enabled": True})
        self.js(script)
        self.driver.execute_cdp_cmd("Page.setBypassCSP", {"enabled": False})
        found = self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            "axe.run(document).then((r) => done(r.violations.map("
            "(v) => ({id: v.id, impact: v.impact, nodes: v.nodes.slice(0, 3).map((n) => n.html)}"
            "))))"
        )
        return [v for v in found if v["impact"] in ("serious", "critical")]


def find_chromium() -> tuple[str, str]:
    """Paths of Chromium and of its driver, or the end of the calling test."""
    binary = next(filter(None, map(shutil.which, CHROMIUM)), None)
    driver_path = shutil.which("chromedriver")
    if binary is None or driver_path is None:
        _without("no Chromium" if binary is None else "no chromedriver")
    return binary, driver_path


@contextmanager
def chromium() -> Iterator[Browser]:
    """A running Chromium, or the end of the calling test."""
    binary, driver_path = find_chromium()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # selenium's own
        from selenium.webdriver import Chrome, ChromeOptions
        from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = binary
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(driver_path))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


def _without(reason: str) -> NoReturn:
    if os.environ.get("SGLPROF_REQUIRE_REAL", "") not in ("", "0"):
        pytest.fail(f"{reason}, but SGLPROF_REQUIRE_REAL is set; {HOW}", pytrace=False)
    pytest.skip(f"{reason}; {HOW}")

"""A headless Chromium that notes what a page complains of and asks for."""

import json
import shutil
from urllib.parse import unquote

import pytest

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


TRAINING = "#training .panel:first-child"
DEPTH = "#depth .panel:first-child"


class Reader:
    """One browser window.

    Args:
        profile: A new, empty folder.
    """

    def __init__(self, profile):
        webdriver = pytest.importorskip("selenium.webdriver")
        if BROWSER is None or DRIVER is None:
            pytest.skip("Chromium and its driver aren't installed")
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        logs = {"browser": "ALL", "performance": "ALL"}
        options.set_capability("goog:loggingPrefs", logs)
        service = webdriver.ChromeService(executable_path=DRIVER)
        self.driver = webdriver.Chrome(options=options, service=service)

    def command(self, name, **arguments):
        return self.driver.execute_cdp_cmd(name, arguments)

    def look(self, width=1400, height=1000, scheme="light", motion="no-preference"):
        """Set the size of the window and what the reader prefers."""
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion},
        ]
        self.command("Emulation.setEmulatedMedia", features=features)

    def open(self, path, hash=""):
        """Open a file and wait until the page is complete."""
        self.driver.get("about:blank")
        self.driver.get(path.as_uri() + hash)
        self.wait("document.documentElement.dataset.ready === 'true'")

    def wait(self, condition):
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 20, poll_frequency=0.02).until(
            lambda _: self.run(f"return {condition}")
        )

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def find(self, selector, number=0):
        """Return an element, in the middle of the window."""
        element = self.driver.find_elements("css selector", selector)[number]
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        return element

    def texts(self, selector):
        script = "return [...document.querySelectorAll(arguments[0])]"
        return self.run(f"{script}.map((e) => e.textContent)", selector)

    def press(self, *keys):
        """Press keys, wherever the focus is."""
        from selenium.webdriver import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    @property
    def choices(self):
        """What the address keeps of the reader's choices."""
        return unquote(self.run("return location.hash"))

    def complaints(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        """Return the addresses that were asked for since the last call."""
        events = (
            json.loads(entry["message"])["message"]
            for entry in self.driver.get_log("performance")
        )
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]


def names(reader, panel=TRAINING):
    return reader.texts(f"{panel} .legend .name")


def values(reader, panel=TRAINING):
    return dict(zip(names(reader, panel), reader.texts(f"{panel} .value"), strict=True))


def reading(reader, panel=TRAINING):
    return reader.texts(f"{panel} .readout-at")[0]

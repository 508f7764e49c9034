"""A browser on a real ComfyUI with this pack."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.headless.conftest import comfy_server  # noqa: F401

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
READY = "window.app?.graph && 'WanCoreSampler' in (window.LiteGraph?.registered_node_types ?? {})"
START_MS = 120_000


@dataclass
class Editor:
    """A page with the editor in it, and the errors that its console has shown."""

    page: Any
    url: str
    errors: list[str] = field(default_factory=list)
    known: set[str] = field(default_factory=set)

    def open(self, workflow: dict) -> None:
        self.page.evaluate("async (workflow) => { await window.app.loadGraphData(workflow) }", workflow)

    def prompt(self) -> dict:
        return self.page.evaluate("async () => (await window.app.graphToPrompt()).output")

    def saved(self) -> dict:
        return self.page.evaluate("() => JSON.parse(JSON.stringify(window.app.graph.serialize()))")

    def run_command(self, name: str) -> None:
        self.page.evaluate("async (name) => { await window.app.extensionManager.command.execute(name) }", name)

    def language(self, code: str) -> None:
        self.page.evaluate(
            "async (code) => { await window.app.extensionManager.setting.set('Comfy.Locale', code) }", code
        )
        self.load()

    def load(self) -> None:
        """Open the editor; errors that it shows before any workflow is opened are its own, or its server's."""
        self.page.goto(self.url, wait_until="domcontentloaded", timeout=START_MS)
        self.page.wait_for_function(READY, timeout=START_MS)
        with contextlib.suppress(Exception):  # a page that goes on loading is used as it is
            self.page.wait_for_load_state("networkidle", timeout=START_MS)
        time.sleep(2)
        self.page.keyboard.press("Escape")
        self.known |= set(self.errors)
        self.errors.clear()

    def new_errors(self) -> list[str]:
        """What the console has shown since the last call, without what it shows anyway."""
        found = [error for error in self.errors if error not in self.known]
        self.errors.clear()
        return found

    def picture(self, name: str) -> None:
        """A screenshot for the documents, where WANCORE_SCREENSHOTS names a folder for them."""
        folder = os.environ.get("WANCORE_SCREENSHOTS")
        if folder:
            self.page.evaluate("() => window.app.extensionManager.setting.set('Comfy.Minimap.Visible', false)")
            time.sleep(1)
            self.page.screenshot(path=str(Path(folder, f"{name}.jpg")), type="jpeg", quality=65)


def without_chance(text: str, url: str) -> str:
    """A console message that reads the same each time: addresses without their queries, no line numbers."""
    return f"{text.split(chr(10))[0].split(' (http')[0]} {urlsplit(url).path}"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def editor(comfy_server, browser) -> Iterator[Editor]:  # noqa: F811
    """The editor in the browser."""
    page = browser.new_page(viewport={"width": 1600, "height": 900})
    editor = Editor(page, comfy_server.url)
    page.on("pageerror", lambda error: editor.errors.append(without_chance(str(error), "")))
    page.on(
        "console",
        lambda message: (
            message.type == "error"
            and editor.errors.append(without_chance(message.text, message.location.get("url", "")))
        ),
    )
    editor.load()
    yield editor
    page.close()

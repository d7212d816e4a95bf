"""Drives a Chromium by its DevTools protocol over pipes: no package, port or page change."""

import base64
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")


def find() -> str | None:
    """Returns the path of a Chromium; None if this machine has none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One page: `events` has all that it reported, and `call` sends a request to the browser."""

    def __init__(self, requests: int, answers):
        self.events: list[dict] = []
        self._requests, self._answers = requests, answers
        self._ids, self._session = itertools.count(1), {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params):
        """Calls a method and returns its result; `events` gets what the page reports meanwhile."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params, **self._session}
        os.write(self._requests, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict:
        text = b"".join(iter(lambda: self._answers.read(1), b"\0"))
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def events_named(self, method: str) -> list[dict]:
        """Returns what the page reported under a name, such as Log.entryAdded."""
        return [event["params"] for event in self.events if event["method"] == method]

    def open(self, page: Path, width: int, scheme: str = "light") -> None:
        """Loads a file on a screen of `width` pixels, a phone's if below 600, and waits for it."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        seen = len(self.events_named("Page.loadEventFired"))
        self.call("Page.navigate", url=page.resolve().as_uri())
        while len(self.events_named("Page.loadEventFired")) == seen:
            self._read()

    def value(self, expression: str):
        """Returns the value of a JavaScript expression, or of the promise that it makes."""
        options = {"returnByValue": True, "awaitPromise": True}
        result = self.call("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """Writes the whole page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def print(self, file: Path) -> None:
        """Writes the page as PDF."""
        file.write_bytes(base64.b64decode(self.call("Page.printToPDF")["data"]))


@contextmanager
def open_tab(profile: Path) -> Iterator[Tab]:
    """Starts a Chromium that ends with the block, and yields its tab; `profile` is its folder."""
    theirs, requests = os.pipe()
    answers, answering = os.pipe()
    # Chromium reads from descriptor 3 and writes to 4.
    redirect = f'exec "$@" 3<&{theirs} 4>&{answering}'
    flags = (*FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe")
    browser = subprocess.Popen(
        ["bash", "-c", redirect, "bash", find(), *flags],
        pass_fds=(theirs, answering),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    os.close(answering)
    try:
        with open(answers, "rb") as stream:
            yield Tab(requests, stream)
    finally:
        browser.terminate()
        browser.wait()
        os.close(requests)

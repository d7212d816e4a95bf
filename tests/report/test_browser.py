"""The report of a real run, in a real browser."""

import functools
import http.server
import json
import shutil
import subprocess
import threading

import pytest

from bef_jax import train

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
# Written by a script that the test puts into a copy of the page: its own policy forbids scripts.
PROBE = """<script>addEventListener("load", () => { const images = [...document.images];
document.title = JSON.stringify({count: images.length,
loaded: images.filter(x => x.complete && x.naturalWidth > 0).length,
wide: document.documentElement.scrollWidth, seen: innerWidth,
requests: performance.getEntriesByType("resource").filter(x => !x.name.startsWith("data:")).length,
}) })</script>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (apt install chromium)")


def browse(url, tmp_path, *flags):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}", *flags, url,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def page(workdir, small_config):
    train.train_and_evaluate(small_config(), workdir)
    return workdir / "report" / "index.html"


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_every_picture_loads_and_nothing_is_asked_for(page, tmp_path, width):
    policy = page.read_text().split('content="default-src', 1)
    assert len(policy) == 2
    probed = page.read_text().replace("style-src 'unsafe-inline'", "style-src 'unsafe-inline'; "
                                      "script-src 'unsafe-inline'")  # fmt: skip
    copy = tmp_path / "probed.html"
    copy.write_text(probed.replace("</html>", f"{PROBE}</html>"))
    result = browse(copy.as_uri(), tmp_path, "--dump-dom", f"--window-size={width},900")
    title = result.stdout.split("<title>", 1)[1].split("</title>", 1)[0]
    found = json.loads(title.replace("&quot;", '"'))
    assert found["count"] == found["loaded"] > 10
    assert found["requests"] == 0
    assert found["wide"] <= found["seen"]  # no scrolling to the side


@pytest.mark.slow
def test_the_console_stays_empty_and_the_server_is_asked_for_one_file(page, tmp_path):
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form, *args):
            asked.append(self.path)

    serve = functools.partial(Handler, directory=page.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/index.html"
        result = browse(url, tmp_path, f"--screenshot={tmp_path / 'page.png'}")
        server.shutdown()
    assert "CONSOLE" not in result.stderr
    # Browsers ask for an icon of their own accord.
    assert [path for path in asked if path != "/favicon.ico"] == ["/index.html"]
    assert (tmp_path / "page.png").stat().st_size > 10_000

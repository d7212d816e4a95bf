"""The report of a real run in Chromium, under the page's own policy, which allows no scripts."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from tests import chromium

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.find() is None, reason="no chromium here (apt install chromium)"),
]
WIDTHS = (1280, 390)  # of a laptop and of a phone
SIZES = "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))"


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with chromium.open_tab(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def page(run_summary, workdir):
    """Returns the page of the run `trained`."""
    return workdir / "report" / "index.html"


def complaints(tab):
    """Returns what the browser or the page wrote to the console, also violations of a policy."""
    logged = [event["entry"]["text"] for event in tab.events_named("Log.entryAdded")]
    return (
        logged
        + tab.events_named("Runtime.consoleAPICalled")
        + tab.events_named("Runtime.exceptionThrown")
    )


def requests(tab):
    """Returns the addresses that were requested, without the data that the page contains."""
    urls = [event["request"]["url"] for event in tab.events_named("Network.requestWillBeSent")]
    return {url for url in urls if not url.startswith("data:")}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_picture_loads_from_the_one_file_without_complaints(width, scheme, page, tab):
    tab.events.clear()
    tab.open(page, width, scheme)
    sizes = tab.value(SIZES)
    assert len(sizes) > 10 and min(sizes) >= 96
    assert complaints(tab) == []
    assert requests(tab) == {page.resolve().as_uri()}
    page_width, screen_width = tab.value("[document.documentElement.scrollWidth, innerWidth]")
    assert page_width <= screen_width == width  # no scrolling to the side


def test_dark_screens_get_dark_pictures(page, tab, tmp_path):
    brightness = {}
    for scheme in ("light", "dark"):
        tab.open(page, 1280, scheme)
        tab.screenshot(tmp_path / "page.png")
        brightness[scheme] = np.asarray(Image.open(tmp_path / "page.png").convert("L")).mean()
        plot = tab.value("document.querySelector('.plots img').currentSrc").partition(",")[2]
        pixels = Image.open(io.BytesIO(base64.b64decode(plot))).convert("L")
        assert (np.asarray(pixels)[0, 0] > 128) == (scheme == "light")
    assert brightness["dark"] < 80 < 180 < brightness["light"]


def test_the_page_prints_to_pdf(page, tab, tmp_path):
    tab.open(page, 1280, "dark")
    tab.print(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_a_page_that_complains_or_requests_a_file_would_be_caught(tab, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.error('x')</script><img src='gone.png'>")
    tab.events.clear()
    tab.open(bad, 1280)
    assert len(complaints(tab)) == 2
    assert requests(tab) == {bad.as_uri(), (tmp_path / "gone.png").as_uri()}
